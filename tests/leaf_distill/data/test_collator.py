"""Rows become batches whole and in order, and every step has its share of both branches."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from distill_pair import TEMPLATE, WORDS, make_rows, make_tokenizer, render
from hypothesis import given, settings
from hypothesis import strategies as st

from leaf_distill.data.collator import (
    FILLER,
    Batch,
    ExampleDataset,
    collate,
    count_reasons,
    plan_batches,
    render_examples,
    split_batch,
)
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, Rendering, remaining
from leaf_distill.data.prompt import Renderer
from leaf_distill.training.sampler import StepSampler


def left(examples: list[Example]) -> list[tuple[int, str, str]]:
    """Row, reason and detail of the examples that left."""
    return [(e.row_id, e.outcome.reason, e.outcome.detail) for e in examples if e.outcome]


def test_a_position_predicts_the_label_that_follows_it() -> None:
    (example,) = render([{"prompt": "w1 w2", "completion": "w3 w4"}])
    batch = collate([example])
    words = [WORDS[i] for i in batch["input_ids"][0].tolist()]
    assert words == ["<user>", "w1", "w2", "<assistant>", "w3", "w4", "<eos>"]
    assert batch["loss_mask"].tolist() == [[False] * 3 + [True] * 3 + [False]]
    assert batch["counterfactual"].tolist() == [False] and batch["row_id"].tolist() == [0]


def test_a_long_or_empty_row_is_left_out_whole_and_counted() -> None:
    rows = [
        {"prompt": "w1 w2", "completion": "w3"},  # 6 tokens
        {"prompt": "w1 w2 w3", "completion": "w3"},
        {"prompt": "w1", "completion": " "},
    ]
    examples = render(rows, max_length=6)
    assert [len(one.renderings["student"]) for one in remaining(examples)] == [6]
    assert [(row, reason) for row, reason, _ in left(examples)] == [
        (1, "too_long"),
        (2, "empty_completion"),
    ]
    assert left(examples)[0][2] == "must have at most 6 tokens, got 7"
    assert count_reasons(examples) == {"too_long": 1, "empty_completion": 1}


def test_a_row_that_a_template_refuses_is_left_out_and_counted() -> None:
    refuse = "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    strict = TEMPLATE.replace("%}<{{", f"%}}{refuse}<{{{{", 1)
    user = {"role": "user", "content": "w1"}
    rows = [
        {"prompt": [{"role": "system", "content": "w3"}, user], "completion": "w2"},
        {"prompt": [user], "completion": "w2"},
    ]
    examples = render(rows, strict)
    assert [one.row_id for one in remaining(examples)] == [1]
    ((row, reason, detail),) = left(examples)
    assert (row, reason) == (0, "not_renderable") and "no system role" in detail


class _Counting(Renderer):
    count = 0

    def render(self, example: Example) -> Rendering:
        type(self).count += 1
        return super().render(example)


@pytest.mark.parametrize(("template", "count"), [(TEMPLATE, 5), ("w39 " + TEMPLATE, 10)])
def test_equal_renderers_render_once(
    monkeypatch: pytest.MonkeyPatch, template: str, count: int
) -> None:
    monkeypatch.setattr(_Counting, "count", 0)
    renderers = {
        "student": _Counting(make_tokenizer(TEMPLATE)),
        "teacher": _Counting(make_tokenizer(template)),
    }
    examples = load_examples(make_rows(4, 1))
    rows = {"student": len(WORDS), "teacher": len(WORDS)}
    render_examples(examples, renderers, max_length=100, embedding_rows=rows)  # type: ignore[arg-type]
    assert len(list(remaining(examples))) == 5 and _Counting.count == count


def test_different_templates_may_frame_the_same_labels() -> None:
    longer = TEMPLATE.replace("<{{ m.role }}>", "w39 <{{ m.role }}>", 1)
    longer = longer.replace("<assistant>", "w39 <assistant>")
    batch = collate(render([{"prompt": "w1", "completion": "w2 w3"}], longer))
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]
    assert batch["teacher_loss_mask"].sum() == batch["loss_mask"].sum() == 3
    ids = batch["teacher_input_ids"][:, 1:][batch["teacher_loss_mask"][:, :-1]]
    assert [WORDS[i] for i in ids] == ["w2", "w3", "<eos>"]


def test_each_model_reads_its_own_prompt_of_a_crossed_row() -> None:
    rows = [
        {"prompt": "w1 w2 w3", "completion": "w4 w5", "branch": "original"},
        {
            **{"prompt": "w1 w2 w3", "completion": "w4 w5", "branch": "cross", "row_id": 0},
            "teacher_prompt": "w1 w3",
        },
    ]
    batch = collate(render(rows))
    for prefix, prompt in (("", "w1 w2 w3"), ("teacher_", "w1 w3")):
        length = int(batch[f"{prefix}attention_mask"][1].sum())
        ids, labels = batch[f"{prefix}input_ids"][1], batch[f"{prefix}loss_mask"][1]
        text = f"<user> {prompt} <assistant> w4 w5 <eos>"
        assert " ".join(WORDS[i] for i in ids[:length]) == text
        assert [WORDS[i] for i in ids[1:][labels[:-1]]] == ["w4", "w5", "<eos>"]
    assert batch["counterfactual"].tolist() == [False, True]
    dataset = ExampleDataset(render(rows))
    assert dataset.originals == [0] and dataset.counterfactuals == [1]


def test_a_context_stands_behind_both_prompts_without_a_label() -> None:
    row = {"prompt": "w1 w2", "completion": "w3 w4 w5", "branch": "counterfactual", "context": 2}
    crossed = {**row, "branch": "cross", "teacher_prompt": "w1"}
    batch = collate(render([row, crossed]))
    for prefix, prompts in (("", ["w1 w2", "w1 w2"]), ("teacher_", ["w1 w2", "w1"])):
        for at, prompt in enumerate(prompts):
            length = int(batch[f"{prefix}attention_mask"][at].sum())
            ids, labels = batch[f"{prefix}input_ids"][at], batch[f"{prefix}loss_mask"][at]
            text = f"<user> {prompt} <assistant> w3 w4 w5 <eos>"
            assert " ".join(WORDS[i] for i in ids[:length]) == text
            assert [WORDS[i] for i in ids[1:][labels[:-1]]] == ["w4", "w5", "<eos>"]


@pytest.mark.parametrize(("role", "longer"), [("student", "prompt"), ("teacher", "teacher_prompt")])
def test_the_longer_prompt_of_a_crossed_row_decides_its_length(role: str, longer: str) -> None:
    row = {"prompt": "w1", "teacher_prompt": "w1", "completion": "w4", "branch": "cross"}
    assert left(render([{**row, longer: "w1 w2 w3"}], max_length=6)) == [
        (0, "too_long", "must have at most 6 tokens, got 7")
    ]
    long = {**row, longer: "w1 w39"}
    rows = {"student": 99, "teacher": 99, role: 44}
    ((_, reason, detail),) = left(render([long], embedding_rows=rows))
    assert reason == "outside_vocabulary" and f"beyond the 44 embeddings of the {role}" in detail


def test_a_row_with_other_labels_leaves_with_the_tokens_name() -> None:
    teacher = make_tokenizer()
    teacher.add_tokens(["w77"])
    rows = [
        {"prompt": "w1", "completion": "w2 w77 w3"},
        {"prompt": "w1", "completion": "w2"},
    ]
    examples = load_examples(rows)
    renderers = {"student": Renderer(make_tokenizer()), "teacher": Renderer(teacher)}
    render_examples(
        examples,
        renderers,  # type: ignore[arg-type]
        max_length=100,
        embedding_rows={"student": 60, "teacher": 60},
    )
    assert [one.row_id for one in remaining(examples)] == [1]
    ((row, reason, detail),) = left(examples)
    assert (row, reason) == (0, "different_labels")
    assert "got 'w77' (id 45) for the teacher and '<unk>' (id 2) for the student" in detail


def test_a_row_outside_the_embedding_leaves_with_the_tokens_name() -> None:
    examples = render(
        [{"prompt": "w1", "completion": "w2"}, {"prompt": "w1", "completion": "w39"}],
        embedding_rows={"student": 44, "teacher": 48},
    )
    assert left(examples) == [
        (1, "outside_vocabulary", "token 'w39' (id 44) is beyond the 44 embeddings of the student")
    ]


def test_batches_are_padded_right_and_keep_the_labels_in_order() -> None:
    examples = render(make_rows(5, 2))
    batch = collate(examples)
    length = max(len(one.renderings["student"]) for one in examples)
    assert batch["input_ids"].shape == batch["teacher_loss_mask"].shape == (7, length)
    for i, example in enumerate(examples):
        rendering = example.renderings["student"]
        n = len(rendering)
        assert batch["input_ids"][i, :n].tolist() == rendering.input_ids.tolist()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (length - n)
        assert batch["loss_mask"][i, : n - 1].tolist() == rendering.loss_mask[1:].tolist()
        assert not batch["loss_mask"][i, n - 1 :].any()
    assert batch["counterfactual"].tolist() == [False] * 5 + [True] * 2
    assert torch.equal(batch["loss_mask"], batch["teacher_loss_mask"])


def test_the_filler_has_no_labels() -> None:
    dataset = ExampleDataset(render(make_rows(3, 1)))
    assert not collate([dataset[FILLER]])["loss_mask"].any()
    assert all(collate([dataset[i]])["loss_mask"].any() for i in range(len(dataset)))
    assert dataset.originals == [0, 1, 2] and dataset.counterfactuals == [3]
    assert dataset.label_tokens == int(collate(dataset.examples)["loss_mask"].sum())


# ---- forward passes ----


def labels_of(batch: Batch) -> list[tuple[int, list[int]]]:
    """Each row's id with its label tokens."""
    return [
        (row, ids[1:][mask[:-1]].tolist())
        for row, ids, mask in zip(
            batch["row_id"].tolist(), batch["input_ids"], batch["loss_mask"], strict=True
        )
    ]


