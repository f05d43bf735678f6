"""Charts: their axes."""

from __future__ import annotations

import re

import pytest

from leaf_distill.evaluation.charts import curve_chart, interval_chart
from leaf_distill.evaluation.sheets import Estimate


def numbers_of(chart: str, anchor: str) -> list[float]:
    texts = re.findall(rf'<text [^>]*text-anchor="{anchor}"[^>]*>([^<]*)<', chart)
    return [float(text) for text in texts if re.fullmatch(r"[-\d.]+", text)]


@pytest.mark.parametrize(
    ("highest", "ticks"),
    [
        (0.0, [0, 2, 4, 6, 8, 10]),
        (0.13, [0, 5, 10, 15]),
        (0.41, [0, 10, 20, 30, 40, 50]),
        (0.6, [0, 20, 40, 60]),
        (0.93, [0, 20, 40, 60, 80, 100]),
        (1.0, [0, 20, 40, 60, 80, 100]),
    ],
)
def test_ticks_are_round_and_the_axis_ends_at_one(highest: float, ticks: list[float]) -> None:
    estimate = Estimate(highest / 2, 0.0, highest)
    chart = interval_chart("shares", ["a"], {"one": [estimate]}, "%")
    assert numbers_of(chart, "middle") == ticks


def test_an_axis_may_begin_above_nothing() -> None:
    curve = [(1.0, Estimate(0.6, 0.55, 0.72)), (2.0, Estimate(0.7, 0.6, 0.81))]
    chart = curve_chart("curve", {"one": curve}, "x", "AUC", scale=1, floor=0.5)
    assert numbers_of(chart, "end") == [0.5, 0.6, 0.7, 0.8, 0.9]
