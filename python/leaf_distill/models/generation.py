"""Greedy or drawn answers to prompts, one batch at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leaf_distill.data.example import Answer
from leaf_distill.models.checks import (
    check_ids,
    eval_mode,
    input_device,
    max_positions,
    pads_in_front,
)
from leaf_distill.models.memory import with_smaller_batches

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Draws:
    """How answers are drawn in place of the greedy ones.

    Attributes:
        temperature: divides the logits; above 0.
        top_p: only the likeliest tokens are drawn that together have this probability.
        seeds: one for each prompt. An answer depends on its own seed, on no other row's.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    draws: Draws | None = None,
) -> list[Answer]:
    """Answer prompts as one left-padded batch, in eval mode.

    Prompts whose answer might outgrow the model's positions are answered apart from the others,
    with fewer new tokens. Prompts of one length are a batch of their own where padding would change
    the model's logits. A batch too large for the memory runs in halves.

    Args:
        model, tokenizer: a causal language model and its tokenizer.
        prompts: the token ids of each prompt.
        end_ids: an answer ends at any of these, which the Renderer of the prompts has, or at the
            model's end tokens.
        max_new_tokens: the longest answer in tokens, with its end token.
        stop: an answer ends before the first of these texts; it is not cut off.
        draws: how to draw the answers; None answers greedily.

    Returns:
        One answer for each prompt, with the verdict None, "cut_off" or "not_finite".

    Raises:
        ValueError: a prompt is empty, leaves no room, or has a token that the model does not know;
            or the model answers otherwise than its forward pass says.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    limit = max_positions(model.config)
    # Prompts by the room for an answer and by length.
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        if not len(prompt) or (limit and len(prompt) >= limit):
            raise ValueError(
                f"prompts[{index}]: must have at least 1 token and leave room for an answer in "
                f"the model's {limit} positions, got {len(prompt)} tokens"
            )
        groups[room_for_answer(len(prompt), limit, max_new_tokens), len(prompt)].append(index)
    check_ids(model, prompts, "prompts")
    ends = sorted({*end_ids, *_end_ids(model)})
    answers: dict[int, Answer] = {}
    with eval_mode(model), _default_settings(model):
        if prompts and pads_in_front(model):
            groups = _merged(groups)
        for (room, _), group in sorted(groups.items(), reverse=True):
            run = partial(
                _batch, model, tokenizer, max_new_tokens=room, ends=ends, stop=stop, draws=draws
            )
            seeds = draws.seeds if draws else [0] * len(prompts)
            found = with_smaller_batches([(prompts[i], seeds[i]) for i in group], run)
            answers.update(zip(group, found, strict=True))
    return [answers[i] for i in range(len(prompts))]


def room_for_answer(prompt: int, limit: int | None, max_new_tokens: int) -> int:
    """Return the most new tokens behind a prompt's, in a model with so many positions."""
    return min(max_new_tokens, limit - prompt) if limit else max_new_tokens


def _merged(groups: Mapping[tuple[int, int], list[int]]) -> dict[tuple[int, int], list[int]]:
    """Return the prompts by room alone, in their order."""
    merged: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (room, _), group in groups.items():
        merged[room, 0] += group
    return {key: sorted(group) for key, group in merged.items()}


