"""Divergences of answers against whole sequences in float64, and the reuse of prefixes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf
from architectures import CAUSAL, SIZES, VOCABULARY, build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from leaf_distill.data.example import Ids, Rendering
from leaf_distill.models.intervention import answer_kl, answer_nll, behind
from leaf_distill.models.prefix import can_reuse
from leaf_distill.models.saliency import completion_nll, saliency

OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "gemma2 window": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, head_dim=8, sliding_window=6)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6)
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
        )
    ),
}
REUSING = ("llama", "tied", "headless", "scaled", "biased", "gpt2", "qwen2", "bloom", "opt")
WHOLE = ("softcap", "gemma2 window", "gemma3", "mamba")


def make(name: str) -> PreTrainedModel:
    """A random model whose answer depends on every token of its prompt."""
    torch.manual_seed(0)
    model = build(name) if name in CAUSAL else OTHERS[name]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


def row(prompt: int = 20, labels: int = 6, seed: int = 0) -> Rendering:
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, prompt + labels).astype(np.int32)
    mask = np.arange(prompt + labels) >= prompt
    return Rendering(ids, mask, np.full((len(ids), 2), -1, np.int32), ~mask)


def changes(rendering: Rendering) -> list[Ids]:
    """Replacements all over the prompt, deletions, insertions, and the prompt itself."""
    prompt = rendering.input_ids[~rendering.loss_mask]
    changed = []
    for at in (0, 3, 3, 9, 10, len(prompt) - 1):
        other = prompt.copy()
        other[at] = 3 + (other[at] + len(changed)) % (VOCABULARY - 4)
        changed.append(other)
    changed += [np.delete(prompt, slice(4, 9)), np.delete(prompt, slice(11, 13)), prompt[:-3]]
    return [*changed, np.insert(prompt, 7, [5, 6, 7]), prompt.copy(), prompt[:1]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2 window", "mamba"])
def test_the_loss_behind_a_changed_prompt_is_that_of_the_whole_row(name: str) -> None:
    model, rendering = make(name), row()
    changed = changes(rendering)
    found = answer_nll(model, rendering, changed, max_tokens=100)
    whole = [completion_nll(model, [behind(ids, rendering)])[0] for ids in changed]
    np.testing.assert_allclose(found, whole, rtol=1e-5)
    assert found.dtype == np.float32 and len(answer_nll(model, rendering, [])) == 0
    with pytest.raises(ValueError, match="must have at least 1 token"):
        answer_nll(model, rendering, [np.array([], np.int32)])


def naive(model: PreTrainedModel, rendering: Rendering, prompt: Ids) -> float:
    """The definition: two whole sequences in float64, no batch and no cache."""
    exact = copy.deepcopy(model).double().eval()
    labels = rendering.input_ids[rendering.loss_mask]
    both = []
    for ids in (rendering.input_ids[~rendering.loss_mask], prompt):
        whole = torch.from_numpy(np.concatenate([ids, labels])).long()[None]
        with torch.no_grad():
            logits = exact(input_ids=whole, use_cache=False).logits[0]
        both.append(logits[len(ids) - 1 : -1].log_softmax(-1))
    p, q = both
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_equals_whole_sequences_in_float64(name: str) -> None:
    model, rendering = make(name), row()
    prompts = changes(rendering)
    expected = [naive(model, rendering, prompt) for prompt in prompts]
    for max_tokens in (1, 80, 10_000):
        found = answer_kl(model, rendering, prompts, max_tokens=max_tokens)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    # Changes that a window hides, or that nothing attends to, move nothing.
    assert found[-2] == 0 and (found >= 0).all() and (found > 0).sum() > 6 and found.max() > 1e-4


@pytest.mark.parametrize("name", [*REUSING, *WHOLE])
def test_a_prefix_is_computed_once_where_the_cache_can_be_cut(name: str) -> None:
    model, rendering = make(name), row()
    assert can_reuse(model) == (name in REUSING)
    prompt = rendering.input_ids[~rendering.loss_mask]
    late = [prompt.copy() for _ in range(3)]
    for index, ids in enumerate(late):
        ids[15] = 3 + index
    seen: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(tuple(args[0].shape))
    )
    answer_kl(model, rendering, late)
    assert seen == [(1, 26), (3, 11 if name in REUSING else 26)]


def test_a_batch_holds_no_more_tokens_than_it_may() -> None:
    model, rendering = build(), row()
    seen: list[int] = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: seen.append(args[0].numel())
    )
    answer_kl(model, rendering, [*changes(rendering)] * 3, max_tokens=60)
    assert len(seen) > 8 and max(seen) <= 60


class _Forgetful(LlamaForCausalLM):
    """Ignores the cache that it is given, as a model with a fault of its own might."""

    def forward(self, *args: object, **kwargs: object) -> object:
        given = kwargs.keys() & {"cache", "past_key_values"}  # the older name
        return super().forward(*args, **kwargs | dict.fromkeys(given))


def test_a_model_that_is_wrong_behind_a_cache_runs_whole_sequences() -> None:
    torch.manual_seed(0)
    model = _Forgetful(LlamaConfig(**SIZES)).eval()
    assert not can_reuse(model)
    rendering = row()
    prompts = changes(rendering)
    expected = [naive(model, rendering, prompt) for prompt in prompts]
    np.testing.assert_allclose(answer_kl(model, rendering, prompts), expected, atol=1e-6)


def test_bfloat16_is_near_to_float32() -> None:
    model, rendering = build(), row()
    prompts = changes(rendering)
    expected = answer_kl(model, rendering, prompts)
    model.bfloat16()
    found = answer_kl(model, rendering, prompts)
    np.testing.assert_allclose(found, expected, rtol=0.3, atol=0.02 * expected.max())


def test_a_batch_beyond_the_memory_runs_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    model, rendering = build(), row()
    prompts = changes(rendering)
    expected = answer_kl(model, rendering, prompts)

    def allocate(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        torch.empty((1 << 50) if len(args[0]) > 1 else 1)  # more than any machine has

    model.model.embed_tokens.register_forward_pre_hook(allocate)
    np.testing.assert_allclose(answer_kl(model, rendering, prompts), expected, rtol=1e-4, atol=1e-6)
    assert "runs in two halves" in caplog.text


def test_the_mode_and_the_flags_of_the_model_stay() -> None:
    model = build().train()
    answer_kl(model, row(), changes(row()))
    assert model.training and all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"changed": [np.zeros(0, np.int32)]}, r"changed\[0\]: must have at least 1 token"),
        ({"changed": [np.array([VOCABULARY])]}, "must hold token ids below 50"),
        ({"rendering": row(labels=0)}, "must have a prompt and a label behind it, got 0 labels"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
    ],
)
def test_arguments_without_a_meaning_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"rendering": row(), "changed": [np.array([5])], "max_tokens": 9, **change}
    rendering, changed = arguments.pop("rendering"), arguments.pop("changed")
    with pytest.raises(ValueError, match=message):
        answer_kl(build(), rendering, changed, **arguments)  # type: ignore[arg-type]


def test_no_change_costs_no_pass() -> None:
    model, rendering = build(), row()
    model.register_forward_hook(lambda *_: pytest.fail("a pass"))
    assert answer_kl(model, rendering, []).shape == (0,)
    assert answer_kl(model, rendering, [rendering.input_ids[:20]]).tolist() == [0.0]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_likelihood_of_the_completion_is_the_loss_of_the_saliency(name: str) -> None:
    model, rows = build(name), [row(5, 3, 1), row(20, 4, 2), row(7, 9, 3)]
    expected = [one.nll for one in saliency(model, rows)]
    np.testing.assert_allclose(completion_nll(model, rows), expected, rtol=1e-6)
    assert completion_nll(model, []) == []
    with pytest.raises(ValueError, match="must have a label after its first token"):
        completion_nll(model, [row(labels=0)])
