"""The hook at the LM head: a model's own logits, or a refusal before the first step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from architectures import CAUSAL, SIZES, VOCABULARY, build, prophetnet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from leaf_distill.models.lm_head import LMHeadHook, finish_logits

IDS = torch.arange(3, 21).reshape(2, 9) * 2 % VOCABULARY
MASK = torch.ones_like(IDS)
AT = torch.zeros(2, 9, dtype=torch.bool)
AT[0, 3:6] = AT[1, 7] = True


def logits_at_the_head(model: Any, hook: LMHeadHook) -> Tensor:
    def make(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return finish_logits(nn.functional.linear(hidden, weight, bias), hook.scale, hook.softcap)

    return hook.run(model, IDS, MASK, AT, make)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "headless"])
def test_the_models_own_logits_are_computed_from_what_the_hook_captures(name: str) -> None:
    model = build(name)
    own = model(input_ids=IDS, attention_mask=MASK).logits[AT]
    hook = LMHeadHook(model.train(), "student")
    hook.check(IDS, MASK, AT)
    assert model.training and hook.vocab_size == VOCABULARY == own.shape[-1]
    model.eval()
    torch.testing.assert_close(logits_at_the_head(model, hook), own, rtol=1e-5, atol=1e-5)
    # A forward of one's own is left alone.
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits[AT], own)


def test_gradients_flow_through_the_forward() -> None:
    model = build("tied")
    hook = LMHeadHook(model, "student")
    logits_at_the_head(model, hook).logsumexp(-1).sum().backward()
    got = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model(input_ids=IDS, attention_mask=MASK).logits[AT].logsumexp(-1).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, rtol=1e-4, atol=1e-5)


class _Casts(TorchDispatchMode):
    """Counts the casts of tensors of one shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_autocast_casts_the_head_for_the_result_alone(name: str) -> None:
    model, seen = build(name), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.logits.dtype))
    hook = LMHeadHook(model, "student")

    def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert torch.is_autocast_enabled("cpu")
        return hidden.bfloat16() @ weight.bfloat16().T

    with _Casts(hook.head.weight.shape) as casts, torch.autocast("cpu", torch.bfloat16):
        logits = hook.run(model, IDS, MASK, AT, product)
        assert torch.is_autocast_enabled("cpu")
    # That of the result; the model goes on with logits of autocast's dtype, as without the hook.
    assert casts.count == 1 and logits.dtype == torch.bfloat16 and seen == [torch.bfloat16]
    logits.float().logsumexp(-1).sum().backward()
    got = {one: weight.grad.clone() for one, weight in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        own = model(input_ids=IDS, attention_mask=MASK).logits[AT]
    own.float().logsumexp(-1).sum().backward()
    assert torch.equal(logits, own) and got.keys() == dict(model.named_parameters()).keys()
    for one, weight in model.named_parameters():
        assert weight.grad.dtype == got[one].dtype == torch.float32
        torch.testing.assert_close(got[one], weight.grad, rtol=2e-2, atol=2e-3)


def test_autocast_is_as_before_where_the_head_fails() -> None:
    model = build()
    hook = LMHeadHook(model, "student")

    def fail(*arguments: Any) -> None:
        raise KeyError

    handle = model.get_output_embeddings().register_forward_pre_hook(fail)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16):
            logits_at_the_head(model, hook)
        handle.remove()
        assert logits_at_the_head(model, hook).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


class _PaddedHead(LlamaForCausalLM):
    """Cuts the logits of its head's padding off, and its config does not tell."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits[..., :VOCABULARY]
        return output


def test_a_cut_that_the_config_does_not_tell_is_refused() -> None:
    hook = LMHeadHook(_PaddedHead(LlamaConfig(**{**SIZES, "vocab_size": 64})), "teacher")
    with pytest.raises(ValueError, match="teacher: must make one logit for each of the 64 rows"):
        hook.check(IDS, MASK, AT)


def test_a_head_that_gets_several_streams_is_refused() -> None:
    model = prophetnet().eval()
    hook = LMHeadHook(model, "student")
    with pytest.raises(ValueError, match="student: must give its head one hidden state for each"):
        hook.check(IDS, MASK, AT)
    assert model(input_ids=IDS, use_cache=False).logits.shape == (2, 9, VOCABULARY)


class _Secretive(LlamaForCausalLM):
    """Scales its logits, and its config does not tell."""

    factor = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [0.99, 1.01, 1.2])
def test_a_factor_on_the_logits_is_refused_in_every_dtype(
    factor: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = _Secretive(LlamaConfig(**SIZES, initializer_range=0.5))
    model.factor = factor
    hook = LMHeadHook(model.to(dtype), "teacher")
    expected = rf"teacher: must make the logits .* and are {factor}\d* times as large"
    with pytest.raises(ValueError, match=expected):
        hook.check(IDS, MASK, AT)


class _WideHead(nn.Linear):
    """Multiplies in float32: the logits lack the rounding that the hook sees in its own."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_not_taken_for_a_factor(dtype: torch.dtype) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.5))
        model.lm_head = _WideHead(32, VOCABULARY, bias=False)
        ids = torch.randint(5, VOCABULARY, (1, 4))
        at = torch.tensor([[False, False, False, True]])  # one label: it averages out the least
        LMHeadHook(model.to(dtype), "teacher").check(ids, torch.ones_like(ids), at)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_that_is_not_finite_is_refused(role: str, value: float) -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight[3, 2] = value
    with pytest.raises(ValueError, match=f"{role}: must have finite weights, got NaN or infinity"):
        LMHeadHook(model, role).check(IDS, MASK, AT)


@pytest.mark.parametrize("kind", ["no head", "an adapter on the head"])
def test_another_head_than_a_plain_one_is_refused(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = build("headless")
    if kind == "an adapter on the head":
        model = get_peft_model(build(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="student: must be a causal language model with a plain"):
        LMHeadHook(model, "student")


def test_a_model_that_does_not_call_its_head_is_refused() -> None:
    class _Own(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            states = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=states @ self.lm_head.weight.T)

    model = _Own(LlamaConfig(**SIZES))
    with pytest.raises(ValueError, match="student: must call its head in its forward pass"):
        LMHeadHook(model, "student").check(IDS, MASK, AT)
