"""Words for numbers."""

from __future__ import annotations

from leaf_distill.wording import counted


def test_one_has_the_singular_and_every_other_number_the_plural() -> None:
    assert counted(1, "row") == "1 row"
    assert [counted(number, "pass", "passes") for number in (0, 1, 2)] == [
        "0 passes",
        "1 pass",
        "2 passes",
    ]
