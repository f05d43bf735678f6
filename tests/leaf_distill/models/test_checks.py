"""The checks of a model at its loading, and the first batch of a fresh process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from architectures import CAUSAL, NOT_CAUSAL, SIZES, build
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_distill.models.checks import check_causal, eval_mode, warn_of_spinning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_pass_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype).train()
    check_causal(model, name)
    assert model.training


@pytest.mark.parametrize("name", ["bert", "xlnet", "cpmant"])
def test_encoders_are_refused_in_bfloat16(name: str) -> None:
    with pytest.raises(ValueError, match="depend on the tokens after it"):
        check_causal(build(name).bfloat16(), name)


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_others_are_refused_with_a_reason(name: str) -> None:
    reason = "the padding after it" if name == "prophetnet" else "the tokens after it"
    expected = rf"^model: must be a causal .* got '{name}' .* depend on {reason}; choose a decoder"
    with pytest.raises(ValueError, match=expected):
        check_causal(build(name), name)


class _Counting(LlamaForCausalLM):
    """Scales its logits with the tokens of the row, which it takes from the mask, if it has one."""

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        output: Any = super().forward(input_ids, attention_mask, **options)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output.logits = output.logits * seen.sum(-1)[:, None, None]
        return output


def test_padding_without_a_mask_that_changes_logits_is_refused() -> None:
    with pytest.raises(ValueError, match="depend on the padding after it"):
        check_causal(_Counting(LlamaConfig(**SIZES)).eval(), "counting")


def test_a_model_that_cannot_run_is_refused() -> None:
    model = build()
    model.model.layers[1].self_attn.o_proj = nn.Linear(7, 32)
    with pytest.raises(ValueError, match=r"^model: .* cannot run on a prompt alone: mat1 and mat2"):
        check_causal(model, "broken")


def test_each_module_gets_its_mode_back() -> None:
    model = build().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("before", [True, False])
def test_passes_leave_cudnns_attention_out_and_put_the_choice_back(before: bool) -> None:
    known = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with pytest.raises(KeyError), eval_mode(build()):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(known)


@pytest.mark.parametrize(
    ("load", "policy", "threads", "gpu", "warns"),
    [
        (1.5, None, 2, False, True),
        (0.9, None, 2, False, False),
        (1.5, "passive", 2, False, False),
        (1.5, "active", 2, False, False),
        (1.5, None, 1, False, False),
        (1.5, None, 2, True, False),
    ],
)
def test_threads_that_spin_on_busy_cores_are_told(
    load: float,
    policy: str | None,
    threads: int,
    gpu: bool,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    warn_of_spinning()
    assert ("OMP_WAIT_POLICY=passive" in caplog.text) == warns


FIRST_BATCH = """
import hashlib, sys, numpy as np
from leaf_distill.data.example import Rendering
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.saliency import saliency
ids = (np.arange(40) * 7 % 50 + 10).astype(np.int32)
late = np.arange(40) >= 30
row = Rendering(ids, late, np.full((40, 2), -1, np.int32), ~late)
results = saliency(LazyModel(sys.argv[1]).load(), [row] * 4)
print(hashlib.sha256(b"".join(one.norms.tobytes() for one in results)).hexdigest())
"""


def first_batches(student: str, count: int) -> set[str]:
    command = [sys.executable, "-c", FIRST_BATCH, student]
    return {subprocess.check_output(command, text=True).strip() for _ in range(count)}


@pytest.mark.slow
def test_the_first_batch_of_every_process_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert len(first_batches("python/leaf_distill/demo/assets/teacher", 8)) == 1
