"""Random cases of `vocab_parallel_dual_kl`, on ranks that live as long as the fuzzer."""

from __future__ import annotations

import multiprocessing
import random
import tempfile
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import test_vocab_parallel
import torch
from torch import Tensor, distributed

MOST = 4
# A rank waits so long for the others: one of them may have raised.
_PATIENCE = timedelta(seconds=60)
# In float64 the order of the sums differs, and nothing else.
_TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@dataclass(frozen=True)
class PartsCase:
    """Heads that are cut at tokens `cuts`; the last part may have padding of either model."""

    name: str
    rows: int
    vocabulary: int
    cuts: tuple[int, ...]
    widths: tuple[int, int]
    std: float
    bias: bool
    padding: tuple[int, int]
    frozen: tuple[str, ...]
    options: dict[str, Any]

    def inputs(self) -> dict[str, Any]:
        seed = torch.Generator("cpu").manual_seed(random.Random(self.name).getrandbits(32))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=seed, device="cpu")

        made: dict[str, Any] = {}
        for side, width in zip(("student", "teacher"), self.widths, strict=True):
            made[f"{side}_hidden"] = normal(self.rows, width)
            made[f"{side}_head"] = normal(self.vocabulary, width) * (self.std / width**0.5)
            made[f"{side}_bias"] = normal(self.vocabulary) if self.bias else None
        made["row_weight"] = normal(self.rows).clamp(min=0)
        made |= {"student_padding": self.padding[0], "teacher_padding": self.padding[1]}
        return {**made, "frozen": self.frozen, **self.options}

    @property
    def parts(self) -> list[slice]:
        edges = [0, *self.cuts, self.vocabulary]
        return [slice(*pair) for pair in pairwise(edges)]


def serve(rank: int, directory: str, pipe: Connection) -> None:
    """Compute this rank's part of each case that comes."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{directory}/store", MOST)
    distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=MOST, timeout=_PATIENCE
    )
    groups = [distributed.new_group(range(size)) for size in range(1, MOST + 1)]
    while True:
        inputs, parts = pipe.recv()
        try:
            found: object = test_vocab_parallel.measure(
                {**inputs, "group": groups[len(parts) - 1]}, parts[rank]
            )
        except Exception as error:
            found = error
        pipe.send(found)


@dataclass
class Ranks:
    """Processes, started with the first case; each of a case's parts goes to one."""

    pipes: list[Connection] = field(default_factory=list)

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        directory = tempfile.mkdtemp()
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            context.Process(target=serve, args=(rank, directory, theirs), daemon=True).start()
            self.pipes.append(ours)

    def measured(self, case: PartsCase) -> list[dict[str, Tensor]]:
        """Return each rank's loss, rows and gradients."""
        if not self.pipes:
            self.start()
        pipes = self.pipes[: len(case.parts)]
        try:
            for pipe in pipes:
                pipe.send((case.inputs(), case.parts))
            found = [pipe.recv() for pipe in pipes]
        except (EOFError, OSError):  # a rank has died
            self.pipes.clear()
            raise
        for one in found:
            if isinstance(one, Exception):
                self.pipes.clear()  # the others may wait for this rank: the next case gets new ones
                raise one
        return found


RANKS = Ranks()


def check_parts(case: PartsCase) -> None:
    """Compare all parts' results with those of the whole head, by the reference."""
    whole = test_vocab_parallel.measure(case.inputs())
    parts = RANKS.measured(case)
    for name, expected in whole.items():
        if expected is None:
            continue
        if name in ("student_head", "student_bias"):
            merged = torch.cat([part[name] for part in parts])
            torch.testing.assert_close(merged, expected, equal_nan=True, **_TOLERANCE)
            continue
        for part in parts:
            torch.testing.assert_close(part[name], expected, equal_nan=True, **_TOLERANCE)
