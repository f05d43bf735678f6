"""Which backends run on this machine, and where."""

from __future__ import annotations

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for this when it is
# imported, so it is said before anything imports leaf_ext; on a GPU they run on the GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from leaf_ext import dispatch, native
from leaf_ext.triton import INTERPRETED

# A build whose CPU ops are the CUDA kernels in tests/cuda_emulation, thread by thread.
EMULATED = native.ERROR is None and "cuda-emulation" in native.build_info()["backends"]


def device_of(backend: str) -> torch.device:
    """Where a backend runs in the tests."""
    on_gpu = backend == "cuda" or (backend == "triton" and not INTERPRETED)
    return torch.device("cuda" if on_gpu else "cpu")


# Every backend that runs on this machine. That "cpu" is among them is a test of its own, and what
# compiles the Triton kernels fails without Triton.
BACKENDS = tuple(
    name
    for name in dispatch.BACKENDS
    if name != "auto" and dispatch.missing(name, device_of(name), torch.float32) is None
)
