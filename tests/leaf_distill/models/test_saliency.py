"""Saliencies against a plain loop in float64, and what a call leaves behind in the model."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from architectures import CAUSAL, SIZES, VOCABULARY, build
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from leaf_distill.data.example import Rendering
from leaf_distill.models.saliency import saliency, token_nll


def rendering(prompt: int, labels: int, seed: int = 0, avoid: int | None = None) -> Rendering:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 1, (prompt + labels,), generator=generator)
    if avoid is not None:
        ids[ids == avoid] = 3
    mask = np.arange(prompt + labels) >= prompt
    offsets = np.where(mask[:, None], -1, np.arange(prompt + labels)[:, None] + [[0, 1]])
    return Rendering(ids.numpy().astype(np.int32), mask, offsets.astype(np.int32), ~mask)


ROWS = [rendering(5, 1, 1), rendering(12, 7, 2), rendering(3, 14, 3), rendering(20, 4, 4)]


def plain_loop(model: PreTrainedModel, row: Rendering) -> tuple[float, np.ndarray]:
    """The definition, one row at a time, in float64, with the model's own full logits."""
    exact = copy.deepcopy(model).double().eval()
    embeddings = exact.get_input_embeddings()(torch.from_numpy(row.input_ids[None])).detach()
    embeddings.requires_grad_(True)
    # CTRL scales in place what it is given.
    logits = exact(inputs_embeds=embeddings * 1, use_cache=False).logits[0]
    chances = torch.log_softmax(logits, -1)
    labels = row.loss_mask.nonzero()[0].tolist()
    loss = -torch.stack([chances[at - 1, int(row.input_ids[at])] for at in labels]).mean()
    (gradient,) = torch.autograd.grad(loss, embeddings)
    return loss.item(), gradient[0].norm(dim=-1).numpy()


@pytest.mark.parametrize("name", CAUSAL)
def test_equals_a_plain_loop_in_float64(name: str) -> None:
    model = build(name)
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        nll, norms = plain_loop(model, row)
        assert result.nll == pytest.approx(nll, rel=1e-5)
        assert result.norms.dtype == np.float32
        np.testing.assert_allclose(result.norms, norms, rtol=1e-4, atol=2e-6 * norms.max())
        assert not result.invalid


@pytest.mark.parametrize("name", CAUSAL)
def test_padding_changes_no_more_than_rounding(name: str) -> None:
    model = build(name)
    likelihoods = token_nll(model, ROWS)
    for row, result, nll in zip(ROWS, saliency(model, ROWS), likelihoods, strict=True):
        (alone,) = saliency(model, [row])
        assert result.nll == pytest.approx(alone.nll, rel=5e-6)
        scale = alone.norms.max()
        np.testing.assert_allclose(result.norms, alone.norms, rtol=5e-6, atol=5e-7 * scale)
        np.testing.assert_allclose(nll, token_nll(model, [row])[0], rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["xlnet", "cpmant"])
