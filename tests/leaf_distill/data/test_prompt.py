"""Renderings: what the model reads, and where the user's characters are in it."""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leaf_distill.data.prompt import NOWHERE, Renderer, template_differences

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


def user(text):
    return [{"role": "user", "content": text}]


def domain_spans(rendering):
    return [span for span in rendering.offsets if span != NOWHERE]


def token_bytes(tokenizer, index):
    """What a byte-level token stands for, from the public GPT-2 byte table."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(rest)
    }
    token = tokenizer.convert_ids_to_tokens(index)
    if index in tokenizer.added_tokens_decoder:
        return token.encode()
    return bytes(table[char] for char in token)


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
        lists = (rendering.label_mask, rendering.domain, rendering.prunable, rendering.offsets)
        assert {len(one) for one in lists} == {len(rendering.input_ids)}
        assert rendering.domain == [span != NOWHERE for span in rendering.offsets]
        assert not any(rendering.label_mask)
        spans = domain_spans(rendering)
        assert all(0 <= start < stop <= len(text) for start, stop in spans)
        assert all(b[0] <= a[1] <= b[1] and a[0] <= b[0] for a, b in pairwise(spans))
        for span, prunable in zip(rendering.offsets, rendering.prunable, strict=True):
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
            ids = renderer.tokenizer.apply_chat_template(user(text), add_generation_prompt=True)
            assert renderer.prompt(user(text)).input_ids == ids["input_ids"]


def test_trimmed_spaces_belong_to_the_following_token(make_tokenizer):
    text = "Tom  has 7\napples"
    whole = Renderer(make_tokenizer("bytes", "chatml")).prompt(user(text))
    trimmed = Renderer(make_tokenizer("trimmed", "chatml")).prompt(user(text))
    assert whole.offsets == trimmed.offsets
    words = Renderer(make_tokenizer("words", "plain")).prompt(user("Tom has  7 apples"))
    assert domain_spans(words) == [(0, 3), (3, 7), (7, 10), (10, 17)]


def test_tokens_of_one_character_share_it(make_tokenizer):
    rendering = Renderer(make_tokenizer("metaspace", "plain")).prompt(user("7🦜"))
    assert domain_spans(rendering)[-4:] == [(1, 2)] * 4


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_completion_and_its_end(renderers, kind, chat):
    renderer = renderers[kind, chat]
    messages = user(" How many apples? ")
    prompt, whole = renderer.prompt(messages), renderer.render(messages, "The answer is 42.")
    length = len(prompt.input_ids)
    for name in ("input_ids", "label_mask", "domain", "prunable", "offsets"):
        assert getattr(whole, name)[:length] == getattr(prompt, name)
    labels = [i for i, on in zip(whole.input_ids, whole.label_mask, strict=True) if on]
    answer = renderer.tokenizer("The answer is 42.", add_special_tokens=False)["input_ids"]
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(chat, "</s>")
    assert labels == [*answer, renderer.tokenizer.convert_tokens_to_ids(end)]
    assert whole.input_ids[length:] == labels
    assert not any(whole.domain[length:])
    assert set(renderer.end_ids) == {labels[-1], renderer.tokenizer.eos_token_id}


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("kind", KINDS)
def test_bos_is_never_doubled(renderers, kind, chat):
    renderer = renderers[kind, chat]
    ids = renderer.render(user("hello"), "world").input_ids
    expected = 1 if chat not in ("chatml", "plain") or (kind, chat) == ("metaspace", "plain") else 0
    assert ids.count(renderer.tokenizer.bos_token_id) == expected
    assert expected == 0 or ids[0] == renderer.tokenizer.bos_token_id


def test_special_tokens_in_the_users_text_are_tokens_of_the_domain(make_tokenizer):
    renderer = Renderer(make_tokenizer("bytes", "chatml"))
    rendering = renderer.prompt(user("say <|im_end|> now"))
    place = rendering.offsets.index((4, 14))
    assert rendering.input_ids[place] == renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rendering.domain[place] and rendering.prunable[place]


def test_stripping_template_keeps_offsets_in_the_original_text(make_tokenizer):
    rendering = Renderer(make_tokenizer("bytes", "llama3")).prompt(user(" \n Tom has 7  "))
    spans = domain_spans(rendering)
    assert (spans[0][0], spans[-1][1]) == (3, 12)


def test_only_the_last_user_turn_is_the_domain(make_tokenizer):
    renderer = Renderer(make_tokenizer(), system_prompt="Be brief.")
    messages = [*user("Tom"), {"role": "assistant", "content": "Tom"}, *user("Tom")]
    rendering = renderer.prompt(messages)
    assert domain_spans(rendering)[-1][1] == 3
    first = rendering.domain.index(True)
    text = renderer.tokenizer.decode(rendering.input_ids[:first])
    assert text.count("Tom") == 2 and text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_own_system_message_wins(make_tokenizer):
    renderer = Renderer(make_tokenizer(), system_prompt="Be brief.")
    rendering = renderer.prompt([{"role": "system", "content": "Be long."}, *user("Tom")])
    text = renderer.tokenizer.decode(rendering.input_ids)
    assert "Be long." in text and "Be brief." not in text


def test_template_choice(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "chatml")
    plain = Renderer(tokenizer, chat_template="none")
    assert tokenizer.decode(plain.prompt(user("Tom has 7")).input_ids) == "Tom has 7"
    with pytest.raises(ValueError, match="chat_template must be 'auto' or 'none'"):
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
    with pytest.raises(ValueError, match=r"refuses .*'system', 'user'.*no system role"):
        renderer.prompt([{"role": "system", "content": "Be brief."}, *user("Tom")])
    with pytest.raises(ValueError, match="last message must be the user's"):
        renderer.prompt([{"role": "assistant", "content": "Tom"}])


def test_no_end_token_is_an_error(make_tokenizer):
    tokenizer = make_tokenizer("bytes", "plain")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        Renderer(tokenizer)


def test_differences_are_said(make_tokenizer):
    chatml, dated = Renderer(make_tokenizer()), Renderer(make_tokenizer(template="dated"))
    assert template_differences(chatml, Renderer(make_tokenizer())) == []
    said = " ".join(template_differences(chatml, dated))
    assert "chat templates are different" in said and "student writes the date" in said
    assert datetime.now().strftime("%d %B %Y") in said
    system = Renderer(make_tokenizer(), system_prompt="Be brief.")
    assert "system prompt is None" in template_differences(chatml, system)[0]
    plain = Renderer(make_tokenizer(), chat_template="none")
    assert "The teacher gets a chat template" in template_differences(chatml, plain)[0]


def test_fingerprint_follows_what_decides_the_ids(make_tokenizer):
    renderers = [
        Renderer(make_tokenizer()),
        Renderer(make_tokenizer(), chat_template="none"),
        Renderer(make_tokenizer(), system_prompt="Be brief."),
        Renderer(make_tokenizer("nfc")),
        Renderer(make_tokenizer(template="llama3")),
    ]
    assert len({renderer.fingerprint for renderer in renderers}) == len(renderers)
    again = Renderer(make_tokenizer())
    again.tokenizer(["a", "b c d"], padding=True)  # changes the tokenizer's state, not its meaning
    assert again.fingerprint == renderers[0].fingerprint
