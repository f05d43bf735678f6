"""Rows become batches whole and in order, and every step has its share of both branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch
from distill_pair import TEMPLATE, WORDS, make_rows, make_tokenizer

from leaf_distill.data.collator import Collator, ExampleDataset, prepare_examples
from leaf_distill.data.dataset import Message
from leaf_distill.data.prompt import Renderer, Rendering
from leaf_distill.training.sampler import FILLER, StepSampler


def renderer(template: str = TEMPLATE) -> Renderer:
    return Renderer(make_tokenizer(template))


def prepare(rows: list[dict[str, Any]], **options: Any) -> Any:
    return prepare_examples(rows, renderer(), renderer(), **{"max_length": 100, **options})


def test_a_position_predicts_the_label_that_follows_it() -> None:
    row = {"prompt": "w1 w2", "completion": "w3 w4"}
    (example,), rejections = prepare([row])
    words = [WORDS[i] for i in example.student_ids]
    assert words == ["<user>", "w1", "w2", "<assistant>", "w3", "w4", "<eos>"]
    assert example.student_predicts.tolist() == [False] * 3 + [True] * 3 + [False]
    assert not example.counterfactual and example.row_id == 0 and not rejections


def test_strings_and_messages_are_read_alike() -> None:
    (plain,), _ = prepare([{"prompt": "w1", "completion": "w2"}])
    messages = {
        "prompt": [{"role": "user", "content": "w1"}],
        "completion": [{"role": "assistant", "content": "w2"}],
        "branch": "counterfactual",
        "row_id": 7,
    }
    (chat,), _ = prepare([messages])
    assert chat.student_ids.tolist() == plain.student_ids.tolist()
    assert chat.counterfactual and chat.row_id == 7


def test_a_long_or_empty_row_is_left_out_whole_and_counted() -> None:
    rows = [
        {"prompt": "w1 w2", "completion": "w3"},  # 6 tokens
        {"prompt": "w1 w2 w3", "completion": "w3"},
        {"prompt": "w1", "completion": " "},
    ]
    examples, rejections = prepare(rows, max_length=6)
    assert [len(example.student_ids) for example in examples] == [6]
    assert [(r.row_id, r.stage, r.reason) for r in rejections] == [
        (1, "distill", "too_long"),
        (2, "distill", "empty_completion"),
    ]
    assert "7 tokens" in rejections[0].detail


def test_an_empty_prompt_or_no_question_is_left_out_and_counted() -> None:
    reply = {"role": "assistant", "content": "w1"}
    rows = [
        {"prompt": " ", "completion": "w2"},
        {"prompt": [reply], "completion": "w2", "candidate_id": 4},
        {"prompt": "w1", "completion": "w2"},
    ]
    examples, rejections = prepare(rows)
    assert [example.row_id for example in examples] == [2]
    assert [(r.row_id, r.candidate_id, r.reason) for r in rejections] == [
        (0, -1, "empty_prompt"),
        (1, 4, "no_user_turn"),
    ]


def test_a_row_that_a_template_refuses_is_left_out_and_counted() -> None:
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict = TEMPLATE.replace("%}<{{", f"%}}{refuse}<{{{{", 1)
    system = {"role": "system", "content": "w3"}
    user = {"role": "user", "content": "w1"}
    rows = [
        {"row_id": 4, "prompt": [system, user], "completion": "w2"},
        {"row_id": 5, "prompt": [user], "completion": "w2"},
    ]
    for templates in ((strict, TEMPLATE), (TEMPLATE, strict), (strict, strict)):
        examples, (left,) = prepare_examples(rows, *map(renderer, templates), max_length=100)
        assert [example.row_id for example in examples] == [5]
        assert (left.row_id, left.stage, left.reason) == (4, "distill", "not_renderable")
        assert "no system role" in left.detail


class _Counting(Renderer):
    count = 0

    def render(self, messages: Sequence[Message], completion: str) -> Rendering:
        type(self).count += 1
        return super().render(messages, completion)


@pytest.mark.parametrize(("template", "count"), [(TEMPLATE, 5), ("w39 " + TEMPLATE, 10)])
def test_equal_renderers_render_once(
    monkeypatch: pytest.MonkeyPatch, template: str, count: int
) -> None:
    monkeypatch.setattr(_Counting, "count", 0)
    renderers = [_Counting(make_tokenizer(one)) for one in (TEMPLATE, template)]
    examples, _ = prepare_examples(make_rows(4, 1), *renderers, max_length=100)
    assert len(examples) == 5 and _Counting.count == count


def test_different_templates_may_frame_the_same_labels() -> None:
    longer = TEMPLATE.replace("<{{ m.role }}>", "w39 <{{ m.role }}>", 1)
    rows = [{"prompt": "w1", "completion": "w2 w3"}]
    longer = longer.replace("<assistant>", "w39 <assistant>")
    (example,), _ = prepare_examples(rows, renderer(), renderer(longer), max_length=100)
    assert len(example.teacher_ids) > len(example.student_ids)
    assert example.teacher_predicts.sum() == example.student_predicts.sum() == 3
    ids = example.teacher_ids[1:][example.teacher_predicts[:-1]]
    assert [WORDS[i] for i in ids] == ["w2", "w3", "<eos>"]


def test_different_labels_are_refused_with_the_row() -> None:
    other = TEMPLATE.replace("<eos>", "<unk>")
    rows = [{"row_id": 5, "prompt": "w1", "completion": "w2"}]
    with pytest.raises(ValueError, match=r"row 0 \(row_id 5\).*different label tokens"):
        prepare_examples(rows, renderer(), renderer(other), max_length=100)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "row 0: needs the column 'prompt'"),
        ({"branch": "both"}, "row 0: branch: needs one of original, counterfactual, came 'both'"),
        ({"completion": [{"role": "user", "content": "w"}]}, "row 0: completion must be text or"),
        ({"completion": []}, "row 0: completion must be text or one assistant message"),
        ({"completion": [{"content": "w"}]}, "row 0: completion holds a message without a text"),
        ({"prompt": [{"content": "w1"}]}, "row 0: prompt holds a message without a text role"),
        ({"prompt": [{"role": "user", "content": None}]}, "row 0: prompt holds a message without"),
        ({"prompt": ["w1"]}, "row 0: prompt holds a message without"),
        ({"prompt": 5}, "row 0: prompt is int, not text or messages"),
        ({"prompt": "w1 \ud800"}, "row 0: text is not valid Unicode"),
        ({"row_id": "first"}, "row 0: row_id: needs an integer, came 'first'"),
        ({"candidate_id": 1.5}, "row 0: candidate_id: needs an integer, came 1.5"),
    ],
)
def test_a_malformed_row_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare([{"prompt": "w1", "completion": "w2", **change}])


def test_a_row_without_columns_is_named() -> None:
    rows: list[Any] = [{"prompt": "w1", "completion": "w2"}, ["w1", "w2"]]
    with pytest.raises(ValueError, match="row 1: needs columns by name"):
        prepare(rows)


def test_batches_are_padded_right_and_keep_the_labels_in_order() -> None:
    examples, _ = prepare(make_rows(5, 2))
    batch = Collator(student_pad=0, teacher_pad=0)(examples)
    length = max(len(example.student_ids) for example in examples)
    assert batch["input_ids"].shape == batch["teacher_predicts"].shape == (7, length)
    for i, example in enumerate(examples):
        n = len(example.student_ids)
        assert batch["input_ids"][i, :n].tolist() == example.student_ids.tolist()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (length - n)
        assert batch["predicts"][i, :n].tolist() == example.student_predicts.tolist()
        assert not batch["predicts"][i, n:].any()
    assert batch["counterfactual"].tolist() == [False] * 5 + [True] * 2
    assert torch.equal(batch["predicts"], batch["teacher_predicts"])


def test_the_filler_has_no_labels() -> None:
    examples, _ = prepare(make_rows(3, 1))
    dataset = ExampleDataset(examples)
    assert dataset[FILLER].n_labels == 0
    assert all(dataset[i].n_labels > 0 for i in range(len(dataset)))


# ---- the sampler ----

ORIGINALS, COUNTERFACTUALS = range(0, 50), range(100, 117)
SPLITS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]


def steps(
    batch_size: int, accumulation: int, world_size: int, epoch: int = 0, **options: Any
) -> list[list[int]]:
    """The rows of each optimizer step of an epoch, over all ranks."""
    ranks = []
    for rank in range(world_size):
        sampler = StepSampler(
            ORIGINALS,
            COUNTERFACTUALS,
            batch_size=batch_size,
            accumulation=accumulation,
            world_size=world_size,
            rank=rank,
            **options,
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    assert len({len(batches) for batches in ranks}) == 1
    turns = [list(chain(*turn)) for turn in zip(*ranks, strict=True)]
    return [
        [i for turn in turns[start : start + accumulation] for i in turn if i != FILLER]
        for start in range(0, len(turns), accumulation)
    ]


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_comes_once_and_every_step_has_its_share(split: tuple[int, int, int]) -> None:
    epoch = steps(*split)
    assert Counter(chain(*epoch)) == Counter([*ORIGINALS, *COUNTERFACTUALS])
    assert [sum(i < 100 for i in step) for step in epoch] == [8] * 6 + [2]
    shares = [sum(i >= 100 for i in step) for step in epoch[:-1]]
    assert set(shares) <= {2, 3}  # 17 for 50 originals: 2.72 for 8


@pytest.mark.parametrize("split", SPLITS[1:])
def test_a_steps_rows_do_not_depend_on_how_it_is_divided(split: tuple[int, int, int]) -> None:
    assert [sorted(s) for s in steps(*split)] == [sorted(s) for s in steps(*SPLITS[0])]


def test_the_order_follows_seed_and_epoch() -> None:
    first = steps(8, 1, 1)
    assert steps(8, 1, 1) == first
    assert steps(8, 1, 1, epoch=1) != first
    assert steps(8, 1, 1, seed=1) != first
    assert steps(8, 1, 1, shuffle=False)[0][:8] == list(range(8))


def test_a_rank_that_runs_dry_gets_a_filler() -> None:
    sampler = StepSampler(range(5), batch_size=2, world_size=2, rank=1)
    assert list(sampler)[-1] == [FILLER]


def test_drop_last_leaves_out_the_partial_step() -> None:
    epoch = steps(4, 2, 1, drop_last=True)
    assert [sum(i < 100 for i in step) for step in epoch] == [8] * 6
    with pytest.raises(ValueError, match="at least 8"):
        StepSampler(range(7), batch_size=4, accumulation=2, drop_last=True)
    with pytest.raises(ValueError, match="at least one original"):
        StepSampler([], range(3), batch_size=4)
