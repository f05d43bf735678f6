"""What all subjects of the benchmarks share: where they run, and what timing one of them needs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .clock import Clock, Prepare, Step


@dataclass(frozen=True)
class Setting:
    """Where it runs. `tiny` rehearses on a CPU, at sizes that are a thousandth and less."""

    clock: Clock
    tiny: bool

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def backend(self, name: str) -> str:
        return "cpu" if self.tiny and name == "cuda" else name

    def seed(self, case: object) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(zlib.crc32(str(case).encode()))

    def at_once(self, elements: int) -> int:
        """Rows of so many elements that are worked on together in float64."""
        return max(1, (2**12 if self.tiny else 2**25) // elements)


@dataclass(frozen=True)
class Timed:
    """`prepare` makes fresh arguments of `step` and is not timed.

    `check` compares one result with the truth: it returns how far off it is, and raises
    AssertionError where it is further off than it may be. `bytes` must move, whoever computes it.
    """

    step: Step
    prepare: Prepare
    check: Callable[[], dict[str, float]]
    bytes: int
    has_memory: bool = True


class Subject(Protocol):
    """The inputs of one case and the truth about them."""

    def timed(self, variant: str) -> Timed: ...


class NotAvailable(Exception):
    """Why a line of the table has no number, where nothing is wrong."""


def require_room(setting: Setting, needed: int) -> None:
    free = setting.clock.free_memory()
    if needed > free:
        raise NotAvailable(f"needs {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")


def errors(**found: float) -> dict[str, Any]:
    return {f"{name}_error": value for name, value in found.items()}
