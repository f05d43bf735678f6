"""With `train_on` "all" every assistant turn of an original is a label, as if it were the last."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from leaf_distill.data.example import Example, UnusableRow
from leaf_distill.data.prompt import Renderer

TALK = [
    {"role": "user", "content": "Tom has 7 apples"},
    {"role": "assistant", "content": "how many does Tom have now?"},
    {"role": "user", "content": "assistant 42."},
    {"role": "assistant", "content": "The answer is 42.\n  def f(x):"},
    {"role": "user", "content": "buys 12 more"},
]
CHATS = ("chatml", "llama3", "llama2", "dated", "plain")
KINDS = ("bytes", "trimmed", "nfc", "metaspace")


def row(length: int = 5, completion: str = "19", **fields: Any) -> Example:
    return Example(0, tuple(TALK[:length]), completion, **fields)


def labels(renderer: Renderer, example: Example) -> list[list[int]]:
    """The ids of each run of labels."""
    whole = renderer.render(example)
    starts = np.flatnonzero(np.diff(whole.loss_mask.astype(int), prepend=0) == 1)
    stops = np.flatnonzero(np.diff(whole.loss_mask.astype(int), append=0) == -1) + 1
    return [whole.input_ids[a:b].tolist() for a, b in zip(starts, stops, strict=True)]


@pytest.mark.parametrize("chat", ["chatml", "llama3"])
def test_every_turn_has_the_labels_of_a_last_one(make_tokenizer: Any, chat: str) -> None:
    tokenizer = make_tokenizer("bytes", chat)
    every, last = Renderer(tokenizer, train_on="all"), Renderer(tokenizer)
    turns = [labels(last, row(n, TALK[n]["content"])) for n in (1, 3)] + [labels(last, row())]
    assert labels(every, row()) == [label for (label,) in turns]
    assert all(label[-1] in every.end_ids for label in labels(every, row()))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_labels_spell_the_turns_and_nothing_else(
    make_tokenizer: Any, kind: str, chat: str
) -> None:
    renderer = Renderer(make_tokenizer(kind, chat), train_on="all")
    whole, plain = renderer.render(row()), renderer.prompt(row())
    assert whole.input_ids[: len(plain)].tolist() == plain.input_ids.tolist()
    assert not plain.loss_mask.any()
    # Where the template writes a space before the end, the space is no label.
    runs = labels(renderer, row())
    ends = [sum(index in renderer.end_ids for index in ids) for ids in runs]
    texts = [
        renderer.tokenizer.decode(ids[: len(ids) - n]) for ids, n in zip(runs, ends, strict=True)
    ]
    assert [text.strip() for text in texts if text] == [
        TALK[1]["content"],
        TALK[3]["content"],
        "19",
    ]
    assert sum(ends) == (1 if chat in ("dated", "plain") else 3)


def test_a_counterfactual_has_its_completion_alone(make_tokenizer: Any) -> None:
    renderer = Renderer(make_tokenizer("bytes", "chatml"), train_on="all")
    assert len(labels(renderer, row(candidate_id=0))) == 1
    assert len(labels(renderer, row())) == 3


def test_a_template_that_drops_earlier_thoughts_refuses_the_row(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "message.content.split('</think>')[-1]"
    )
    thought = [TALK[0], {"role": "assistant", "content": "<think>7</think>19"}, TALK[2]]
    example = Example(0, tuple(thought), "19")
    assert len(labels(Renderer(tokenizer), example)) == 1
    with pytest.raises(UnusableRow, match="changes an earlier assistant turn") as refused:
        Renderer(tokenizer, train_on="all").render(example)
    assert refused.value.reason == "not_renderable"
