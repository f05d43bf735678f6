"""The top k of a teacher behind a server, from the log-probabilities that it gives a prompt.

This is vLLM's protocol: a request for a completion takes token ids and `prompt_logprobs`, k. The
reply has an entry for each token, None for the first, with the log-probabilities of the k likeliest
tokens at its place by id, and that of the token itself, whether or not it is one of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Mapping
from contextlib import closing
from itertools import chain
from typing import Any, Final

import numpy as np
import torch

from leaf_distill.data.example import Rendering
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.protocol import Request
from leaf_distill.models.server import Refusal, Server, ServerError
from leaf_distill.training.cache_columns import Columns, stored_columns
from leaf_distill.training.config import CacheConfig

LEAST: Final = -9999.0
"""A log-probability of -inf, as vLLM writes it into JSON."""
ROUNDING: Final = 1e-3
"""How far the sum of a server's probabilities may be above 1."""
LIMIT: Final = re.compile(r"logprobs of \d+.*max")
"""vLLM refuses a k above its --max-logprobs with these words."""
FULL: Final = re.compile(r"max_tokens.* got 0\b")
"""vLLM refuses a prompt that fills its context with these words: the one token has no room."""


def served_columns(
    server: Server, rows: Mapping[bytes, Rendering], top_k: int, vocab_size: int
) -> Generator[tuple[bytes, Columns], None, None]:
    """Yield the keys of rows and their top k, in the order in which the server gives them.

    Args:
        server: the teacher's.
        rows: as the teacher reads them, by key; the longest are sent first.
        top_k, vocab_size: how many probabilities of a token, over how many tokens.

    Raises:
        ValueError: a row is too long for the server, or k too large.
        ServerError: it is away for too long, or gives something else.
    """
    ordered = sorted(rows.items(), key=lambda row: -len(row[1]))

    def read(body: Any, at: int) -> Columns:
        try:
            return _read(body, ordered[at][1], top_k, vocab_size)
        except _Unusable as error:
            raise ServerError(server.sentence(error.wanted, error.got)) from None

    requests = (_request(server, row, top_k) for _, row in ordered)
    with closing(server.replies(requests, len(ordered), read)) as replies:
        for at, found in replies:
            if isinstance(found, Refusal):
                raise _refused(server, found, len(ordered[at][1]), top_k)
            yield ordered[at][0], found


def served_vocabulary(config: CacheConfig, teacher: LazyModel) -> tuple[int, int]:
    """Return how many tokens the teacher knows, and how many of them the student makes logits for.

    No weights are read, so both numbers are those of the configurations.
    """
    student = LazyModel(
        config.student, trust_remote_code=config.trust_remote_code, argument="student"
    )
    theirs, ours = (int(one.config.get_text_config().vocab_size) for one in (teacher, student))
    return theirs, min(theirs, ours)


def _request(server: Server, row: Rendering, top_k: int) -> Request:
    return Request(
        "completions",
        {
            "model": server.model,
            "prompt": row.input_ids.tolist(),
            "max_tokens": 1,  # vLLM takes no fewer
            "temperature": 1,
            "prompt_logprobs": top_k,
        },
    )


def _refused(server: Server, refusal: Refusal, tokens: int, top_k: int) -> Exception:
    if refusal.verdict == "too_long" or FULL.search(refusal.detail):
        return ValueError(
            f"max_length: must be below the context of the server at {server.url}, got a row of "
            f"{tokens} tokens ({refusal.detail}); give a smaller --max_length"
        )
    if LIMIT.search(refusal.detail):
        return ValueError(
            f"top_k: must be at most what the server at {server.url} allows, got {top_k} "
            f"({refusal.detail}); give a smaller --top_k, or start vLLM with --max-logprobs {top_k}"
        )
    return ServerError(server.sentence("prompt log-probabilities", refusal.detail))


class _Unusable(Exception):
    """A reply that is not as it has to be; the parts of a sentence."""

    def __init__(self, wanted: str, got: str) -> None:
        super().__init__(wanted, got)
        self.wanted, self.got = wanted, got


def _read(body: Any, row: Rendering, top_k: int, vocab_size: int) -> Columns:
    """Return what a reply says about the label tokens of a row, as a cache stores it."""
    try:
        entries = body["choices"][0]["prompt_logprobs"]
    except (KeyError, IndexError, TypeError):
        entries = None
    if not isinstance(entries, list):
        raise _Unusable(
            "prompt_logprobs, as vLLM does", "a reply without; llama.cpp and others have none"
        )
    if len(entries) != len(row):
        raise _Unusable(f"log-probabilities of all {len(row)} tokens", f"{len(entries)} entries")
    top = [
        _largest(entries[at], int(row.input_ids[at]), int(at), top_k, vocab_size)
        for at in np.flatnonzero(row.loss_mask[1:]) + 1
    ]
    ids = torch.tensor([token for token, _ in chain(*top)]).view(-1, top_k)
    logprobs = torch.tensor([value for _, value in chain(*top)], dtype=torch.float64)
    logprobs = logprobs.view(-1, top_k)
    rest = (1 - logprobs.exp().sum(-1)).clamp(min=0)
    if top_k == vocab_size:  # not even rounding is left for others
        rest.zero_()
    return stored_columns(ids, logprobs, rest.log())


def _largest(
    entry: Any, token: int, at: int, top_k: int, vocab_size: int
) -> list[tuple[int, float]]:
    """Return the k likeliest tokens of an entry and their log-probabilities, largest first."""
    place = f"token {at} of a prompt"
    try:
        found = {int(name): float(value["logprob"]) for name, value in entry.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise _Unusable(
            f"the log-probabilities of {place} by token id", f"{entry!r:.100}"
        ) from None
    if token not in found:
        raise _Unusable(
            f"the log-probability of {token}, {place}", f"those of {sorted(found)[:5]}, ..."
        )
    if len(found) < top_k:
        raise _Unusable(f"{top_k} log-probabilities of a token", f"{len(found)} for {place}")
    largest = sorted(found.items(), key=lambda pair: -pair[1])[:top_k]
    wrong = [value for value in found.values() if not value <= ROUNDING]  # NaN is among them
    wrong += [value for _, value in largest if value <= LEAST]
    if wrong:
        raise _Unusable("finite log-probabilities, at most 0", f"{wrong[0]} for {place}")
    outside = [name for name, _ in largest if not 0 <= name < vocab_size]
    if outside:
        raise _Unusable(
            f"ids below {vocab_size}, of tokens that the student has", f"{outside[0]} for {place}"
        )
    total = sum(math.exp(value) for _, value in largest)
    if total > 1 + ROUNDING:
        raise _Unusable("probabilities of a sum of at most 1", f"{total:.4g} for {place}")
    return largest
