"""The ranks of a run, here threads of one process that talk through real gloo groups."""

from __future__ import annotations

import threading
import time
from itertools import chain
from typing import Any

import numpy as np
import pytest
from rank_threads import on_each

from leaf_distill import ranks
from leaf_distill.ranks import RankError, Ranks


@pytest.fixture(autouse=True)
def short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT_S", 0.05)


def test_every_piece_of_work_is_taken_once_and_a_slow_rank_takes_fewer() -> None:
    together = threading.Barrier(3)

    def run(joined: Ranks) -> list[int]:
        together.wait()
        taken = []
        for at in joined.share(40):
            taken.append(at)
            time.sleep(0.1 if joined.rank == 1 else 0.001)
        return taken

    taken = on_each(3, run)
    assert sorted(at for part in taken for at in part) == list(range(40))
    assert 0 < len(taken[1]) < 10
    assert taken[0] == sorted(taken[0])


def test_two_shares_after_one_another_are_counted_apart() -> None:
    def run(joined: Ranks) -> tuple[list[int], list[int]]:
        return list(joined.share(5)), list(joined.share(4))

    first, second = zip(*on_each(2, run), strict=True)
    assert sorted(chain(*first)) == list(range(5))
    assert sorted(chain(*second)) == list(range(4))


def test_the_progress_of_all_ranks_adds_up() -> None:
    def run(joined: Ranks) -> int:
        seen = sum(joined.done(3) for _ in joined.share(7))
        joined.exchange({})
        return seen + joined.done(0)

    assert on_each(2, run) == [21, 21]


@pytest.mark.parametrize("piece", [1, 20, 1 << 20])
def test_every_rank_gets_the_values_of_all(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PIECE", piece)
    values = {at: bytes([at]) * at for at in range(30)}

    def run(joined: Ranks) -> dict[int, bytes]:
        return joined.exchange({at: values[at] for at in range(joined.rank, 30, 4)})

    assert on_each(3, run) == [{at: values[at] for at in range(30) if at % 4 != 3}] * 3


def test_ranks_that_have_nothing_to_send_get_what_the_others_have() -> None:
    assert on_each(2, lambda one: one.exchange({0: b"x"} if one.rank else {})) == [{0: b"x"}] * 2


def test_the_first_rank_alone_makes_what_all_get() -> None:
    made = []

    def run(joined: Ranks) -> str:
        return joined.from_first(lambda: made.append(joined.rank) or "result")

    assert on_each(3, run) == ["result"] * 3
    assert made == [0]


def test_the_least_of_all_ranks_is_taken_element_by_element() -> None:
    given = np.asarray([[3, -5], [1, 7], [2, 0]])
    for found in on_each(3, lambda one: one.least(given[one.rank])):
        assert found.tolist() == [1, -5]


def test_ranks_with_other_work_are_told_apart() -> None:
    same = on_each(2, lambda one: one.agree("0f" * 32))
    assert same == [None, None]
    for error in on_each(2, lambda one: one.agree(f"{one.rank}f" * 32)):
        assert isinstance(error, RankError)
        assert "must have the same work" in str(error)


def test_a_rank_that_waits_ends_when_another_one_fails() -> None:
    def run(joined: Ranks) -> Any:
        if joined.rank == 1:
            time.sleep(0.3)
            raise RuntimeError("the disk is full")
        return joined.exchange({})

    start = time.monotonic()
    waiting, failed, other = on_each(3, run)
    assert time.monotonic() - start < 10
    assert str(failed) == "the disk is full"
    for error in (waiting, other):
        assert isinstance(error, RankError)
        assert "another process of this run has failed" in str(error)


def test_only_the_first_to_fail_has_something_to_say() -> None:
    assert sorted(on_each(3, lambda one: one.fail())) == [False, False, True]


def test_a_rank_without_a_sign_of_life_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LOST_S", 0.5)

    def run(joined: Any) -> Any:
        if joined.rank == 1:
            joined.close()  # its heart stops, as with its machine
            return None
        return joined.exchange({})

    error, _ = on_each(2, run)
    assert isinstance(error, RankError)
    assert "process 1 of 2 has given no sign of life" in str(error)


def test_a_rank_that_computes_for_long_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LOST_S", 0.5)

    def run(joined: Ranks) -> dict[int, bytes]:
        if joined.rank == 1:
            time.sleep(1.5)
        return joined.exchange({joined.rank: b"x"})

    assert on_each(2, run) == [{0: b"x", 1: b"x"}] * 2


def test_the_first_rank_does_not_wait_for_one_that_fails_as_it_leaves() -> None:
    def run(joined: Any) -> None:
        if joined.rank == 0:
            joined.leave()
            return
        joined._meet()  # as the others, but it fails before it has left
        joined.fail()
        time.sleep(0.5)
        joined._add("gone", 1)

    error, _ = on_each(2, run)
    assert isinstance(error, RankError)
    assert "another process of this run has failed" in str(error)


def test_a_process_alone_does_all_and_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_join", lambda: pytest.fail("it joined"))
    inside = ranks.together(ranks.current)()
    assert (inside.rank, inside.size) == (0, 1)
    assert list(inside.share(3)) == [0, 1, 2]
    assert inside.exchange({1: b"x"}) == {1: b"x"}
    assert inside.from_first(lambda: 7) == 7
    assert ranks.is_first() and ranks.reports()


def test_the_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert ranks.cores() == 12
    for name in ranks.LAUNCHED:
        monkeypatch.setenv(name, "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks.cores() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert ranks.cores() == 1


def test_processes_that_cannot_meet_end_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "MEETING", ranks.timedelta(seconds=1))
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in address.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=r"cannot reach each other at 127\.0\.0\.1:9"):
        ranks.together(ranks.current)()
