"""The loss over a head in parts, each on a rank of its own, is the loss over the whole head."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import leaf_ext

N, V, WIDTHS = 7, 37, (6, 10)
PARTS = (2, 4, 8)

Inputs = dict[str, Any]


def plain() -> Inputs:
    torch.manual_seed(0)
    inputs: Inputs = {
        "student_hidden": torch.randn(N, WIDTHS[0], dtype=torch.float64),
        "student_head": torch.randn(V, WIDTHS[0], dtype=torch.float64),
        "teacher_hidden": torch.randn(N, WIDTHS[1], dtype=torch.float64),
        "teacher_head": torch.randn(V, WIDTHS[1], dtype=torch.float64),
        "row_weight": torch.rand(N, dtype=torch.float64),
        "student_bias": torch.randn(V, dtype=torch.float64),
        "teacher_bias": torch.randn(V, dtype=torch.float64),
    }
    inputs["row_weight"][2] = 0
    return inputs


def scaled() -> Inputs:
    options = {"temperature": 2.0, "logit_scale": (0.5, 3.0), "logit_softcap": (4.0, None)}
    return {**plain(), **options, "chunk_size": 3}


def without_bias() -> Inputs:
    return {**plain(), "student_bias": None, "teacher_bias": None, "student_padding": 5}


def frozen_head() -> Inputs:
    return {**plain(), "frozen": ("student_head", "student_bias"), "teacher_padding": 3}


def hard() -> Inputs:
    """Excluded tokens of either model, of both in a whole part; a dropped and a live NaN row."""
    inputs = plain()
    inputs["student_bias"][[3, 20]] = -torch.inf
    inputs["teacher_bias"][[3, 30]] = -torch.inf
    inputs["teacher_bias"][:12] = -torch.inf
    inputs["student_bias"][:12] = -torch.inf
    inputs["student_hidden"][2] = torch.nan
    inputs["teacher_hidden"][5] = torch.nan
    return inputs


def excluded() -> Inputs:
    """The teacher's mass is where the student has none: an infinite loss, a finite gradient."""
    inputs = plain()
    inputs["student_bias"][20] = -torch.inf
    return inputs


def nothing() -> Inputs:
    return {**plain(), "row_weight": torch.zeros(N, dtype=torch.float64)}


def ties() -> Inputs:
    """The largest logits are equal in several parts: the lowest token counts."""
    inputs = {**plain(), "student_bias": None, "teacher_bias": None}
    inputs["student_head"] = torch.zeros_like(inputs["student_head"])
    inputs["teacher_head"] = torch.zeros_like(inputs["teacher_head"])
    inputs["teacher_head"][[0, 36], 0] = 1  # one product each: the same in any order of sums
    return inputs


def single() -> Inputs:
    """In float32, with logits of standard deviation 30."""
    inputs = {k: v.float() if isinstance(v, Tensor) else v for k, v in plain().items()}
    return {**inputs, "logit_scale": 10.0, "frozen": ("student_bias",)}


CASES: dict[str, Callable[[], Inputs]] = {
    one.__name__: one
    for one in (plain, scaled, without_bias, frozen_head, hard, excluded, nothing, ties, single)
}
TRAINED = ("student_hidden", "student_head", "student_bias")


def measure(inputs: Inputs, part: slice | None = None) -> dict[str, Tensor]:
    """Return loss, rows and gradients, of a part of the heads or of the whole ones."""
    inputs = dict(inputs)
    frozen = inputs.pop("frozen", ())
    last = part is None or part.stop == inputs["student_head"].shape[0]
    for side in ("student", "teacher"):
        padding = inputs.pop(f"{side}_padding", 0) * last
        for name in (f"{side}_head", f"{side}_bias"):
            if inputs[name] is not None:
                own = inputs[name] if part is None else inputs[name][part]
                tail = own.new_full((padding, *own.shape[1:]), 7.0)
                inputs[name] = torch.cat([own, tail])
    for name in set(TRAINED) - set(frozen):
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    if part is None:
        loss, rows = leaf_ext.linear_dual_kl(**inputs, return_rows=True, backend="reference")
        alone = loss
    else:
        loss, rows = leaf_ext.vocab_parallel_dual_kl(**inputs, return_rows=True)
        alone = leaf_ext.vocab_parallel_dual_kl(**inputs)
    (3 * loss).backward()
    grads = {name: inputs[name].grad for name in TRAINED if inputs[name] is not None}
    assert all(grads[name] is None for name in frozen)
    return {"loss": loss.detach(), "alone": alone.detach(), **rows._asdict(), **grads}


