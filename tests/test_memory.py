"""The memory of the linear loss, counted by the allocator."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import leaf_ext
from leaf_ext.ops import linear_chunks

WIDTH, VOCABULARY, CHUNK = 1024, 64, 256


def peak_bytes(run: Callable[[], object], trace: Path) -> int:
    """Return the peak of allocated memory above the level before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda event: float(event["ts"]))
    return max(accumulate(int(event["args"]["Bytes"]) for event in events))


# Bytes of an element that are kept for the backward.
@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 4)], ids=str
)
def test_only_the_hidden_gradient_grows_with_the_rows(
    dtype: torch.dtype, kept: int, tmp_path: Path
) -> None:
    """One copy after the forward, which the backward returns; of another dtype a second one."""
    forward, both = [], []
    sizes = (8192, 32768)
    for rows in sizes:
        hidden = torch.zeros(rows, WIDTH, dtype=dtype, requires_grad=True)
        head, teacher = torch.zeros(VOCABULARY, WIDTH, dtype=dtype), torch.zeros(rows, 8)
        teacher_head, weight = torch.zeros(VOCABULARY, 8), torch.full((rows,), 1 / rows)

        def loss(
            hidden: torch.Tensor = hidden,
            rest: tuple[torch.Tensor, ...] = (head, teacher, teacher_head, weight),
        ) -> torch.Tensor:
            return leaf_ext.linear_dual_kl(hidden, *rest, chunk_size=CHUNK)

        forward.append(peak_bytes(loss, tmp_path / "forward.json"))
        both.append(peak_bytes(lambda loss=loss: loss().backward(), tmp_path / "both.json"))
    elements = (sizes[1] - sizes[0]) * WIDTH
    returned = kept if kept == dtype.itemsize else kept + dtype.itemsize
    for peaks, bytes_each in ((forward, kept), (both, returned)):
        growth = (peaks[1] - peaks[0]) / elements
        assert bytes_each <= growth < bytes_each + 0.1


@pytest.mark.parametrize("multiplies_bfloat16", [True, False], ids=["native", "emulated"])
def test_the_head_gradient_of_a_single_bfloat16_chunk_is_kept_as_such(
    multiplies_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_chunks, "_multiplies_bfloat16", lambda: multiplies_bfloat16)
    hidden, head = (torch.zeros(n, 4).bfloat16().requires_grad_() for n in (6, 9))
    kept: list[torch.dtype] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape == head.shape:
            kept.append(tensor.dtype)
        return tensor

    for chunk_size in (6, 5):
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            teacher = hidden.detach(), head.detach()
            leaf_ext.linear_dual_kl(hidden, head, *teacher, torch.ones(6), chunk_size=chunk_size)
    alone = torch.bfloat16 if multiplies_bfloat16 else torch.float32
    assert kept == [alone, torch.float32]