@pytest.mark.parametrize("max_tokens", [1, 20, 40, 60, 10_000])
def test_a_batch_is_split_into_bounded_passes_and_nothing_is_lost(max_tokens: int) -> None:
    batch = collate(render(make_rows(8, 5), "w39 w39 " + TEMPLATE))
    parts = split_batch(batch, max_tokens)
    assert sorted(chain(*map(labels_of, parts))) == sorted(labels_of(batch))
    for part in parts:
        size = max(part["input_ids"].numel(), part["teacher_input_ids"].numel())
        assert size <= max_tokens or len(part["row_id"]) == 1
        for name in ("attention_mask", "teacher_attention_mask"):
            assert part[name][:, -1].any()  # no column of padding alone
    assert (len(parts) == 1) is (max_tokens == 10_000)


@pytest.mark.parametrize("packed", [False, True])
def test_padding_in_front_loses_no_label(packed: bool) -> None:
    batch = collate(render(make_rows(8, 5)))
    expected = sorted(labels_of(batch))
    for prefix in ("", "teacher_"):
        names = [f"{prefix}{name}" for name in ("input_ids", "attention_mask", "loss_mask")]
        lengths = batch[names[1]].sum(dim=1).tolist()
        for name in names:
            rows = [row.roll(len(row) - n) for row, n in zip(batch[name], lengths, strict=True)]
            batch[name] = torch.stack(rows)
    parts = split_batch(batch, 40, packed=packed)
    assert len(parts) > 1
    assert sorted(chain(*map(labels_of, parts))) == expected


