"""Models and tokenizers by name: what loads, what it is then, and what is refused."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from leaf_distill.data.prompt import tokenizer_fingerprint
from leaf_distill.models.loading import (
    check_same_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_device,
)


@pytest.fixture
def saved(tmp_path, make_model, make_tokenizer):
    path = tmp_path / "student"
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def test_directory(saved, make_model):
    model = load_model(str(saved), device="cpu")
    assert not model.training and model.dtype == torch.float32
    expected = make_model().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load_model(str(saved), dtype="bfloat16").dtype == torch.bfloat16
    tokenizer = load_tokenizer(str(saved))
    assert tokenizer.is_fast and tokenizer.chat_template


def test_pad_token_is_set_when_missing(tmp_path, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token == "</s>"


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/where", "model.gguf", "a/b/c", "~/nowhere-at-all"]
)
def test_missing_path(name):
    for load in (load_model, load_tokenizer, model_fingerprint):
        with pytest.raises(ValueError, match=f"'{name}' does not exist: no such directory"):
            load(name)


def test_unreachable_hub_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer, model_fingerprint):
        with pytest.raises(ValueError, match="can be read from 'nobody/nothing'; give a directory"):
            load("nobody/nothing")


def test_other_files(tmp_path, saved):
    with pytest.raises(ValueError, match=r"is a file, but not a \.gguf one: name its folder"):
        load_model(str(saved / "config.json"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(ValueError, match=r"No model .* from '.*bad.gguf'"):
        load_model(str(tmp_path / "bad.gguf"))
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"No model .* from '.*student'"):
        load_model(str(saved))
    (tmp_path / "empty").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match="of a causal language model can be read from"):
            load(str(tmp_path / "empty"))


def test_missing_weights_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of its weights, such as 'model.norm.weight'"):
        load_model(str(saved))


def test_tied_head_is_not_missing(tmp_path, make_model):
    model = make_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_other_kind_of_model(tmp_path):
    config = T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No model of a causal language model can be read"):
        load_model(str(tmp_path))


def test_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a slow one \(ByT5Tokenizer\)"):
        load_tokenizer(str(tmp_path))


def test_settings_are_checked(saved):
    with pytest.raises(ValueError, match=r"dtype must be one of auto, float32, .* not 'half'"):
        load_model(str(saved), dtype="half")
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu' or"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"device 'cuda:99' was asked for, but \d+ GPUs are here"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_model_fingerprint_follows_weights_and_settings(saved, make_model):
    first = model_fingerprint(str(saved))
    os.utime(saved / "model.safetensors", (1, 1))
    # What `leaf distill` and a Trainer leave beside the weights.
    for name in (
        "README.md",
        "metrics.json",
        "run.json",
        "trainer_state.json",
        "training_args.bin",
    ):
        (saved / name).write_text("{}")
    assert model_fingerprint(str(saved)) == first
    make_model(seed=1).save_pretrained(saved)
    second = model_fingerprint(str(saved))
    model = make_model(seed=1)
    model.generation_config.eos_token_id = 7
    model.save_pretrained(saved)
    assert len({first, second, model_fingerprint(str(saved))}) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "model.safetensors.index.json"),
        *("pytorch_model-00001-of-00002.bin", "adapter_config.json", "adapter_model.safetensors"),
    ],
)
def test_model_fingerprint_covers_what_decides_a_model(saved, name):
    first = model_fingerprint(str(saved))
    with (saved / name).open("ab") as file:
        file.write(b" ")
    assert model_fingerprint(str(saved)) != first


def test_large_files_are_sampled_from_end_to_end(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(200 << 20)  # a hole: no disk is used
    first = model_fingerprint(str(tmp_path))
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    assert model_fingerprint(str(tmp_path)) != first


def _words(*words, added=()):
    vocabulary = {word: index for index, word in enumerate(("<unk>", *words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.add_tokens(list(added))
    return tokenizer


def test_same_tokenizers(make_tokenizer):
    check_same_tokenizer(make_tokenizer(), make_tokenizer(template="llama3"))
    check_same_tokenizer(make_tokenizer(), make_tokenizer("trimmed"))
    check_same_tokenizer(_words("a", "b"), _words("a", "b", added=["<pad>"]))
    check_same_tokenizer(_words("a", "b", added=["<pad>"]), _words("a", "b"))


def test_different_tokenizers_are_refused_with_the_first_difference(make_tokenizer):
    with pytest.raises(ValueError, match=r"token 'b' is number 2 in the teacher's and number 3 in"):
        check_same_tokenizer(_words("a", "b", "c"), _words("a", "c", "b"))
    with pytest.raises(ValueError, match=r"token 'c' is absent in the teacher's and number 3 in"):
        check_same_tokenizer(_words("a", "b"), _words("a", "b", "c"))
    with pytest.raises(ValueError, match=r"they split .* differently, into \d+ and \d+ tokens"):
        check_same_tokenizer(make_tokenizer("bytes"), make_tokenizer("nfc"))


def test_tokenizer_fingerprint(make_tokenizer):
    assert tokenizer_fingerprint(make_tokenizer()) == tokenizer_fingerprint(make_tokenizer())
    assert tokenizer_fingerprint(make_tokenizer()) != tokenizer_fingerprint(make_tokenizer("words"))


@pytest.mark.slow
def test_gguf_becomes_a_plain_trainable_model(smollm2_path, tmp_path):
    model = load_model(smollm2_path)
    assert model.dtype == torch.float32 and not model.training
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not getattr(model, "is_quantized", False)
    assert getattr(model.config, "quantization_config", None) is None
    ids = torch.tensor([[1, 9690, 198, 2683]])
    logits = model(ids).logits
    logits.logsumexp(-1).sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    model.save_pretrained(tmp_path)
    load_tokenizer(smollm2_path).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, logits)
    assert model.float().half().dtype == torch.float16
    check_same_tokenizer(load_tokenizer(smollm2_path), load_tokenizer(str(tmp_path)))
    assert again.generation_config.eos_token_id == 2
    assert model_fingerprint(smollm2_path) != model_fingerprint(str(tmp_path))
