"""Teachers with weights in 8 or 4 bits, and models that are spread over several places."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from leaf_distill.data.example import Rendering
from leaf_distill.detection.answers import prompted_model
from leaf_distill.detection.arms import arm_name
from leaf_distill.detection.config import DetectConfig
from leaf_distill.models.checks import input_device
from leaf_distill.models.estimate import rough_cost, saliency_cost
from leaf_distill.models.generation import generate
from leaf_distill.models.intervention import answer_kl
from leaf_distill.models.loading import LazyModel, load_model
from leaf_distill.models.saliency import saliency, token_nll

SPREAD = {
    "model.embed_tokens": "disk",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}


@pytest.mark.parametrize(
    ("method", "package"),
    [("int8", "torchao"), ("bnb8", "bitsandbytes"), ("nf4", "bitsandbytes")],
)
def test_a_missing_package_is_named_before_the_weights_are_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch, method: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]  # as not installed
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=rf"^teacher_quantization: .*{package} is missing, got '{method}'; "
        r"run: pip install 'leaf-distill\[quantize\]'$",
    ):
        LazyModel(str(saved), argument="teacher", quantization=method)


def test_only_full_weights_in_files_are_rounded(
    saved: Path, make_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=r"^teacher_quantization: must be left out for a model in"):
        LazyModel(
            make_model(),
            processing_class=make_tokenizer(),
            argument="teacher",
            quantization="int8",
        )
    with pytest.raises(ValueError, match=r"^model_quantization: must be one of int8, bnb8, nf4"):
        LazyModel(str(saved), quantization="int2")
    with pytest.raises(ValueError, match=r"^teacher_quantization: must be one of int8, bnb8, nf4"):
        DetectConfig(teacher_quantization="int2")  # type: ignore[arg-type]
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is quantized already, got 'nf4' for .*student"):
        LazyModel(str(saved), quantization="nf4", fingerprint="known")


def test_rounded_weights_are_another_model_in_the_cache_and_another_arm(saved: Path) -> None:
    config = DetectConfig()
    identities = []
    for method in (None, "int8", "bnb8", "nf4"):
        # With its fingerprint known no weights are read, and no package is needed.
        lazy = LazyModel(str(saved), dtype="float32", fingerprint="known", quantization=method)
        assert lazy.exact == (method != "bnb8")
        identities.append(prompted_model("teacher", lazy, config).identity)
    assert len({json.dumps(one) for one in identities}) == 4
    # What was in the cache before weights could be rounded is used.
    assert identities[0][:2] == ["known", "float32"] and len(identities[0]) == 4
    assert arm_name(DetectConfig(teacher_quantization="nf4")) == "span-teacher_quantization-nf4"


def test_an_estimate_counts_rounded_weights() -> None:
    config = LlamaConfig(
        **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "vocab_size": 100},
    )
    for cost in (saliency_cost, rough_cost):
        sizes = {
            method: cost(config, "float32", 1, 8, 4, quantization=method).weights
            for method in (None, "int8", "nf4")
        }
        layers = 4 * (4 * 256 * 256 + 3 * 256 * 512)
        assert sizes[None] - sizes["int8"] == 3 * layers
        assert sizes[None] - sizes["nf4"] == 3.4375 * layers


def row(prompt: int, labels: int) -> Rendering:
    ids = np.random.default_rng(prompt).integers(3, 400, prompt + labels).astype(np.int32)
    mask = np.arange(prompt + labels) >= prompt
    return Rendering(ids, mask, np.full((len(ids), 2), -1, np.int32), ~mask)


@pytest.mark.parametrize("embedding", ["cpu", "disk"])
def test_a_spread_model_gives_what_it_gives_in_one_place(
    saved: Path, make_tokenizer: Callable[..., Any], embedding: str
) -> None:
    library: Any = AutoModelForCausalLM
    spread = library.from_pretrained(saved, device_map={**SPREAD, "model.embed_tokens": embedding})
    places = {str(weight.device) for weight in spread.parameters()}
    assert places == {"cpu", "meta"} and input_device(spread) == torch.device("cpu")
    whole, rows = load_model(str(saved), device="cpu"), [row(5, 3), row(12, 4)]
    spread = LazyModel(spread, processing_class=make_tokenizer()).load()
    prompts = [one.input_ids[~one.loss_mask].tolist() for one in rows]
    changed = [rows[0].input_ids[:4], rows[1].input_ids[:5]]
    for _ in range(2):  # a pass leaves the model as it was
        for ours, theirs in zip(saliency(spread, rows), saliency(whole, rows), strict=True):
            np.testing.assert_array_equal(ours.norms, theirs.norms)
            assert ours.nll == theirs.nll
        for mine, other in zip(token_nll(spread, rows), token_nll(whole, rows), strict=True):
            np.testing.assert_array_equal(mine, other)
        moved = [answer_kl(model, rows[0], changed) for model in (spread, whole)]
        np.testing.assert_array_equal(*moved)
        answers = [
            generate(model, make_tokenizer(), prompts, end_ids=[2], max_new_tokens=6)
            for model in (spread, whole)
        ]
        assert answers[0] == answers[1]


def test_a_spread_model_in_memory_has_no_fingerprint(
    saved: Path, make_tokenizer: Callable[..., Any]
) -> None:
    library: Any = AutoModelForCausalLM
    spread = library.from_pretrained(saved, device_map=SPREAD)
    with pytest.raises(ValueError, match=r"^model: must have all weights .* device balanced"):
        _ = LazyModel(spread, processing_class=make_tokenizer()).fingerprint


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is spread over the GPUs")
def test_balanced_is_the_cpu_where_there_is_no_gpu(saved: Path) -> None:
    lazy = LazyModel(str(saved), device="balanced")
    model = lazy.load()
    assert lazy.device == input_device(model) == torch.device("cpu")
    assert not any(weight.requires_grad for weight in model.parameters())
    (ours,), (theirs,) = (saliency(one, [row(5, 3)]) for one in (model, load_model(str(saved))))
    np.testing.assert_array_equal(ours.norms, theirs.norms)


def test_balanced_is_refused_for_one_of_several_processes(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^device: must be one device for each of several"):
        LazyModel(str(saved), device="balanced")


@pytest.fixture(scope="module")
def smollm2_directory(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("smollm2")
    lazy = LazyModel(smollm2_path, device="cpu", dtype="float32")
    lazy.load().save_pretrained(directory)
    lazy.tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "correlation", "off", "megabytes"),
    [("int8", 0.99, 0.1, 250), ("bnb8", 0.93, 0.1, 250), ("nf4", 0.6, 1.2, 190)],
)
def test_rounded_weights_of_a_real_model_give_nearly_its_norms(
    smollm2_directory: Path,
    tmp_path: Path,
    method: str,
    correlation: float,
    off: float,
    megabytes: int,
) -> None:
    program = Path(__file__).parent / "quantized_passes.py"
    printed = harness.run(
        *(program, smollm2_directory, method),
        cwd=tmp_path,
        within="quantize",
        PYTHONPATH=os.pathsep.join(sys.path),
    )
    line = next(one for one in printed.splitlines() if one.startswith("PASSES "))
    whole, rounded = (json.loads(line[7:])[name] for name in ("whole", "rounded"))
    for one, other in zip(whole["norms"], rounded["norms"], strict=True):
        assert correlation < np.corrcoef(one, other)[0, 1] < 1 - 1e-9
    assert len(rounded["plain"]) == (0 if method == "bnb8" else 3)
    for one, other in zip(rounded["plain"], rounded["norms"], strict=False):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=1e-3 * max(one))
    for one, other in zip(whole["nll"], rounded["nll"], strict=True):
        assert abs(np.mean(one) - np.mean(other)) < off
    assert np.corrcoef(whole["kl"], rounded["kl"])[0, 1] > 0.7
    assert "France" in rounded["answers"][2]
    assert rounded["megabytes"] < megabytes < whole["megabytes"]
    assert rounded["kept"] < 1.1 * whole["kept"]  # no weight in its own dtype
    assert not any(rounded["graded"]) and rounded["fingerprint"] != whole["fingerprint"]
