"""A sweep of an arm whose answers came from servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from detect_run import run
from small_server import SmallServer, serving

from leaf_distill.detection.cells import Cell
from leaf_distill.detection.sweep import sweep_arm
from leaf_distill.detection.swept_arm import read_settings


@pytest.fixture(scope="module")
def servers(pair: dict[str, str]) -> Iterator[dict[str, SmallServer]]:
    with serving(pair["student"]) as student, serving(pair["teacher"]) as teacher:
        yield {"student": student, "teacher": teacher}


def test_the_answers_of_servers_are_known_and_no_server_is_asked(
    pair: dict[str, str], servers: dict[str, SmallServer], tmp_path: Path
) -> None:
    urls = {f"{role}_server_url": one.url for role, one in servers.items()}
    arm = run(pair, tmp_path, **urls).arm
    for one in servers.values():
        one.bodies.clear()
    grid = {"score": ["gap"], "rule": ["absolute"], "strategy": ["span"]}
    swept = sweep_arm(arm, read_settings(arm), [0.15], {**grid, "widen": ["word", "sentence"]})
    cells: dict[str, Cell] = {one.setting.widen: one for one in swept.cells}
    own, wider = cells["word"], cells["sentence"]
    assert own.current and own.complete and own.kept > 0
    assert wider.known < wider.usable
    assert not any(one.bodies for one in servers.values())