def test_an_embedding_that_is_not_one_vector_a_token_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model: must call its input embedding once, with one"):
        saliency(build(name), ROWS)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_likelihood_of_every_token_equals_float64(name: str) -> None:
    model = build(name)
    exact = copy.deepcopy(model).double()
    for row, nll in zip(ROWS, token_nll(model, ROWS), strict=True):
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            chances = exact(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = -chances.gather(1, ids[1:, None])[:, 0].numpy()
        assert nll.dtype == np.float32 and nll.shape == (len(row),) and nll[0] == 0.0
        np.testing.assert_allclose(nll[1:], expected, rtol=1e-5, atol=1e-5)


def test_the_mean_over_the_labels_is_the_loss() -> None:
    model = build()
    for row, nll, result in zip(ROWS, token_nll(model, ROWS), saliency(model, ROWS), strict=True):
        assert nll[row.loss_mask].mean() == pytest.approx(result.nll, rel=1e-5)


def test_likelihoods_never_hold_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leaf_distill.models.saliency._LOGITS_A_PRODUCT", 7 * VOCABULARY)
    model, seen = build(), []
    expected = token_nll(model, ROWS)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    for nll, before in zip(token_nll(model, ROWS), expected, strict=True):
        np.testing.assert_array_equal(nll, before)
    assert len(seen) > 9 and max(seen) == 7 * VOCABULARY


def test_a_row_of_one_token_has_a_likelihood_of_zero() -> None:
    one = rendering(1, 0)
    assert token_nll(build(), [one])[0].tolist() == [0.0]
    assert [len(nll) for nll in token_nll(build(), [one, ROWS[0], one])] == [1, 6, 1]


class _Cropped(LlamaForCausalLM):
    """Makes logits for a part of its head's rows only, and its config does not tell."""

    def forward(self, *args: object, **kwargs: object) -> object:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits[..., :40]
        return output


def test_what_a_model_does_to_its_logits_counts() -> None:
    torch.manual_seed(0)
    model = _Cropped(LlamaConfig(**SIZES))
    low = [Rendering(row.input_ids % 40, *vars_of(row)) for row in ROWS]
    for row, nll in zip(low, token_nll(model, low), strict=True):
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            chances = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        assert chances.shape[-1] == 40
        np.testing.assert_allclose(nll[1:], -chances.gather(1, ids[1:, None])[:, 0], rtol=1e-5)
    row = low[0]
    row.input_ids[-1] = 45
    for run in (saliency, token_nll):
        with pytest.raises(ValueError, match="renderings: must hold token ids below 40"):
            run(model, [row])


def vars_of(row: Rendering) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return row.loss_mask, row.offsets, row.prunable


@pytest.mark.parametrize("run", [saliency, token_nll])
def test_a_label_without_a_logit_is_named(run: object) -> None:
    model = build("padded head")  # 64 embeddings, 50 logits
    bad = rendering(5, 3)
    bad.input_ids[6] = 55
    with pytest.raises(ValueError, match=r"renderings\[1\]: must hold token ids below 50, the num"):
        run(model, [ROWS[0], bad])


def test_a_token_of_the_prompt_needs_no_logit() -> None:
    row = rendering(5, 3)
    row.input_ids[2] = 55
    assert not saliency(build("padded head"), [row])[0].invalid


@pytest.mark.parametrize("run", [saliency, token_nll])
def test_a_token_outside_the_embedding_is_named(run: object) -> None:
    bad = rendering(5, 3)
    bad.input_ids[2] = VOCABULARY
    with pytest.raises(ValueError, match=r"renderings\[1\]: must hold token ids below 50.*got 50"):
        run(build(), [ROWS[0], bad])


def test_a_batch_beyond_the_memory_runs_in_parts(caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    expected, likelihoods = saliency(model, ROWS), token_nll(model, ROWS)

    def allocate(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        torch.empty((1 << 50) if len(args[0]) > 1 else 1)  # more than any machine has

    model.get_input_embeddings().register_forward_pre_hook(allocate)
    for result, before in zip(saliency(model, ROWS), expected, strict=True):
        np.testing.assert_allclose(result.norms, before.norms, rtol=5e-6)
    for nll, before in zip(token_nll(model, ROWS), likelihoods, strict=True):
        np.testing.assert_allclose(nll, before, rtol=5e-6)
    assert len(caplog.records) == 6 and "a batch of 4 rows" in caplog.records[0].getMessage()


def test_only_what_predicts_the_labels_reaches_the_head() -> None:
    model, seen = build(), []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    saliency(model, ROWS)
    assert seen == [(1, sum(int(row.loss_mask.sum()) for row in ROWS), VOCABULARY)]


def test_positions_after_the_last_prediction_have_no_gradient() -> None:
    (result,) = saliency(build(), [ROWS[1]])
    assert result.norms[-1] == 0.0
    assert (result.norms[:-1] > 0).all()


@pytest.mark.parametrize("where", ["token", "padding"])
def test_nan_marks_only_its_own_row(where: str) -> None:
    bad = 7
    rows = [rendering(6, 3, 5, avoid=bad), rendering(15, 4, 6, avoid=bad)]
    model = build()
    expected = saliency(model, rows)
    spoiled = copy.deepcopy(rows[0])
    spoiled.input_ids[2] = bad
    with torch.no_grad():
        model.get_input_embeddings().weight[bad if where == "token" else 0] = torch.nan
    results = saliency(model, [rows[0], spoiled, rows[1]])
    assert [result.invalid for result in results] == [False, where == "token", False]
    for result, before in zip(results[::2], expected, strict=True):
        np.testing.assert_allclose(result.norms, before.norms, rtol=5e-6)


def test_the_model_is_left_as_it_was() -> None:
    model = build().train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    flags = [weight.requires_grad for weight in model.parameters()]
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        saliency(model, ROWS)
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    model = build().train()

    def fail(module: torch.nn.Module, args: object, output: object) -> None:
        raise RuntimeError("out of memory")

    model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        saliency(model, ROWS)
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_dropout_is_off_and_frozen_weights_make_no_difference() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"attention_dropout": 0.5}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    first, second = saliency(model, ROWS), saliency(model.requires_grad_(False), ROWS)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.norms, other.norms)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 0.15), (torch.float16, 0.02), (torch.float64, 1e-5)],
)
def test_other_precisions(dtype: torch.dtype, tolerance: float) -> None:
    model = build()
    exact = saliency(model, ROWS)
    for row, reference in zip(saliency(model.to(dtype), ROWS), exact, strict=True):
        assert not row.invalid and row.norms.dtype == np.float32
        scale = reference.norms.max()
        np.testing.assert_allclose(row.norms, reference.norms, atol=tolerance * scale)
        assert row.norms.argmax() == reference.norms.argmax()