def cut(size: int) -> list[slice]:
    """Parts as unequal as 37 tokens in 8 parts are: 5 each, the last one smaller."""
    step = -(-V // size)
    return [slice(min(at * step, V - 1), min((at + 1) * step, V)) for at in range(size)]


def run_rank(rank: int, size: int, directory: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size
    )
    results: dict[str, Any] = {
        name: measure(make(), cut(size)[rank]) for name, make in CASES.items()
    }
    results["errors"] = [refused(rank, **change) for change in (UNEQUAL, FEWER)]
    torch.save(results, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


UNEQUAL = {"teacher_head": 1}
FEWER = {"student_hidden": 1, "teacher_hidden": 1, "row_weight": 1}


def refused(rank: int, **shorter: int) -> str:
    """Return the sentence for a first rank that has fewer rows of some tensors."""
    inputs = {**plain(), "student_bias": None, "teacher_bias": None}
    for name, rows in shorter.items() if rank == 0 else ():
        inputs[name] = inputs[name][rows:]
    with pytest.raises(ValueError) as error:
        leaf_ext.vocab_parallel_dual_kl(**inputs)
    return str(error.value)


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return the results of each rank, by the number of parts; all cases run in one start."""
    # The children fork from a process that has imported all this and computed nothing yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["leaf_ext", "pytest"])
    results = {}
    for size in PARTS:
        directory = str(tmp_path_factory.mktemp(f"parts{size}"))
        ranks = [
            context.Process(target=run_rank, args=(rank, size, directory)) for rank in range(size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [0] * size
        results[size] = [torch.load(Path(directory) / f"{rank}.pt") for rank in range(size)]
    return results


@pytest.mark.parametrize("size", PARTS)
@pytest.mark.parametrize("case", CASES)
def test_a_head_in_parts_gives_the_loss_of_the_whole(
    on_ranks: dict[int, list[dict[str, Any]]], case: str, size: int
) -> None:
    inputs = CASES[case]()
    whole = measure(dict(inputs))
    parts = [result[case] for result in on_ranks[size]]
    # float64 differs by the order of sums; float32 by a few roundings of logits of up to 100.
    tolerance = {"rtol": 1e-12, "atol": 1e-13}
    if case == "single":
        tolerance = {"rtol": 2e-4, "atol": 2e-5}
    for name, expected in whole.items():
        if name in ("student_head", "student_bias") and expected is not None:
            merged = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(merged, expected, equal_nan=True, **tolerance)
            continue
        for part in parts:  # the same on all ranks, to the bit
            torch.testing.assert_close(part[name], parts[0][name], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(parts[0][name], expected, equal_nan=True, **tolerance)


def test_hard_cases_are_hard() -> None:
    hard_rows = measure(hard())
    assert hard_rows["kl"].isnan().tolist() == [row == 5 for row in range(N)]
    assert torch.isinf(measure(excluded())["loss"])
    assert measure(excluded())["student_head"].isfinite().all()
    assert measure(ties())["agreement"].tolist() != [0.0] * N


def test_parts_that_do_not_fit_together_are_refused_on_all_ranks(
    on_ranks: dict[int, list[dict[str, Any]]],
) -> None:
    for result in on_ranks[2]:
        unequal, fewer = result["errors"]
        assert unequal == (
            "vocab_parallel_dual_kl: teacher_head must be cut at the same tokens as student_head, "
            "got parts of (36, 37) rows for (37, 37)"
        )
        assert "student_hidden must be [N, H] with the same N on all ranks, got N = (6, 7)" in fewer


def test_it_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"group must be of an initialized torch\.distributed"):
        leaf_ext.vocab_parallel_dual_kl(**{**plain(), "student_bias": None, "teacher_bias": None})