@contextmanager
def _default_settings(model: Any) -> Iterator[None]:
    """Replace the model's generation config by a fresh one, and put it back afterwards.

    The model's may sample, penalize repetition or forbid tokens, and transformers fills every
    setting that a call leaves open from it. An adapter's wrapper hands its config to the model
    inside.
    """
    from transformers import GenerationConfig

    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = model.generation_config, inside.generation_config
    try:
        for one in (model, inside):
            one.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        yield
    finally:
        model.generation_config, inside.generation_config = settings


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[Sequence[int], int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    stop: Sequence[str],
    draws: Draws | None,
) -> list[Answer]:
    from transformers import GenerationConfig, LogitsProcessorList

    prompts, seeds = zip(*rows, strict=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    # As in training, a row is padded with one of its tokens, which has an embedding.
    ids = [np.pad(prompt, (width - len(prompt), 0), mode="edge") for prompt in prompts]
    watch = _Watch(len(prompts), width, ends)
    processors: list[Any] = [watch]
    if draws is not None:
        processors.append(_Draw(draws.temperature, draws.top_p, seeds, width, max_new_tokens))
    stops = _Stops(tokenizer, stop, len(prompts), width) if stop else None
    device = input_device(model)
    engine: Any = model  # its generate() is untyped
    output = engine.generate(
        input_ids=torch.from_numpy(np.stack(ids)).long().to(device),
        attention_mask=(torch.arange(width) >= width - lengths[:, None]).long().to(device),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,  # _Draw leaves one token to choose
            eos_token_id=list(ends) or None,
            pad_token_id=0,  # follows an answer's end; every embedding has this row
        ),
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=[stops] if stops else None,
    )
    answers = []
    for row, tokens in enumerate(output[:, width:].tolist()):
        end = next((i for i, token in enumerate(tokens) if token in ends), None)
        stopped = stops.lengths[row] if stops else None
        length = min((one for one in (end, stopped) if one is not None), default=None)
        text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))
        if stopped is not None and stopped == length:
            text = text[: min((at for one in stop if (at := text.find(one)) >= 0), default=None)]
        bad = bool(watch.not_finite[row])
        verdict = "not_finite" if bad else "cut_off" if length is None else None
        answers.append(Answer(text, len(tokens[:length]), verdict))
    return answers


class _Stops:
    """A stopping criterion: the texts of `stop`, with the length at which a row met one."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], rows: int, width: int) -> None:
        from transformers import StopStringCriteria

        self.found = StopStringCriteria(tokenizer, list(stop))
        self.width = width
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        # The answer alone: a text that ends in it must not have begun in the prompt.
        answer = input_ids[:, self.width :]
        found: torch.Tensor = self.found(answer, scores, **kwargs)
        for row, met in enumerate(found.tolist()):
            if met and self.lengths[row] is None:
                self.lengths[row] = answer.shape[1]
        return found


class _Draw:
    """A logits processor that leaves each row the token that its own numbers draw."""

    def __init__(
        self, temperature: float, top_p: float, seeds: Sequence[int], width: int, length: int
    ) -> None:
        self.temperature, self.top_p, self.width = temperature, top_p, width
        numbers = [np.random.default_rng(seed).random(length, dtype=np.float32) for seed in seeds]
        self.numbers = torch.from_numpy(np.stack(numbers))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        number = self.numbers[:, input_ids.shape[1] - self.width, None].to(scores.device)
        shares = torch.softmax(scores.float() / self.temperature, dim=-1)
        shares, tokens = shares.sort(dim=-1, descending=True, stable=True)
        upto = shares.cumsum(-1)
        # The likeliest tokens, up to the first with which they reach top_p.
        kept = ((upto - shares) < self.top_p).sum(-1, keepdim=True)
        drawn = (upto <= number * upto.gather(-1, kept - 1)).sum(-1, keepdim=True)
        token = tokens.gather(-1, torch.minimum(drawn, kept - 1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


class _Watch:
    """A logits processor that ends the rows whose logits are not finite, and records them."""

    def __init__(self, rows: int, width: int, ends: Sequence[int]) -> None:
        self.width = width
        self.ends = torch.tensor(ends, dtype=torch.long)
        self.not_finite = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        # -inf on some tokens is a mask, as padded vocabularies have it; on all tokens it is not.
        highest = scores.amax(-1)
        bad = ~highest.isfinite()  # amax propagates NaN
        if not bad.any():
            return scores
        ends = self.ends[self.ends < scores.shape[-1]].to(scores.device)
        running = ~torch.isin(input_ids[:, self.width :], ends).any(-1)
        self.not_finite |= (bad & running).cpu()
        safe = torch.full_like(scores, -torch.inf)
        safe[:, ends if len(ends) else 0] = 0.0
        return torch.where(bad[:, None], safe, scores)


def _end_ids(model: PreTrainedModel) -> list[int]:
    """Return the end tokens that the model's configuration names."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return [end for end in named if end is not None]
