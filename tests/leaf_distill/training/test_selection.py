"""Which label tokens of a row position-selective distillation chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_pair import assert_same, make_trainer, weights

from leaf_distill.training.selection import SELECTIONS, Selection
from leaf_ext import DualKLRows

SEQUENCE = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2])  # row 1 has no labels
ROW_ID = torch.tensor([4, 5, 6])


def rows(entropy: list[float], kl: list[float]) -> DualKLRows:
    zeros = torch.zeros(len(kl))
    names = dict.fromkeys(DualKLRows._fields, zeros)
    return DualKLRows(**{**names, "student_entropy": torch.tensor(entropy), "kl": torch.tensor(kl)})


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        ("all", [1, 1, 1, 1, 1, 1, 1, 1]),
        ("entropy", [0, 1, 0, 1, 1, 0, 1, 1]),  # ceil(0.6 * 5) = 3 and ceil(0.6 * 3) = 2
        ("tip", [0, 1, 1, 0, 1, 1, 0, 1]),  # the two of lowest entropy are 0 and 2; row 2: 5
    ],
)
def test_each_row_has_its_share(rule: str, chosen: list[int]) -> None:
    measured = rows([0.1, 0.9, 0.2, 0.5, 0.7, 0.1, 0.2, 0.3], [1.0, 9, 2, 9, 9, 0, 9, 9])
    found = Selection(rule, 0.6).choose(SEQUENCE, ROW_ID, measured)
    assert found.int().tolist() == chosen


@pytest.mark.parametrize("rule", ["entropy", "tip"])
def test_ties_go_by_position(rule: str) -> None:
    found = Selection(rule, 0.5).choose(SEQUENCE, ROW_ID, rows([1.0] * 8, [2.0] * 8))
    # By entropy, two of the three of row 0; the low half of its tokens begins at the fourth.
    wanted = {"entropy": [1, 1, 1, 0, 0, 1, 1, 0], "tip": [1, 1, 0, 1, 0, 1, 0, 1]}
    assert found.int().tolist() == wanted[rule]


@pytest.mark.parametrize("rule", SELECTIONS)
def test_a_share_of_1_is_all_and_a_share_is_not_rounded_up(rule: str) -> None:
    measured = rows([*torch.rand(8).tolist()], [*torch.rand(8).tolist()])
    given = measured if Selection(rule).measures else None
    assert Selection(rule, 1.0).choose(SEQUENCE, ROW_ID, given).all()
    counts = Selection(rule, 0.07).count(torch.tensor([0, 1, 99, 100, 101])).tolist()
    assert counts == ([0, 1, 99, 100, 101] if rule == "all" else [0, 1, 7, 7, 8])


def test_a_random_choice_changes_with_the_step_and_the_row() -> None:
    sequence = torch.arange(3).repeat_interleave(40)
    chosen = Selection("random", 0.5, (0, 1)).choose(sequence, ROW_ID, None).view(3, 40)
    assert chosen.sum(dim=1).tolist() == [20, 20, 20]
    assert not torch.equal(chosen[0], chosen[1])
    alone = Selection("random", 0.5, (0, 1)).choose(sequence[:40], ROW_ID[1:2], None)
    assert torch.equal(alone, chosen[1])  # whatever other rows are in the batch
    later = Selection("random", 0.5, (0, 2)).choose(sequence, ROW_ID, None).view(3, 40)
    assert not torch.equal(later, chosen)


def test_a_resumed_run_chooses_and_weighs_as_before(tmp_path: Path) -> None:
    settings = {"kd_weight": "0.9:0.1", "token_selection": "random", "max_steps": 4}
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, **settings, **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "other", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed.model), weights(whole.model))
