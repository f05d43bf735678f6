"""Greedy answers, one batch at a time, and the plan of the batches."""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch

from leaf_distill.data.example import Answer
from leaf_distill.models.checks import check_ids, embedding_rows, eval_mode, max_positions
from leaf_distill.models.memory import with_smaller_batches

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_warned: Final[weakref.WeakSet[Any]] = weakref.WeakSet()


def plan_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group positions into batches of like length, longest first.

    A batch holds at most ``max_tokens`` tokens, padding included; a longer row stands alone. The
    longest come first so that a batch too large for the memory fails at once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be at least 1, got {max_tokens}")
    batches: list[list[int]] = []
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * width <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            width = lengths[index]
    return batches


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[Answer]:
    """Answer prompts greedily, as one left-padded batch, in eval mode.

    Prompts whose answer might outgrow the model's positions are answered apart from the others,
    with what room there is; this is logged once for a model. A batch too large for the memory runs
    in halves.

    Args:
        prompts: the token ids of each prompt.
        end_ids: an answer ends at any of these (the Renderer's that made the prompts) or of the
            model's own end tokens.
        max_new_tokens: the longest answer, with its end token.

    Returns:
        One answer for each prompt, with the verdict None, "cut_off" or "not_finite".

    Raises:
        ValueError: a prompt is empty, leaves no room, or has a token that the model does not know.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    limit = max_positions(model.config)
    for index, prompt in enumerate(prompts):
        if not len(prompt) or (limit and len(prompt) >= limit):
            raise ValueError(
                f"prompts[{index}]: must have at least 1 token and leave room for an answer in "
                f"the model's {limit} positions, got {len(prompt)} tokens"
            )
    check_ids(model, prompts, "prompts")
    groups: dict[int, list[int]] = defaultdict(list)  # by the room for an answer
    for index, prompt in enumerate(prompts):
        groups[min(max_new_tokens, (limit or len(prompt) + max_new_tokens) - len(prompt))].append(
            index
        )
    _warn_of_little_room(model, groups, max_new_tokens, limit)
    ends = sorted({*end_ids, *_own_end_ids(model)})
    answers: dict[int, Answer] = {}
    with eval_mode(model), _own_settings_aside(model):
        for room, group in sorted(groups.items(), reverse=True):

            def answer(rows: Sequence[int], room: int = room) -> list[Answer]:
                return _batch(model, tokenizer, [prompts[i] for i in rows], room, ends)

            answers.update(zip(group, with_smaller_batches(group, answer), strict=True))
    return [answers[i] for i in range(len(prompts))]


def padding_id(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int] = ()
) -> int:
    """Return a token id for padding that the model's embedding and the tokenizer both have."""
    rows = min(embedding_rows(model), len(tokenizer))
    wanted = (tokenizer.pad_token_id, *sorted(ends, reverse=True))
    return next((i for i in wanted if i is not None and 0 <= i < rows), 0)


def _warn_of_little_room(
    model: PreTrainedModel,
    groups: dict[int, list[int]],
    max_new_tokens: int,
    limit: int | None,
) -> None:
    count = sum(len(group) for room, group in groups.items() if room < max_new_tokens)
    if not count or model in _warned:
        return
    _warned.add(model)
    logger.warning(
        "%d of %d prompts leave room for only %d to %d new tokens in the %s positions of %s, and "
        "are answered apart from the others, which is slow; lower max_new_tokens (%d) or "
        "max_length to avoid this (logged once; later batches may have more of them)",
        count,
        sum(map(len, groups.values())),
        min(groups),
        max(room for room in groups if room < max_new_tokens),
        limit,
        type(model).__name__,
        max_new_tokens,
    )


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Put a fresh generation config in the place of the model's own.

    That may sample, penalize repetition or forbid tokens, and transformers fills every setting
    that a call leaves open from there. An adapter's wrapper hands its own to the model inside.
    """
    from transformers import GenerationConfig

    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = [
        (one, one.generation_config) for one in {id(m): m for m in (model, inside)}.values()
    ]
    try:
        for one, _ in settings:
            one.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
        yield
    finally:
        for one, own in settings:
            one.generation_config = own


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
) -> list[Answer]:
    from transformers import GenerationConfig, LogitsProcessorList

    width = max(len(prompt) for prompt in prompts)
    pad = padding_id(model, tokenizer, ends)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    watch = _Watch(len(prompts), width, ends)
    engine: Any = model  # its generate() is untyped
    output = engine.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=pad,
        ),
        logits_processor=LogitsProcessorList([watch]),
    )
    return [
        _answer(tokenizer, tokens, ends, not_finite)
        for tokens, not_finite in zip(
            output[:, width:].tolist(), watch.not_finite.tolist(), strict=True
        )
    ]


class _Watch:
    """Ends the rows whose logits are not numbers, and remembers which they were."""

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


def _answer(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: Sequence[int], not_finite: bool
) -> Answer:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    own = tokens if stop is None else tokens[:stop]
    text = tokenizer.decode(own, skip_special_tokens=True)
    verdict = "not_finite" if not_finite else "cut_off" if stop is None else None
    return Answer(str(text), len(own), verdict)


def _own_end_ids(model: PreTrainedModel) -> list[int]:
    """The end tokens that the model's configuration names."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return [end for end in named if end is not None]