@pytest.mark.parametrize("max_tokens", [1, 20, 40, 60, 10_000])
def test_packed_passes_are_filled_by_the_tokens_of_their_rows(max_tokens: int) -> None:
    batch = collate(render(make_rows(8, 5), "w39 w39 " + TEMPLATE))
    parts = split_batch(batch, max_tokens, packed=True)
    assert sorted(chain(*map(labels_of, parts))) == sorted(labels_of(batch))
    taken = [int(part["teacher_attention_mask"].sum()) for part in parts]  # the longer prompts
    for size, part in zip(taken, parts, strict=True):
        assert size <= max_tokens or len(part["row_id"]) == 1
    assert len(parts) <= len(split_batch(batch, max_tokens))
    first = [int(part["teacher_attention_mask"].sum(dim=1).max()) for part in parts[:-1]]
    for size, longest in zip(taken[1:], first, strict=True):
        assert size + longest > max_tokens  # full: the next row, the longest, did not fit


def test_passes_without_labels_are_added_for_ranks_in_step() -> None:
    batch = collate(render(make_rows(3, 1)))
    parts = split_batch(batch, 10_000, at_least=3)
    assert len(parts) == 3 and parts[-1] is batch
    assert not any(part["loss_mask"].any() for part in parts[:-1])


@settings(deadline=None)
@given(st.lists(st.integers(1, 50)), st.integers(1, 120))
def test_plan_holds_every_row_once_and_the_limit(lengths: list[int], limit: int) -> None:
    plan = plan_batches(lengths, max_tokens=limit)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    widths = [max(lengths[i] for i in batch) for batch in plan]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(plan, widths, strict=True):
        assert len(batch) == 1 or len(batch) * width <= limit
    for batch, width in list(zip(plan, widths, strict=True))[:-1]:
        assert (len(batch) + 1) * width > limit  # full
    assert plan == plan_batches(lengths, max_tokens=limit)
    with pytest.raises(ValueError, match="max_tokens: must be at least 1"):
        plan_batches([1], max_tokens=0)


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


