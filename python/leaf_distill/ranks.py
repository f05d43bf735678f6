"""The processes of one run under torchrun or `accelerate launch`, which share its work: its ranks.

Every rank reads the same rows and takes the same decisions. What is dear is shared out batch by
batch, and every rank then gets all values from the others, so that a cache of one's own on each
machine does as well as one for all. Only the first rank prints, locks and writes results.

Ranks talk through gloo on a group of their own: torch's default group, which may be a training's,
stays untouched. Without torchrun's variables there is one rank, and torch is not even imported.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

P = ParamSpec("P")
T = TypeVar("T")

LAUNCHED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PIECE: Final = 16 << 20  # bytes of values in one message
BEAT_S: Final = 5.0
LOST_S: Final = 120.0  # without a sign of life, of a process whose machine may be down
MEETING: Final = timedelta(minutes=10)  # of ranks that have all arrived: for data alone


class RankError(RuntimeError):
    """The run cannot go on because of another of its processes; the message says what to do."""


class Ranks:
    """The ranks of a run, as one of them sees it; this class is a run of a single process.

    Attributes:
        rank: the number of this process.
        size: the number of all.
    """

    rank = 0
    size = 1

    def agree(self, digest: str) -> None:
        """Check that all ranks have the same work before them.

        Raises:
            RankError: their digests of it differ.
        """

    def least(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the least of all ranks' values, element by element."""
        return values

    def share(self, count: int) -> Iterator[int]:
        """Yield those of `count` pieces of work, in order, that no other rank has taken."""
        return iter(range(count))

    def done(self, count: int) -> int:
        """Count rows of the newest `share` as done; return how many all ranks did meanwhile."""
        return count

    def exchange(self, mine: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return the values of all ranks by their number; a number is of one rank."""
        return dict(mine)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` gives on the first rank, which alone calls it."""
        return make()


class _Joined(Ranks):
    """One of several ranks.

    Counters in a store that all ranks reach say who has arrived where, which piece of work is next,
    whether a rank has failed, and that each one is alive. All ranks call the same methods in the
    same order, so that the number of calls names a counter.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        from torch.distributed import ProcessGroupGloo

        self.rank, self.size = rank, size
        self._store = store
        self._calls = self._shared = self._done = 0
        self._beats = [(0, time.monotonic())] * size
        self._checked = time.monotonic()
        self._closed = threading.Event()
        self._group: Any = ProcessGroupGloo(store, rank, size, timeout=MEETING)
        self._heart = threading.Thread(target=self._beat, daemon=True)
        self._heart.start()

    def agree(self, digest: str) -> None:
        number = int(digest[:15], 16)
        least, most = self.least(np.asarray([number, -number], dtype=np.int64))
        if least != -most:
            raise RankError(
                "the processes of this run must have the same work, got different rows, models, "
                "settings or versions on some of them: give all the same files, options and "
                "packages"
            )

    def least(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        import torch
        from torch.distributed import ReduceOp

        self._meet()
        tensor = torch.from_numpy(values.copy())
        self._group.allreduce(tensor, ReduceOp.MIN).wait()
        return tensor.numpy()

    def share(self, count: int) -> Iterator[int]:
        self._calls += 1
        self._shared, self._done = self._calls, 0
        name = f"next/{self._calls}"

        def taken() -> Iterator[int]:
            while (at := self._add(name, 1) - 1) < count:
                self._check()
                yield at

        return taken()

    def done(self, count: int) -> int:
        before, self._done = self._done, self._add(f"done/{self._shared}", count)
        return self._done - before

    def exchange(self, mine: Mapping[int, bytes]) -> dict[int, bytes]:
        self._meet()
        found = dict(mine)
        for source in range(self.size):
            pieces = _pieces(mine) if source == self.rank else None
            while piece := self._broadcast(next(pieces) if pieces else None, source):
                found.update(piece)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        made = None if self.rank else make()
        self._meet()
        result: T = self._broadcast(made, 0)
        return result

    def leave(self) -> None:
        """Wait until all have come to the end; the first, which may hold the store, leaves last."""
        self._meet()
        gone = self._add("gone", 1)
        while self.rank == 0 and gone < self.size:
            self._check()
            time.sleep(0.02)
            gone = self._add("gone", 0)

    def fail(self) -> bool:
        """Tell the others that this rank fails; return whether it is the first that does."""
        with suppress(RankError):
            return self._add("failed", 1) == 1
        return True

    def close(self) -> None:
        self._closed.set()
        self._heart.join(BEAT_S)  # a thread inside of torch at the end of Python is an abort
        self._group = None

    def _meet(self) -> None:
        """Wait until all ranks are here, however long the slowest computes.

        Raises:
            RankError: one has failed, or its machine is down.
        """
        self._calls += 1
        name, pause = f"met/{self._calls}", 0.001
        met = self._add(name, 1)
        while met < self.size:
            self._check()
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            met = self._add(name, 0)

    def _check(self) -> None:
        if self._add("failed", 0):
            raise RankError("another process of this run has failed, and has said why")
        now = time.monotonic()
        if now - self._checked < BEAT_S:
            return
        self._checked = now
        for rank, (beats, since) in enumerate(self._beats):
            if (newest := self._add(f"beat/{rank}", 0)) != beats:
                self._beats[rank] = (newest, now)
            elif now - since > LOST_S:
                raise RankError(
                    f"process {rank} of {self.size} has given no sign of life for {LOST_S:.0f} s: "
                    "see whether its machine is up, and run the same command again; what was done "
                    "is kept"
                )

    def _beat(self) -> None:
        with suppress(RankError):
            while not self._closed.wait(BEAT_S):
                self._add(f"beat/{self.rank}", 1)

    def _add(self, name: str, count: int) -> int:
        try:
            return int(self._store.add(name, count))
        except RuntimeError as error:  # the process that holds the store is no more
            raise RankError(
                "the first process of this run has ended: run the same command again; what was "
                "done is kept"
            ) from error

    def _broadcast(self, value: Any, source: int) -> Any:
        import torch

        data = pickle.dumps(value) if source == self.rank else b""
        size = torch.tensor([len(data)])
        self._group.broadcast(size, source).wait()
        if source == self.rank:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        else:
            content = torch.empty(int(size), dtype=torch.uint8)
        self._group.broadcast(content, source).wait()
        return value if source == self.rank else pickle.loads(content.numpy().tobytes())


def _pieces(values: Mapping[int, bytes]) -> Iterator[dict[int, bytes]]:
    """Yield parts of about PIECE bytes, and an empty one as the end."""
    part: dict[int, bytes] = {}
    size = 0
    for at, value in values.items():
        part[at] = value
        size += len(value)
        if size >= PIECE:
            yield part
            part, size = {}, 0
    if part:
        yield part
    yield {}


_ALONE: Final = Ranks()
_current: Ranks = _ALONE
_runs = 0
_reports = True


def current() -> Ranks:
    """Return the ranks of the run of `together` that this process is in, else those of one."""
    return _current


def is_first() -> bool:
    """Return whether this process is the first, or the only one, of those that were launched."""
    return os.environ.get("RANK", "0") == "0" or not _launched()


def reports() -> bool:
    """Return whether an error is this process's to print: no other of its run failed before."""
    return _reports


def cores() -> int:
    """Return the cores of this machine for each of the processes that were launched on it."""
    return max(1, (os.cpu_count() or 1) // processes())


def processes() -> int:
    """Return how many of the processes that were launched run on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) if _launched() else 1


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Let the processes that torchrun has launched do the work of a function together.

    Every process calls it with equal arguments, and `current` gives the ranks inside. It ends on
    all of them when it has ended on the last, and with an error as soon as one fails.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _launched() or current() is not _ALONE:
            return function(*args, **kwargs)
        with _joined() as ranks:
            result = function(*args, **kwargs)
            ranks.leave()
            return result

    return run


@contextmanager
def _joined() -> Iterator[_Joined]:
    global _current, _reports
    logger = logging.getLogger("leaf_distill")
    level = logger.level
    ranks = _join()
    _current, _reports = ranks, True
    if ranks.rank:
        logger.setLevel(logging.ERROR)  # every rank would say the same
    try:
        yield ranks
    except BaseException:
        _reports = ranks.fail()
        raise
    finally:
        ranks.close()
        _current = _ALONE
        logger.setLevel(level)


def _launched() -> bool:
    """Return whether a launcher has started several processes."""
    named = all(os.environ.get(name) for name in LAUNCHED)
    return named and int(os.environ["WORLD_SIZE"]) > 1


def _join() -> _Joined:
    global _runs
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    _runs += 1  # counters of an earlier run of this process stay in the store
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
        return _Joined(PrefixStore(f"leaf/{_runs}", store), rank, size)
    except RuntimeError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise RankError(
            f"the processes of this run cannot reach each other at {address} ({reason}): see that "
            "the machines can, and start as many processes as WORLD_SIZE says"
        ) from error
