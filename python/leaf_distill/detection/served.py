"""Answers of a model behind a server; each is in the row cache as soon as it comes.

What a request holds decides its answer: it, and the content of the model that the role names, are
the key in the cache. So another address or another time asks for nothing that is known, and an
answer of a server never stands for one that was computed here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from leaf_distill.config import AnswerOptions
from leaf_distill.data.example import Answer, Example
from leaf_distill.detection.cache import RowCache, numbered, store_missing
from leaf_distill.io import digest
from leaf_distill.models.protocol import Request
from leaf_distill.models.server import Server

if TYPE_CHECKING:
    from leaf_distill.detection.answers import Decoding, PromptedModel

VERSION = 1
"""Raised with a change of the requests that changes what they mean."""


def served_answers(
    asked: PromptedModel,
    server: Server,
    examples: Sequence[Example],
    config: AnswerOptions,
    cache: RowCache,
    decoding: Decoding,
) -> list[Answer]:
    """Return a server's answer to each example, from the cache where it is known.

    Args:
        asked: the model; its weights are not loaded.
        server: where it answers.
        examples: rows or candidates.
        config, cache, decoding: as of `answer`.

    Raises:
        ServerError: the server gives no answers.
    """
    requests = [make_request(asked, server, one, config, decoding) for one in examples]
    keys = [digest(["served", VERSION, asked.model.fingerprint, *one]) for one in requests]
    if decoding.temperature > 0:
        keys = numbered([digest([key, decoding.seed]) for key in keys])
        for one, key in zip(requests, keys, strict=True):
            one.body["seed"] = int(key[:8], 16) >> 1  # all servers take 31 bits

    def ask(missing: Sequence[int], proven: bool) -> Iterator[tuple[int, bytes]]:
        answers = server.answers([requests[at] for at in missing], proven=proven)
        with closing(answers):
            for at, one in answers:
                parts = [one.text, one.n_tokens, one.verdict, one.detail]
                yield missing[at], json.dumps(parts).encode()

    values = store_missing(
        cache,
        keys,
        ask,
        description=f"{asked.role} answers",
        # A server that is started with another context, or another template, may answer.
        keep=lambda value: json.loads(value)[2] in (None, "cut_off"),
    )
    return [Answer(*json.loads(value)) for value in values]


def make_request(
    asked: PromptedModel,
    server: Server,
    example: Example,
    config: AnswerOptions,
    decoding: Decoding,
) -> Request:
    """Return the request for one answer.

    Messages are sent as they are, and the server applies its own chat template. A prompt of plain
    text, and one that the model is to continue, is rendered here and sent as text.
    """
    body: dict[str, Any] = {"model": server.model}
    template = asked.renderer.template
    example = example.as_read_by(asked.role)
    variables = {**template.variables, **example.template_kwargs}
    as_text = template.source is None or bool(example.prefix)
    if as_text:
        body["prompt"] = _without_start(asked, asked.renderer.text(example))
    else:
        body["messages"] = list(example.messages)
        if template.system_prompt is not None and example.messages[0]["role"] != "system":
            body["messages"].insert(0, {"role": "system", "content": template.system_prompt})
        if tools := variables.pop("tools", None):
            body["tools"] = tools
        if variables:
            body["chat_template_kwargs"] = variables
    body |= {"max_tokens": config.max_new_tokens, "temperature": decoding.temperature}
    if decoding.temperature > 0:
        body["top_p"] = decoding.top_p
    if decoding.stop:
        body["stop"] = list(decoding.stop)
    body = json.loads(json.dumps(body, default=str))  # a date in a template's variables
    return Request("completions" if as_text else "chat/completions", body)


def _without_start(asked: PromptedModel, text: str) -> str:
    """Drop the start token that a template has written, and every server puts before a text."""
    tokenizer: Any = asked.renderer.tokenizer
    start: str = tokenizer.bos_token or ""
    if not start or not text.startswith(start):
        return text
    encoded: Mapping[str, list[int]] = tokenizer("a")
    adds = encoded["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(start) if adds else text
