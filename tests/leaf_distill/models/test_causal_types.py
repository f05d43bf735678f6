"""Every causal type of transformers: what it computes is right, or it is refused in a sentence."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from architectures import VOCABULARY
from causal_types import TYPES, tiny
from test_saliency import rendering
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from leaf_distill.data.example import Rendering
from leaf_distill.models.checks import check_causal
from leaf_distill.models.generation import generate
from leaf_distill.models.lm_head import LMHeadHook, finish_logits
from leaf_distill.models.saliency import saliency, token_nll

# One type of each mechanism: norms, positions, experts, states, softcaps, factors, tied heads.
FAST = {
    *("llama", "gpt2", "gemma2", "gemma3_text", "gemma4_text", "qwen2", "qwen3", "qwen3_moe"),
    *("mixtral", "deepseek_v3", "mamba", "jamba", "bloom", "opt", "granite", "cohere", "phi3"),
    *("minicpm3", "inkling_text", "ctrl", "xlnet", "prophetnet", "cpmant", "reformer", "bert"),
    *("recurrent_gemma", "rwkv", "xglm", "dory", "gpt_oss"),
}
REFUSED = {
    "cpmant": "tokens after it",
    "gemma4_unified_assistant": "cannot run on a prompt alone",
    "prophetnet": "padding after it",
    "xlm": "tokens after it",
    "xlnet": "tokens after it",
}
"""Types that are no causal language models as they are built here, and why."""
OTHER_ANSWERS = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm"}
OTHER_ANSWERS |= {"xlm-roberta", "xlm-roberta-xl"}
"""Types whose positions begin at another number when transformers generates."""
NO_GRADIENT = {"reformer"}
UNTRAINABLE = {"dory"}
"""Types whose head has weights beside the matrix."""
ROWS = [rendering(5, 1, 1), rendering(12, 7, 2)]
IDS = torch.arange(3, 21).reshape(2, 9) * 2 % VOCABULARY
AT = torch.zeros(2, 9, dtype=torch.bool)
AT[0, 3:6] = AT[1, 7] = True


class _Given(nn.Module):
    """An input embedding that gives the same vectors whatever it is asked for."""

    def __init__(self, vectors: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.vectors, self.weight = vectors, weight.detach()

    def forward(self, ids: Tensor) -> Tensor:
        return self.vectors


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in float64, where it can run in it."""
    wide = copy.deepcopy(model).double()
    if getattr(wide, "_can_set_experts_implementation", lambda: False)():
        wide.set_experts_implementation("eager")  # the grouped product has no float64
    try:
        with torch.no_grad():
            wide(input_ids=IDS, use_cache=False)
    except Exception:
        return copy.deepcopy(model)
    return wide


def by_autograd(model: PreTrainedModel, row: Rendering) -> tuple[Tensor, np.ndarray]:
    """Return log probabilities [T - 1, V], and the norms of the gradient at inputs_embeds."""
    ids = torch.from_numpy(row.input_ids[None]).long()
    vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
    try:
        if hasattr(model.config.get_text_config(), "hidden_size_per_layer_input"):
            raise ValueError("its layers look up vectors of their own for the ids")
        logits = model(inputs_embeds=vectors * 1, use_cache=False).logits
    except Exception:  # the ids are needed beside the vectors
        model = copy.deepcopy(model)
        weight = model.get_input_embeddings().weight
        model.set_input_embeddings(_Given(vectors * 1, weight))
        logits = model(input_ids=ids, use_cache=False).logits
    chances = logits[0, :-1].log_softmax(-1)
    picked = -chances.gather(1, ids[0, 1:, None])[:, 0]
    loss = picked[torch.from_numpy(row.loss_mask[1:])].mean()
    (gradient,) = torch.autograd.grad(loss, vectors)
    return picked.detach().double().numpy(), gradient[0].double().norm(dim=-1).numpy()


def refusal(call: Any, *arguments: Any) -> str | None:
    """Return the sentence with which a call refuses a model."""
    try:
        call(*arguments)
    except ValueError as error:
        sentence = str(error)
        assert sentence.startswith(("model: must ", "student: must ")) and "; " in sentence
        assert "\n" not in sentence
        return sentence
    return None


def _encodes(model: PreTrainedModel) -> bool:
    """Return whether the model is an encoder that its configuration can make a decoder."""
    return getattr(model.config, "is_decoder", None) is False


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")


def check_saliency(model: PreTrainedModel, wide: PreTrainedModel) -> None:
    found, likelihoods = saliency(model, ROWS), token_nll(model, ROWS)
    for row, result, nll in zip(ROWS, found, likelihoods, strict=True):
        picked, norms = by_autograd(wide, row)
        assert result.nll == pytest.approx(picked[row.loss_mask[1:]].mean(), rel=1e-5)
        np.testing.assert_allclose(result.norms, norms, rtol=1e-4, atol=2e-5 * norms.max())
        np.testing.assert_allclose(nll[1:], picked, rtol=1e-5, atol=1e-5)
        assert norms.max() > 0 and not result.invalid


def check_training(model: PreTrainedModel, wide: PreTrainedModel) -> str | None:
    """Return why the model cannot be trained; otherwise its logits at the head are its own."""
    hook = LMHeadHook(model, "student")
    mask = torch.ones_like(IDS)
    if (sentence := refusal(hook.check, IDS, mask, AT)) is not None:
        return sentence

    def make(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return finish_logits(nn.functional.linear(hidden, weight, bias), hook.scale, hook.softcap)

    with torch.no_grad():
        own = hook.run(model, IDS, mask, AT, make)
        logits = wide(input_ids=IDS, attention_mask=mask, use_cache=False).logits[AT]
    scale = float(logits.abs().max())
    torch.testing.assert_close(own.double(), logits.double(), rtol=1e-4, atol=1e-5 * scale)
    return None


def check_answers(model: PreTrainedModel, wide: PreTrainedModel, words: Any) -> None:
    prompts = [row.input_ids.tolist() for row in ROWS]
    answers = generate(model, words, prompts, end_ids=[2], max_new_tokens=4)
    for ids, answer in zip(prompts, answers, strict=True):
        expected = list(ids)
        while len(expected) < len(ids) + 4 and expected[len(ids) :][-1:] != [2]:
            with torch.no_grad():
                logits = wide(input_ids=torch.tensor([expected]), use_cache=False).logits
            expected.append(int(logits[0, -1].argmax()))
        text = words.decode(expected[len(ids) :], skip_special_tokens=True)
        assert answer.text == text


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in TYPES]
)
def test_a_causal_type_is_right_or_refused(name: str, words: Any) -> None:
    model = tiny(name)
    if (sentence := refusal(check_causal, model, name)) is not None:
        assert _encodes(model) or REFUSED.get(name, "nothing") in sentence
        if not _encodes(model):
            return
        model = tiny(name, is_decoder=True)
        check_causal(model, name)
    wide = exact(model)
    if name in OTHER_ANSWERS:
        call = partial(generate, end_ids=[2], max_new_tokens=4)
        assert "must answer with the logits of" in str(refusal(call, model, words, [[5, 6, 7]]))
    else:
        check_answers(model, wide, words)
    if name in NO_GRADIENT:
        assert "must be differentiable in eval mode" in str(refusal(saliency, model, ROWS))
        return
    check_saliency(model, wide)
    sentence = check_training(model, wide)
    assert (sentence is None) == (name not in UNTRAINABLE), sentence
