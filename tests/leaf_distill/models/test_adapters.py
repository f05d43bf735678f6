"""Directories of LoRA adapters: loaded with their base model, which is part of their identity."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from leaf_distill.models.loading import LazyModel, load_model
from leaf_distill.models.source import model_fingerprint
from leaf_distill.models.tokenizer import load_tokenizer

IDS = torch.tensor([[11, 12, 13, 14]])


def on_cpu(path):
    return load_model(str(path), device="cpu")


@pytest.fixture
def adapter(tmp_path, make_model, make_tokenizer):
    """An adapter directory beside its base model; the adapter changes the logits."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(load_model(str(tmp_path / "base")), lora).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def set_base(adapter, base):
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = base
    path.write_text(json.dumps(settings))


def test_an_adapter_is_merged_into_its_base(adapter):
    base = on_cpu(adapter.parent / "base")
    plain = base(IDS).logits
    expected = PeftModel.from_pretrained(base, adapter)(IDS).logits
    lazy = LazyModel(str(adapter), device="cpu")
    assert (lazy.dtype, lazy.max_positions) == ("float32", 128)
    merged = lazy.load()
    assert type(merged).__name__ == "LlamaForCausalLM" and not merged.training
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 0.1
    assert load_model(str(adapter), dtype="bfloat16").dtype == torch.bfloat16


def test_an_adapter_can_be_trained_on(adapter):
    model = load_model(str(adapter), device="cpu", trainable_adapter=True)
    assert isinstance(model, PeftModel)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    torch.testing.assert_close(model(IDS).logits, on_cpu(adapter)(IDS).logits)
    whole = load_model(str(adapter.parent / "base"), trainable_adapter=True)
    assert type(whole).__name__ == "LlamaForCausalLM"


def test_the_tokenizer_is_the_adapters_or_the_bases(adapter, make_tokenizer):
    assert "im_start" in load_tokenizer(str(adapter)).chat_template
    make_tokenizer(template="llama3").save_pretrained(adapter)
    assert "start_header_id" in load_tokenizer(str(adapter)).chat_template


def test_an_adapter_on_an_adapter(adapter, tmp_path):
    torch.manual_seed(4)
    lora = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    second = get_peft_model(on_cpu(adapter), lora)
    expected = second(IDS).logits
    second.save_pretrained(tmp_path / "second")
    set_base(tmp_path / "second", str(adapter))
    torch.testing.assert_close(
        on_cpu(tmp_path / "second")(IDS).logits, expected, rtol=1e-5, atol=1e-5
    )
    assert model_fingerprint(str(tmp_path / "second")) != model_fingerprint(str(adapter))


def test_the_base_is_part_of_the_fingerprint(adapter, make_model, tmp_path):
    first = model_fingerprint(str(adapter))
    assert LazyModel(str(adapter)).fingerprint == first != model_fingerprint(str(tmp_path / "base"))
    make_model(seed=1).save_pretrained(tmp_path / "base")
    changed = model_fingerprint(str(adapter))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, adapter / "adapter_model.safetensors"
    )
    assert len({first, changed, model_fingerprint(str(adapter))}) == 3


def test_copies_have_one_fingerprint_wherever_they_lie(adapter, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(adapter, elsewhere / "adapter")
    shutil.copytree(tmp_path / "base", elsewhere / "the-base")
    set_base(elsewhere / "adapter", "../the-base")  # beside the adapter
    assert model_fingerprint(str(elsewhere / "adapter")) == model_fingerprint(str(adapter))
    assert torch.equal(on_cpu(elsewhere / "adapter")(IDS).logits, on_cpu(adapter)(IDS).logits)


def test_a_missing_base_is_named_with_its_adapter(adapter, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    for load in (load_model, load_tokenizer, model_fingerprint, LazyModel):
        with pytest.raises(ValueError, match=r"which does not exist.*of the adapter '"):
            load(str(adapter))


@pytest.mark.parametrize("base", [None, 3, "", "../adapter", "adapter"])
def test_an_adapter_without_a_base_is_refused(adapter, base, monkeypatch):
    set_base(adapter, base)
    monkeypatch.chdir(adapter.parent)
    with pytest.raises(ValueError, match=r"^model: must be an adapter that names its base model"):
        load_model("adapter")


def test_a_damaged_adapter_is_refused(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"^model: .*no adapter .*missing adapter keys"):
        load_model(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^model: .*no adapter "):
        load_model(str(adapter))


def test_an_adapter_that_cannot_be_merged_is_refused(adapter, tmp_path):
    tuned = get_peft_model(
        load_model(str(tmp_path / "base")),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    tuned.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match=r"^model: .*no adapter "):
        load_model(str(tmp_path / "prompt"))


def test_a_missing_peft_is_said(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^model: .* run: pip install 'leaf-distill\[peft\]'"):
        load_model(str(adapter))