FAILED = range(0, 7)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_every_step_has_its_share_of_failed_rows(share: float) -> None:
    drawn: Counter[int] = Counter()
    for number in range(12):
        epoch = steps(8, 1, 1, number, failed=FAILED, failed_share=share)
        assert [sum(i < 100 for i in step) for step in epoch] == [8] * 6 + [2]
        for step in epoch:
            originals = [i for i in step if i < 100]
            assert abs(sum(i in FAILED for i in originals) - share * len(originals)) < 1
        assert sorted(i for step in epoch for i in step if i >= 100) == list(COUNTERFACTUALS)
        drawn.update(i for step in epoch for i in step if i < 100)
    for kind in (FAILED, range(7, 50)):  # in turns: none comes twice more often than another
        times = [drawn[i] for i in kind]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize("split", SPLITS[1:])
def test_failed_rows_do_not_depend_on_how_a_step_is_divided(split: tuple[int, int, int]) -> None:
    options = {"failed": FAILED, "failed_share": 0.4}
    for epoch in (0, 3):
        whole = steps(*SPLITS[0], epoch, **options)
        assert [sorted(s) for s in steps(*split, epoch, **options)] == [sorted(s) for s in whole]


def test_failed_rows_follow_seed_and_epoch() -> None:
    options = {"failed": FAILED, "failed_share": 0.5, "drop_last": True}
    first = steps(8, 1, 1, **options)
    assert steps(8, 1, 1, **options) == first and len(first) == 6
    assert steps(8, 1, 1, epoch=1, **options) != first
    assert steps(8, 1, 1, seed=1, **options) != first


def test_where_the_student_fails_every_row_each_comes_once() -> None:
    epoch = steps(8, 1, 1, failed=ORIGINALS, failed_share=0.5)
    assert sorted(i for step in epoch for i in step if i < 100) == list(ORIGINALS)


def test_without_a_failed_row_none_can_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"^failed_share: must come with rows"):
        StepSampler(range(5), batch_size=1, failed_share=0.5)


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
