"""The backends that run on this machine, and their devices."""

from __future__ import annotations

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter. Triton reads the variable when it is
# imported, so it is set before anything imports leaf_ext.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from leaf_ext import dispatch, native
from leaf_ext.triton import INTERPRETED

# True in a build whose CPU ops are the emulated CUDA kernels (tests/cuda_emulation).
EMULATED = native.ERROR is None and "cuda-emulation" in native.build_info()["backends"]


def device_of(backend: str) -> torch.device:
    """Return the device of a backend in the tests."""
    on_gpu = backend == "cuda" or (backend == "triton" and not INTERPRETED)
    return torch.device("cuda" if on_gpu else "cpu")


# Every backend that runs on this machine. A separate test requires "cpu", and the test that
# compiles the Triton kernels fails without Triton.
BACKENDS = tuple(
    name
    for name in dispatch.BACKENDS
    if name != "auto" and dispatch.missing(name, device_of(name), torch.float32) is None
)
