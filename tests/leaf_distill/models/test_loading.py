"""Models and tokenizers by name: what loads, what it is then, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import peft
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
from leaf_distill.models.loading import LazyModel, load_model
from leaf_distill.models.placement import resolve_device
from leaf_distill.models.source import model_fingerprint
from leaf_distill.models.tokenizer import check_same_tokenizer, load_tokenizer


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
        with pytest.raises(ValueError, match=f"got '{name}', which does not exist; check the path"):
            load(name)


def test_unreachable_hub_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_model, load_tokenizer, model_fingerprint):
        with pytest.raises(ValueError, match=r"^model: must be .*'nobody/nothing', from which"):
            load("nobody/nothing")


def test_a_hub_out_of_reach_is_said_after_one_question(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # refuses
    waits = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waits.append)
    with pytest.raises(ValueError, match=r"^student: the hub cannot be reached \(Conn.*OFFLINE=1"):
        LazyModel("nobody/nothing", argument="student")
    assert waits == sorted(waits)  # a second question would begin with a short one again


def test_a_damaged_gguf_file(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no more")
    with pytest.raises(ValueError, match=r"^model: must be .*bad.gguf', from which no model"):
        load_model(str(tmp_path / "bad.gguf"))


def test_a_gguf_file_needs_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"^model: must come with .* run: pip install gguf$"):
            load(str(tmp_path / "a.gguf"))


HUB = """
import sys, pathlib
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.source import model_fingerprint
from leaf_distill.models.tokenizer import load_tokenizer
for commit in "ac":
    pathlib.Path(sys.argv[1]).write_text(commit * 40)
    for name in ("someone/model", "someone/adapter"):
        model = LazyModel(name).load()
        print(type(model).__name__, load_tokenizer(name).is_fast, model_fingerprint(name))
"""


def test_hub_names_stand_for_their_commits(tmp_path, saved, make_model):
    """Read from a cache as huggingface_hub lays it out, without a network."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(make_model(), lora)
    adapted.peft_config["default"].base_model_name_or_path = "someone/model"
    adapted.save_pretrained(tmp_path / "adapter")
    for directory, name, commit in (
        (saved, "model", "a"),
        (saved, "model", "c"),
        (tmp_path / "adapter", "adapter", "b"),
    ):
        home = tmp_path / f"hub/models--someone--{name}"
        shutil.copytree(directory, home / "snapshots" / (commit * 40))
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs/main").write_text(commit * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    newest = str(tmp_path / "hub/models--someone--model/refs/main")
    command = [sys.executable, "-c", HUB, newest]
    output = subprocess.check_output(command, text=True, env=environment)
    lines = [line.split() for line in output.splitlines()]
    assert [line[:2] for line in lines] == [["LlamaForCausalLM", "True"]] * 4
    assert len({line[2] for line in lines}) == 4  # the base is part of the adapter's


def test_messages_name_the_argument_and_the_whole_reason(saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^student: must be .*such directory here: check"):
        LazyModel("nowhere/model", argument="student")
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"^teacher: .* no tokenizer .* from one of: .*\(1\)"):
        LazyModel(str(saved), argument="teacher")


def test_an_encoder_and_decoder_is_refused(saved):
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**settings, "is_encoder_decoder": True}))
    with pytest.raises(ValueError, match="an encoder and decoder; choose a decoder"):
        load_model(str(saved))


def test_other_files(tmp_path, saved):
    with pytest.raises(ValueError, match=r"^model: must be .* got the file .*; name its dir"):
        load_model(str(saved / "config.json"))
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^model: must be .*student', from which no model"):
        load_model(str(saved))
    (tmp_path / "empty").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(
            ValueError, match=r"^model: must be .*empty', from which no (model|tok)"
        ):
            load(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="has none of the files of a model"):
        model_fingerprint(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"got '/aaaa.*aaaa', which does not exist"):
        load_model("/" + "a" * 5000)


def test_missing_weights_are_named(saved):
    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"which lacks 1 of them, such as 'model.norm.weight'"):
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
    with pytest.raises(ValueError, match=r"must be a causal .* of the type 't5'"):
        load_model(str(tmp_path))


def test_slow_tokenizer_is_refused(tmp_path):
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^tokenizer: must be a fast one, .* got ByT5Tokenizer"):
        load_tokenizer(str(tmp_path))


def test_settings_are_checked(saved):
    with pytest.raises(ValueError, match=r"^dtype: must be one of auto, float32, .* got 'half'"):
        load_model(str(saved), dtype="half")
    with pytest.raises(ValueError, match=r"^device: must be 'auto', 'cpu', .* got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(ValueError, match=r"^device: must be one of the \d+ GPUs .*'cuda:99'"):
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
    with pytest.raises(
        ValueError,
        match=r"^tokenizers: .* got token 'b' as number 2 in the teacher's and number 3",
    ):
        check_same_tokenizer(_words("a", "b", "c"), _words("a", "c", "b"))
    with pytest.raises(ValueError, match=r"token 'c' as absent in the teacher's and number 3 in"):
        check_same_tokenizer(_words("a", "b"), _words("a", "b", "c"))
    with pytest.raises(ValueError, match=r"that split .* differently, into \d+ and \d+ tokens"):
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


def test_a_launched_process_takes_the_gpu_of_its_local_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(resolve_device("auto")) == "cuda:0"
    assert str(resolve_device("cuda")) == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert {str(resolve_device(name)) for name in ("auto", "cuda", "cuda:1")} == {"cuda:1"}
    assert str(resolve_device("cuda:0")) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="must be one of the 2 GPUs"):
        resolve_device("auto")
