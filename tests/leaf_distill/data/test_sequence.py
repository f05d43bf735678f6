"""The whole sequence as texts: every character of the rendering, and what each part is."""

from __future__ import annotations

from typing import Any

import pytest

from leaf_distill.data.example import Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.sequence import label_texts, sequence

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "Tom has 7."}
REPLY = {"role": "assistant", "content": "Good."}
LAST = {"role": "user", "content": "user How many?"}
TALK = (SYSTEM, FIRST, REPLY, LAST)


def parts(renderer: Renderer, messages: Any, **fields: Any) -> list[tuple[str, str]]:
    return [tuple(part) for part in sequence(renderer, Example(0, messages, "It is 7.", **fields))]


def of(found: list[tuple[str, str]], kind: str) -> list[str]:
    return [text for one, text in found if one == kind]


@pytest.mark.parametrize("chat", ["chatml", "llama3", "llama2", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_the_parts_are_the_rendering_and_are_told_apart(
    make_tokenizer: Any, kind: str, chat: str
) -> None:
    renderer = Renderer(make_tokenizer(kind, chat))
    talk = TALK[1:] if chat == "llama2" else TALK  # whose template takes no system message
    example = Example(0, talk, "It is 7.")
    found = parts(renderer, talk)
    assert of(found, "text") == [LAST["content"]]
    (completion,) = of(found, "completion")
    assert completion.startswith("It is 7.") and len(completion) > len("It is 7.")
    prompt = "".join(text for name, text in found if name != "completion")
    assert prompt.endswith(renderer.text(example))
    start = prompt.removesuffix(renderer.text(example))
    special = renderer.tokenizer.all_special_tokens
    assert start == "" or (chat == "plain" and start in special)
    others = of(found, "message")
    assert others == [one["content"] for one in talk[:-1]]
    assert not any(text in "".join(of(found, "template")) for text in others)


def test_all_analyzed_turns_are_text(make_tokenizer: Any) -> None:
    found = parts(Renderer(make_tokenizer("bytes", "chatml")), TALK, turns=(1, 3))
    assert of(found, "text") == [FIRST["content"], LAST["content"]]
    assert of(found, "message") == [SYSTEM["content"], REPLY["content"]]


def test_of_a_response_its_beginning_is_the_text(make_tokenizer: Any) -> None:
    found = parts(Renderer(make_tokenizer("bytes", "chatml")), TALK, segment=1, prefix="Well. ")
    assert of(found, "text") == ["Well. "]
    assert of(found, "message") == [one["content"] for one in TALK]
    assert [name for name, _ in found[-2:]] == ["text", "completion"]


def test_messages_that_a_template_moves_count_as_its_own(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer("bytes", "chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'system' %}{{ m.content | upper }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}[assistant]"
    )
    found = parts(Renderer(tokenizer), (SYSTEM, LAST))
    assert of(found, "template")[0] == "[system]BE BRIEF.[user]"
    assert of(found, "text") == [LAST["content"]]


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "metaspace", "words"])
@pytest.mark.parametrize("text", ["It is 7.", "two  words\n and 3 ", "é 😀 you"])
def test_each_label_has_its_characters(make_tokenizer: Any, kind: str, text: str) -> None:
    renderer = Renderer(make_tokenizer(kind, "chatml"))
    example = Example(0, (LAST,), text)
    written, ranges = label_texts(renderer, example)
    rendering = renderer.render(example)
    assert len(ranges) == int(rendering.loss_mask.sum())
    end = renderer.tokenizer.convert_ids_to_tokens(int(rendering.input_ids[-1]))
    assert written == text + end
    assert written[slice(*ranges[-1])] == end
    assert all(0 <= start <= stop <= len(written) for start, stop in ranges)
    assert ranges == sorted(ranges)
    # Nothing but white space at the end, which some tokenizers drop, is in no label.
    covered = {at for start, stop in ranges for at in range(start, stop)}
    assert not "".join(c for at, c in enumerate(text) if at not in covered).strip()
