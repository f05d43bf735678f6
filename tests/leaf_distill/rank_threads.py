"""The ranks of a run as threads of one process, which talk through real gloo groups."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from leaf_distill import ranks


class _OfThread(ranks.Ranks):
    """The ranks of a run as the calling thread sees them: those that it joined, else one alone."""

    def __init__(self) -> None:
        self.joined = threading.local()

    def __getattribute__(self, name: str) -> Any:
        joined = object.__getattribute__(self, "joined")
        return joined if name == "joined" else getattr(getattr(joined, "one", ranks._ALONE), name)


def on_each(
    size: int, run: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch | None = None
) -> list[Any]:
    """Return what `run` gives on each of the ranks; an error of `run` is its result.

    With `monkeypatch`, `ranks.current` gives the thread's rank until the test's end.
    """
    store, here = HashStore(), _OfThread()
    if monkeypatch is not None:
        monkeypatch.setattr(ranks, "_current", here)

    def start(rank: int) -> Any:
        here.joined.one = joined = ranks._Joined(store, rank, size)
        try:
            return run(joined)
        except RuntimeError as error:
            joined.fail()
            return error
        finally:
            joined.close()

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(start, range(size)))
