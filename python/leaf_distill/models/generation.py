"""Greedy answers, one batch at a time, and the plan of the batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass(frozen=True)
class Answer:
    """What a model answered."""

    text: str
    finished: bool  # False: cut off by the length limit, or invalid
    n_tokens: int  # without the end token
    invalid: bool  # the model's logits were NaN or infinite


def plan_batches(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Group positions into batches of like length, longest first.

    A batch holds at most ``max_tokens`` tokens, padding included; a longer row stands alone. The
    longest come first so that a batch too large for the memory fails at once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, not {max_tokens}.")
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
    """Answer prompts (token ids) greedily, as one left-padded batch, in eval mode.

    An answer ends at any of `end_ids` (the Renderer's that made the prompts) or of the model's own
    end tokens. Prompts whose answer might outgrow the model's positions run one by one, with what
    room there is. Raises ValueError for an empty prompt or one that leaves no room.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        if not prompt or (limit and len(prompt) >= limit):
            raise ValueError(
                f"prompts[{index}] has {len(prompt)} tokens; it must have at least 1 and leave "
                f"room for an answer in the model's {limit} positions."
            )
    rooms = [min(max_new_tokens, (limit or len(p) + max_new_tokens) - len(p)) for p in prompts]
    whole = [i for i, room in enumerate(rooms) if room == max_new_tokens]
    groups = [whole] if whole else []
    groups += [[i] for i, room in enumerate(rooms) if room < max_new_tokens]
    ends = sorted({*end_ids, *_own_end_ids(model)})
    answers: dict[int, Answer] = {}
    was_training, settings = model.training, model.generation_config
    model.train(False)
    try:
        for group in groups:
            batch = [prompts[i] for i in group]
            answers.update(
                zip(group, _batch(model, tokenizer, batch, rooms[group[0]], ends), strict=True)
            )
    finally:
        model.train(was_training)
        model.generation_config = settings
    return [answers[i] for i in range(len(prompts))]


def _batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int],
) -> list[Answer]:
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else max(ends, default=0)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    watch = _Watch(len(prompts), width, ends)
    # A fresh config in the model's place: its own may sample, penalize repetition or forbid tokens,
    # and transformers fills every setting that the call leaves open from there.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
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
    invalid = watch.invalid.tolist()
    return [
        _answer(tokenizer, tokens, ends, bad)
        for tokens, bad in zip(output[:, width:].tolist(), invalid, strict=True)
    ]


class _Watch(LogitsProcessor):
    """Ends the rows whose logits are not numbers, and remembers which they were."""

    def __init__(self, rows: int, width: int, ends: Sequence[int]) -> None:
        self.width = width
        self.ends = torch.tensor(ends, dtype=torch.long)
        self.invalid = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        # -inf on some tokens is a mask, as padded vocabularies have it; on all tokens it is not.
        highest = scores.amax(-1)
        bad = ~highest.isfinite()  # amax propagates NaN
        if not bad.any():
            return scores
        ends = self.ends.to(scores.device)
        running = ~torch.isin(input_ids[:, self.width :], ends).any(-1)
        self.invalid |= (bad & running).cpu()
        safe = torch.full_like(scores, -torch.inf)
        safe[:, ends if len(ends) else 0] = 0.0
        return torch.where(bad[:, None], safe, scores)


def _answer(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: Sequence[int], invalid: bool
) -> Answer:
    stop = next((i for i, token in enumerate(tokens) if token in ends), None)
    own = tokens if stop is None else tokens[:stop]
    text = tokenizer.decode(own, skip_special_tokens=True)
    return Answer(str(text), stop is not None and not invalid, len(own), invalid)


def _own_end_ids(model: PreTrainedModel) -> list[int]:
    """The end tokens that the model's configuration names."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    named = configured if isinstance(configured, list) else [configured]
    return [end for end in named if end is not None]
