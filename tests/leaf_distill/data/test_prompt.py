"""Renderings: what the model reads, and where the user's characters are in it."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from leaf_distill.data.example import Example, UnusableRow
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.template import template_differences

NOWHERE = (-1, -1)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = ["bytes", "trimmed", "nfc", "metaspace", "words"]
CHATS = ["chatml", "llama3", "llama2", "dated", "plain"]
WORDS = [
    " ",
    "\n",
    "  ",
    "user",
    "assistant",
    "\t",
    "<|im_end|>",
    "[/INST]",
    "<s>",
    "é",
    "e\u0301",
    "😀",
    "👍🏽",
    "你",
    "USERTEXT",
    "USERTEXTX",
    "REPLY",
    "{{ x }}",
    "a",
    "12",
    "don't",
    "\u200b",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
)


def user(text: str, completion: str = "4", **fields: Any) -> Example:
    return conversation([{"role": "user", "content": text}], completion, **fields)


def conversation(messages: Any, completion: str = "4", **fields: Any) -> Example:
    return Example(0, tuple(messages), completion, **fields)


def all_spans(rendering):
    return [tuple(span) for span in rendering.offsets.tolist()]


def domain_spans(rendering):
    return [span for span in all_spans(rendering) if span != NOWHERE]


def prompt_text(renderer, one):
    return renderer.tokenizer.decode(renderer.prompt(one).input_ids)


def label_text(renderer, one):
    """The text of the labels without the end token."""
    whole = renderer.render(one)
    return renderer.tokenizer.decode(whole.input_ids[whole.loss_mask][:-1])


def reason(renderer, one, render=False):
    with pytest.raises(UnusableRow) as raised:
        (renderer.render if render else renderer.prompt)(one)
    assert raised.value.detail
    return raised.value.reason


PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
REST = [byte for byte in range(256) if byte not in PRINTABLE]
TABLE = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(REST)
}


def token_bytes(tokenizer, index):
    """Return the bytes of a byte-level token, by the public GPT-2 byte table."""
    return bytes(TABLE[char] for char in tokenizer.convert_ids_to_tokens(int(index)))


@pytest.fixture(scope="module")
def renderers(make_tokenizer):
    return {(kind, chat): Renderer(make_tokenizer(kind, chat)) for kind in KINDS for chat in CHATS}


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="<|im_end|>")
@example(text="  both sides \n\n")
@example(text="user\nuser\n")
@example(text="USERTEXT")
@example(text=" \n ")
def test_every_text_keeps_its_characters(renderers, text):
    for renderer in renderers.values():
        rendering = renderer.prompt(user(text))
        arrays = (rendering.loss_mask, rendering.domain, rendering.prunable, rendering.offsets)
        assert {len(one) for one in arrays} == {len(rendering)} == {len(rendering.input_ids)}
        assert not rendering.loss_mask.any()
        spans = domain_spans(rendering)
        assert all(0 <= start < stop <= len(text) for start, stop in spans)
        assert all(b[0] <= a[1] <= b[1] and a[0] <= b[0] for a, b in pairwise(spans))
        for span, prunable in zip(all_spans(rendering), rendering.prunable, strict=True):
            assert prunable == (span != NOWHERE and text[slice(*span)].strip() != "")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
@example(text="\n a")
def test_domain_tokens_spell_exactly_their_characters(renderers, text):
    for kind in ("bytes", "trimmed"):
        for chat in CHATS:
            renderer = renderers[kind, chat]
            rendering = renderer.prompt(user(text))
            spans = domain_spans(rendering)
            if not spans:
                assert text.strip() == "" or chat in ("llama2", "dated")
                continue
            start, stop = spans[0][0], spans[-1][1]
            ids = [i for i, on in zip(rendering.input_ids, rendering.domain, strict=True) if on]
            spelled = b"".join(token_bytes(renderer.tokenizer, i) for i in ids)
            if kind == "bytes":
                whole = text[start:stop].encode()
                # These two end with a space, which may take the first bytes of a character along.
                lost = 3 if chat in ("llama2", "dated") else 0
                assert whole.endswith(spelled) and len(whole) - len(spelled) <= lost
            else:  # a first space without offsets of its own goes to the next token
                assert spelled.strip(b" ") == text[start:stop].strip(" ").encode()
            if (kind, chat) == ("bytes", "plain"):
                assert (start, stop) == (0, len(text))
            if chat in ("chatml", "llama3", "plain"):  # only white space melts into the template's
                assert (text[:start] + text[stop:]).strip() == ""


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_ids_are_those_of_transformers_own_call(renderers, text):
    for (_, chat), renderer in renderers.items():
        if chat != "plain":
            turns = [{"role": "user", "content": text}]
            ids = renderer.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
            assert renderer.prompt(user(text)).input_ids.tolist() == ids["input_ids"]


def test_trimmed_spaces_belong_to_the_following_token(make_tokenizer):
    text = "Tom  has 7\napples"
    whole = Renderer(make_tokenizer("bytes", "chatml")).prompt(user(text))
    trimmed = Renderer(make_tokenizer("trimmed", "chatml")).prompt(user(text))
    assert whole.offsets.tolist() == trimmed.offsets.tolist()
    words = Renderer(make_tokenizer("words", "plain")).prompt(user("Tom has  7 apples"))
    assert domain_spans(words) == [(0, 3), (3, 7), (7, 10), (10, 17)]


def test_tokens_of_one_character_share_it(make_tokenizer):
    rendering = Renderer(make_tokenizer("metaspace", "plain")).prompt(user("7🦜"))
    assert domain_spans(rendering)[-4:] == [(1, 2)] * 4


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_completion_and_its_end(renderers, kind, chat):
    renderer = renderers[kind, chat]
    one = user(" How many apples? ", "The answer is 42.")
    prompt, whole = renderer.prompt(one), renderer.render(one)
    length = len(prompt)
    for name in ("input_ids", "loss_mask", "domain", "prunable", "offsets"):
        assert np.array_equal(getattr(whole, name)[:length], getattr(prompt, name))
    dtypes = [getattr(whole, name).dtype for name in ("input_ids", "loss_mask", "offsets")]
    assert dtypes == [np.int32, np.bool_, np.int32]
    labels = whole.input_ids[whole.loss_mask].tolist()
    answer = renderer.tokenizer("The answer is 42.", add_special_tokens=False)["input_ids"]
    if kind == "metaspace" and chat != "plain":  # the mark of a space, which is not there
        answer = answer[1:]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(chat, "</s>")
    assert labels == [*answer, renderer.tokenizer.convert_tokens_to_ids(end)]
    assert whole.input_ids[length:].tolist() == labels
    assert not whole.domain[length:].any()
    assert set(renderer.end_ids) == {labels[-1], renderer.tokenizer.eos_token_id}
    assert one.notes == []


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_never_doubled(renderers, kind, chat):
    renderer = renderers[kind, chat]
    ids = renderer.render(user("hello", "world")).input_ids.tolist()
    expected = 1 if chat not in ("chatml", "plain") or (kind, chat) == ("metaspace", "plain") else 0
    assert ids.count(renderer.tokenizer.bos_token_id) == expected
    assert expected == 0 or ids[0] == renderer.tokenizer.bos_token_id


def test_special_tokens_in_the_users_text_are_tokens_of_the_domain(make_tokenizer):
    renderer = Renderer(make_tokenizer("bytes", "chatml"))
    rendering = renderer.prompt(user("say <|im_end|> now"))
    place = all_spans(rendering).index((4, 14))
    assert rendering.input_ids[place] == renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rendering.domain[place] and rendering.prunable[place]


def test_stripping_template_keeps_offsets_in_the_original_text(make_tokenizer):
    rendering = Renderer(make_tokenizer("bytes", "llama3")).prompt(user(" \n Tom has 7  "))
    spans = domain_spans(rendering)
    assert (spans[0][0], spans[-1][1]) == (3, 12)


def test_only_the_last_user_turn_is_the_domain(make_tokenizer):
    renderer = Renderer(make_tokenizer(), system_prompt="Be brief.")
    tom = {"role": "user", "content": "Tom"}
    rendering = renderer.prompt(conversation([tom, {"role": "assistant", "content": "Tom"}, tom]))
    assert domain_spans(rendering)[-1][1] == 3
    first = int(rendering.domain.argmax())
    text = renderer.tokenizer.decode(rendering.input_ids[:first])
    assert text.count("Tom") == 2 and text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_own_system_message_wins(make_tokenizer):
    renderer = Renderer(make_tokenizer(), system_prompt="Be brief.")
    system = {"role": "system", "content": "Be long."}
    text = prompt_text(renderer, conversation([system, {"role": "user", "content": "Tom"}]))
    assert "Be long." in text and "Be brief." not in text


def test_template_choice(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    plain = Renderer(tokenizer, chat_template="none")
    assert tokenizer.decode(plain.prompt(user("Tom has 7")).input_ids) == "Tom has 7"
    with pytest.raises(ValueError, match="chat_template: must be 'auto' or 'none'"):
        Renderer(tokenizer, chat_template="chatml")


@pytest.mark.parametrize("change", ["| upper", "* 2", "| replace('a', 'b')", "| tojson"])
def test_template_that_changes_the_text_is_refused(make_tokenizer, change):
    template = "{% for m in messages %}[{{ (m.content) " + change + " }}]{% endfor %}"
    tokenizer = make_tokenizer("bytes", template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match="template of some/model changes the user's text"):
        Renderer(tokenizer).prompt(user('a "man"'))


def test_refused_conversation_names_the_roles(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "llama2")
    with pytest.raises(ValueError, match=r"refuses .*'system', 'user'.*no system role"):
        Renderer(tokenizer, system_prompt="Be brief.")
    renderer = Renderer(tokenizer)
    system = {"role": "system", "content": "Be brief."}
    with pytest.raises(UnusableRow, match=r"refuses .*'system', 'user'.*no system role") as raised:
        renderer.prompt(conversation([system, {"role": "user", "content": "Tom"}]))
    assert raised.value.reason == "not_renderable"
    assert reason(renderer, conversation([{"role": "assistant", "content": "T"}])) == "no_user_turn"
    assert reason(renderer, conversation([])) == "no_user_turn"


@pytest.mark.parametrize(
    "failure",
    [
        "{{ 1 + 'a' }}",
        "{{ {}['x'] + 1 }}",
        "{{ nothing.at.all }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('') }}",
    ],
)
def test_a_template_may_fail_in_any_way(make_tokenizer, failure):
    broken = "{% if messages | length > 2 %}" + failure + "{% endif %}"
    renderer = Renderer(make_tokenizer("bytes", CHATML + broken))
    turns = [{"role": role, "content": "Tom"} for role in ("user", "assistant", "user")]
    assert reason(renderer, conversation(turns)) == "not_renderable"
    assert len(renderer.prompt(user("Tom"))) > 3
    for template in (failure, "{% if"):  # it fails always
        with pytest.raises(ValueError, match="chat_template: must render a question, got: "):
            Renderer(make_tokenizer("bytes", template))


def test_no_end_token_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "plain")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: must have an end token"):
        Renderer(tokenizer)


def test_differences_are_said(make_tokenizer):
    def between(teacher, student):
        return template_differences(teacher.template, student.template)

    chatml, dated = Renderer(make_tokenizer()), Renderer(make_tokenizer(template="dated"))
    assert between(chatml, Renderer(make_tokenizer())) == []
    said = " ".join(between(chatml, dated))
    assert "chat templates are different" in said and "student writes the date" in said
    assert datetime.now().strftime("%d %B %Y") in said
    system = Renderer(make_tokenizer(), system_prompt="Be brief.")
    assert "system prompt is None" in between(chatml, system)[0]
    plain = Renderer(make_tokenizer(), chat_template="none")
    assert "The teacher gets a chat template" in between(chatml, plain)[0]
    fast = Renderer(make_tokenizer(), template_kwargs={"fast": True})
    assert between(chatml, fast) == ["The chat template of the student does not read fast."]


def test_fingerprint_follows_what_decides_the_ids(make_tokenizer):
    renderers = [
        Renderer(make_tokenizer()),
        Renderer(make_tokenizer(), chat_template="none"),
        Renderer(make_tokenizer(), system_prompt="Be brief."),
        Renderer(make_tokenizer("nfc")),
        Renderer(make_tokenizer(template="llama3")),
        Renderer(make_tokenizer(), template_kwargs={"enable_thinking": False}),
    ]
    assert len({renderer.fingerprint for renderer in renderers}) == len(renderers)
    again = Renderer(make_tokenizer())
    again.tokenizer(["a", "b c d"], padding=True)  # changes the tokenizer's state, not its meaning
    assert again.fingerprint == renderers[0].fingerprint


# -- thoughts, ends, and prompts that were rendered before -----------------------------------------

OPEN = CHATML.replace("assistant\n", "assistant\n<think>\n")
CLOSING = OPEN.replace(  # writes an empty thought before a reply without one, as Qwen3 does
    "{{ m.content }}",
    "{% if m.role == 'assistant' and '</think>' not in m.content %}<think>\n\n</think>\n\n"
    "{% endif %}"
    "{{ m.content }}",
)


@pytest.mark.parametrize(
    ("template", "completion", "labels", "notes"),
    [
        (OPEN, "<think>\nEasy.\n</think>\n\n4", "Easy.\n</think>\n\n4", ["think_tag_stripped"]),
        (OPEN, "\n<think>Easy.</think>4", "Easy.</think>4", ["think_tag_stripped"]),
        (OPEN, "<think>\n\nEasy.</think>4", "\nEasy.</think>4", ["think_tag_stripped"]),
        (OPEN, "Easy.\n</think>\n\n4", "Easy.\n</think>\n\n4", []),
        (CLOSING, "4", "\n</think>\n\n4", ["thought_closed"]),
        (CLOSING, "4<|im_end|>", "\n</think>\n\n4", ["end_token_stripped", "thought_closed"]),
        (CHATML, "<think>\nEasy.\n</think>\n\n4", "<think>\nEasy.\n</think>\n\n4", []),
        (CHATML, "4<|im_end|>", "4", ["end_token_stripped"]),
        (CHATML, "4<|im_end|>\n</s>\n", "4", ["end_token_stripped"]),
        (CHATML, "say <|im_end|> now", "say <|im_end|> now", []),
    ],
)  # fmt: skip
def test_what_is_said_already_is_not_said_twice(
    make_tokenizer, template, completion, labels, notes
):
    renderer = Renderer(make_tokenizer("bytes", template))
    one = user("What is 2 + 2?", completion)
    assert label_text(renderer, one) == labels
    assert one.notes == notes
    assert renderer.render(one).input_ids[-1] == renderer.end_ids[-1]
    whole = renderer.tokenizer.decode(renderer.render(one).input_ids)
    assert whole.count("<think>") <= 1 and one.notes == notes  # a second time notes nothing more


def test_an_answer_does_not_land_in_an_open_thought(make_tokenizer):
    renderer = Renderer(make_tokenizer("bytes", OPEN))
    assert prompt_text(renderer, user("hi")).endswith("assistant\n<think>\n")
    assert reason(renderer, user("hi", "4"), render=True) == "open_thought"
    assert label_text(Renderer(make_tokenizer("bytes", "plain")), user("a <think>\n", "4")) == "4"


@pytest.mark.parametrize("completion", ["", " \n", "<|im_end|>", "</s> <|im_end|>\n"])
def test_an_empty_completion_is_refused(make_tokenizer, completion):
    renderer = Renderer(make_tokenizer())
    assert reason(renderer, user("hi", completion), render=True) == "empty_completion"


@pytest.mark.parametrize("chat", ["chatml", "llama3", "llama2"])
def test_a_rendered_prompt_is_not_rendered_again(make_tokenizer, chat):
    renderer = Renderer(make_tokenizer("bytes", chat))
    rendered = prompt_text(renderer, user("How many apples?"))
    for text in (rendered, f"\n{rendered}", rendered.removeprefix("<s>")):
        assert reason(renderer, user(text)) == "already_rendered"
    plain = Renderer(renderer.tokenizer, chat_template="none")
    assert prompt_text(plain, user(rendered)) == rendered
    metaspace = Renderer(make_tokenizer("metaspace", chat), chat_template="none")
    ids = metaspace.prompt(user(rendered)).input_ids.tolist()
    assert ids.count(metaspace.tokenizer.bos_token_id) == 1  # its own, or the one in the text


def test_a_mark_of_turns_that_is_called_bos_is_known_as_one(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    renderer = Renderer(tokenizer)
    assert reason(renderer, user("<|im_start|>user\nhi<|im_end|>\n")) == "already_rendered"


# -- what a template reads beside the text ---------------------------------------------------------

THINKING = (
    "{% if tools %}tools: {{ tools | length }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.name }}]{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def test_reasoning_and_tool_calls_reach_the_template(make_tokenizer):
    renderer = Renderer(make_tokenizer("bytes", THINKING))
    reply = {"role": "assistant", "content": "4", "reasoning_content": "easy"}
    one = user("2 + 2?", reply=reply)
    assert label_text(renderer, one) == "<think>\neasy\n</think>\n\n4" and one.notes == []
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
    assert label_text(renderer, user("2 + 2?", "", reply=call)) == "[add]"
    turns = [{"role": "user", "content": "a"}, call, {"role": "user", "content": "b"}]
    assert "[add]<|im_end|>" in prompt_text(renderer, conversation(turns))
    other = user("2 + 2?", "5", reply=reply)  # a completion of a model, not the dataset's
    assert label_text(renderer, other) == "5"


def test_variables_of_the_run_and_of_the_row(make_tokenizer):
    tokenizer = make_tokenizer("bytes", THINKING)
    fast = Renderer(tokenizer, template_kwargs={"enable_thinking": False})
    assert prompt_text(fast, user("hi")).endswith("</think>\n\n")
    row = user("hi", template_kwargs={"enable_thinking": True, "tools": [{"type": "function"}]})
    text = prompt_text(fast, row)
    assert text.startswith("tools: 1\n") and text.endswith("assistant\n") and row.notes == []
    reply = {"role": "assistant", "content": "4", "reasoning_content": "easy"}
    assert reason(fast, user("hi", reply=reply), render=True) == "not_renderable"
    with pytest.raises(ValueError, match=r"template_kwargs: must be .*, got \['tokenize'\]"):
        Renderer(tokenizer, template_kwargs={"tokenize": True})
    bad = user("hi", template_kwargs={"add_generation_prompt": False})
    assert reason(fast, bad) == "bad_chat_template_kwargs"


def test_the_template_for_tools_is_used_with_tools(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": THINKING}
    renderer = Renderer(tokenizer)
    assert prompt_text(renderer, user("hi")).startswith("<|im_start|>")
    assert prompt_text(renderer, user("hi", template_kwargs={"tools": [{}]})).startswith("tools: 1")


@pytest.mark.parametrize("chat", ["chatml", "plain"])
def test_what_no_template_reads_is_noted(make_tokenizer, chat):
    renderer = Renderer(make_tokenizer("bytes", chat))
    reply = {"role": "assistant", "content": "4", "reasoning_content": "easy"}
    one = user("hi", reply=reply, template_kwargs={"fast": True})
    assert label_text(renderer, one) == "4"
    assert one.notes == ["message_key_ignored", "template_variable_ignored"]
    turns = [{"role": "user", "content": "hi", "name": "tom"}]
    renderer.prompt(turned := conversation(turns))
    assert turned.notes == ["message_key_ignored"]


# -- completions in their place --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["first", "always", "normalizer", "bpe"])
def pieces(request):
    """Tokenizers of the SentencePiece family: a text begins with the mark of a space."""
    texts = ["The answer is 42. The apples and the answer.", "\n", "The other answer is 7."] * 4
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    if request.param == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    tokenizer.decoder = decoders.Metaspace()
    if request.param == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        scheme = "first" if request.param == "bpe" else request.param
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=special[3:], **names
    )
    fast.chat_template = CHATML
    return fast


def test_a_completion_has_the_tokens_of_its_place(pieces):
    alone = pieces.convert_ids_to_tokens(pieces("The answer", add_special_tokens=False).input_ids)
    assert alone[0].startswith("▁")
    renderer = Renderer(pieces)
    one = user("The apples?", "The answer is 42.")
    prompt, whole = renderer.prompt(one), renderer.render(one)
    turns = [{"role": "user", "content": "The apples?"}]
    text = pieces.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    in_place = pieces(text + "The answer is 42.", add_special_tokens=False).input_ids
    assert whole.input_ids[:-1].tolist() == in_place
    assert np.array_equal(whole.input_ids[: len(prompt)], prompt.input_ids)
    labels = pieces.convert_ids_to_tokens(whole.input_ids[whole.loss_mask])
    assert not labels[0].startswith("▁")
    assert "".join(labels) == "The▁answer▁is▁42.</s>".replace("</s>", "<|im_end|>")


def test_a_completion_that_melts_into_the_prompt_keeps_the_prompt(pieces):
    pieces.chat_template = CHATML.replace("assistant\n", "assistant: ")
    renderer = Renderer(pieces)
    one = user("The apples?", "The answer")
    prompt, whole = renderer.prompt(one), renderer.render(one)
    assert np.array_equal(whole.input_ids[: len(prompt)], prompt.input_ids)
    labels = pieces.convert_ids_to_tokens(whole.input_ids[whole.loss_mask])
    assert "".join(labels) == "The▁answer<|im_end|>"


# -- how often a template is applied ---------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 3])
def test_a_template_is_applied_at_most_twice_a_row(make_tokenizer, monkeypatch, turns):
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    calls: list[Any] = []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: (calls.append(a), apply(*a, **k))[1]
    )
    roles = ("user", "assistant", "user")[:turns]
    rows = [
        conversation([{"role": role, "content": f"Tom has {i} apples"} for role in roles])
        for i in range(20)
    ]
    for row in rows:
        renderer.prompt(row)
        renderer.render(row)
    assert len(calls) == (21 if turns == 1 else 40)
    for row in rows:
        renderer.render(row)
    assert len(calls) == (21 if turns == 1 else 40)


def test_a_frame_of_another_row_is_not_believed(make_tokenizer):
    template = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if 'x' in m.content %} (x){% endif %}"
    )
    renderer = Renderer(make_tokenizer("bytes", template))
    assert domain_spans(renderer.prompt(user("Tom")))[-1][1] == 3
    assert reason(renderer, user("Tom x")) == "not_renderable"
    twice = Renderer(make_tokenizer("bytes", CHATML.replace("m.content", "m.content + m.content")))
    for text in ("Tom", "USERTEXT", "USERTEXTX"):
        assert reason(twice, user(text)) == "not_renderable"


def test_padding_and_truncation_of_a_tokenizer_change_nothing(make_tokenizer):
    tokenizer = make_tokenizer()
    renderer = Renderer(tokenizer)
    expected = Renderer(make_tokenizer()).render(user("Tom has 7 apples")).input_ids.tolist()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert renderer.render(user("Tom has 7 apples")).input_ids.tolist() == expected


TALK = (
    {"role": "user", "content": "  Tom has 3 apples. "},
    {"role": "assistant", "content": "Noted."},
    {"role": "user", "content": "He eats one. How many?"},
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_analyzed_turn_is_in_the_domain_and_no_other(make_tokenizer, kind):
    renderer = Renderer(make_tokenizer(kind, "chatml"))
    both = conversation(TALK, turns=(0, 2))
    rendering, last = renderer.prompt(both), renderer.prompt(conversation(TALK))
    assert rendering.input_ids.tolist() == last.input_ids.tolist()
    taken = {at for start, stop in domain_spans(rendering) for at in range(start, stop)}
    solid = {at for at, character in enumerate(both.text) if not character.isspace()}
    assert solid <= taken
    border = len(TALK[0]["content"])
    assert not any(start < border < stop for start, stop in domain_spans(rendering))


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_follows_the_prompt_without_labels(renderers, kind, chat):
    renderer = renderers[kind, chat]
    one = user("2 + 2?", " So 4.\nEnd", segment=1, prefix="I add 2 and 2.")
    whole, prompt, bare = (
        renderer.render(one),
        renderer.prompt(one),
        renderer.prompt(user("2 + 2?")),
    )
    assert whole.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert prompt.input_ids[: len(bare)].tolist() == bare.input_ids.tolist()
    assert not prompt.loss_mask.any() and whole.loss_mask[len(prompt) :].all()
    assert not prompt.domain[: len(bare)].any()
    taken = {at for start, stop in domain_spans(prompt) for at in range(start, stop)}
    assert {at for at, character in enumerate(one.prefix) if not character.isspace()} <= taken
    if kind != "words":  # which knows none of them
        assert "".join(label_text(renderer, one).split()) == "So4.End"


def test_a_thought_in_the_prefix_is_not_opened_twice(make_tokenizer):
    chat = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    renderer = Renderer(make_tokenizer("bytes", chat))
    one = user("2 + 2?", "</think>4", segment=1, prefix="<think>\nI add. ")
    assert prompt_text(renderer, one).endswith("<think>\nI add. ")
    assert prompt_text(renderer, one).count("<think>") == 1
    assert label_text(renderer, one) == "</think>4"
    spans = domain_spans(renderer.prompt(one))
    assert one.prefix[spans[0][0] : spans[-1][1]].strip() == "I add."