def test_float16_keeps_gradients_below_its_smallest_number() -> None:
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
        model.get_input_embeddings().weight.mul_(1e3)
    exact = saliency(model, ROWS)
    for row, reference in zip(saliency(model.half(), ROWS), exact, strict=True):
        assert 0 < reference.norms.max() < 1e-4
        np.testing.assert_allclose(row.norms, reference.norms, atol=0.02 * reference.norms.max())


def row_loss(model: PreTrainedModel, row: Rendering, embeddings: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(inputs_embeds=embeddings[None], use_cache=False).logits[0, :-1]
    picked = -logits.log_softmax(-1).gather(1, torch.from_numpy(row.input_ids[1:, None]).long())
    return float(picked[torch.from_numpy(row.loss_mask[1:]), 0].mean())


@pytest.mark.parametrize("name", ["gpt2", "biased"])  # smooth, and in float64 throughout
def test_equals_finite_differences_in_float64(name: str) -> None:
    model = build(name).double()
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        with torch.no_grad():
            vectors = model.get_input_embeddings()(torch.from_numpy(row.input_ids).long())

        def slope(
            at: int,
            direction: torch.Tensor,
            row: Rendering = row,
            vectors: torch.Tensor = vectors,
        ) -> float:
            """The derivative of fourth order along one direction at one token."""
            losses = []
            for factor in (-2, -1, 1, 2):
                moved = vectors.clone()
                moved[at] += factor * 2e-3 * direction
                losses.append(row_loss(model, row, moved))
            return (losses[0] - 8 * losses[1] + 8 * losses[2] - losses[3]) / (12 * 2e-3)

        for at in (0, len(row) // 2, len(row) - 2):
            axes = torch.eye(vectors.shape[1], dtype=torch.float64)
            gradient = torch.tensor([slope(at, axis) for axis in axes], dtype=torch.float64)
            assert result.norms[at] == pytest.approx(float(gradient.norm()), rel=1e-6)
            # Along the gradient the loss grows by its norm, in any other direction by less.
            along = gradient / gradient.norm()
            assert slope(at, along) == pytest.approx(float(result.norms[at]), rel=1e-6)
            for _ in range(3):
                random = torch.nn.functional.normalize(torch.randn_like(gradient), dim=0)
                expected = float(gradient @ random)
                assert slope(at, random) == pytest.approx(expected, rel=1e-5, abs=1e-9)
                assert abs(slope(at, random)) < result.norms[at]
        assert result.norms[-1] == 0.0  # nothing follows the last token


def test_float64_is_kept_up_to_the_result() -> None:
    model = build("gpt2").double()
    for row, result in zip(ROWS, saliency(model, ROWS), strict=True):
        nll, norms = plain_loop(model, row)
        assert result.nll == pytest.approx(nll, rel=1e-14)
        np.testing.assert_array_equal(result.norms, norms.astype(np.float32))


def test_a_row_without_labels_is_named() -> None:
    with pytest.raises(ValueError, match=r"renderings\[1\]: must have a label"):
        saliency(build(), [ROWS[0], rendering(4, 0)])


def test_no_rows_no_results() -> None:
    assert saliency(build(), []) == [] == token_nll(build(), [])


def test_a_row_that_ends_with_the_pad_token_brings_no_advice_to_mask_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build("gpt2")
    model.config.pad_token_id = int(ROWS[0].input_ids[-1])
    ids = torch.from_numpy(ROWS[0].input_ids[None]).long()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    try:
        for call, advised in (
            (lambda: saliency(model, ROWS[:1]), False),
            (lambda: token_nll(model, ROWS[:1]), False),
            (lambda: model(ids), True),
        ):
            transformers_logging.warning_once.cache_clear()
            call()
            assert ("attention_mask" in caplog.text) == advised
    finally:
        logger.removeHandler(caplog.handler)
