"""Renders examples to token ids, and maps each token of the analyzed text to its characters.

The analyzed text is that of some user turns, or at the response level the response's prefix. User
turns are found in the rendered prompt by a second rendering with placeholders, never by a search,
so that a text which repeats the template's words does no harm. A special-token string in the user's
text ("<|im_end|>") becomes that special token, as in `apply_chat_template` and in the
servers built on it. Such a token belongs to the user's text, and so to the domain.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from leaf_distill.data.example import Example, Mask, Range, Rendering, UnusableRow
from leaf_distill.data.offsets import solid_tokens, text_offsets
from leaf_distill.data.template import ChatTemplate, cache_key, remember
from leaf_distill.data.turns import earlier_turns, turn_tokens

THOUGHT = re.compile(r"(<(?:think|thinking|thought|reasoning)>|\[THINK\])(\s*)\Z")
"""The end of a generation prompt that leaves a thought open: its tag, and white space."""

ANCHORS = ("\n", "]", "0")
"""Contexts in which a completion is tokenized where it would melt into the prompt's last token."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    text: str
    tail: str  # what follows the last user turn, with the generation prompt
    rendering: Rendering
    rest: str = ""  # of a response whose prefix is in the text: what follows it


class Written(NamedTuple):
    """A rendered example as texts, in this order.

    Attributes:
        start: The names of the tokens before plain text; mostly none.
        prompt: The text of the template, up to the start of the model's answer.
        prefix: The response's prefix, at the response level.
        completion: What the model must write.
        spans: The characters of each of its tokens, as the tokenizer gives them.
        end: The name of the end token.
    """

    start: str
    prompt: str
    prefix: str
    completion: str
    spans: list[Range]
    end: str


class Renderer:
    """Renders examples for one model with its tokenizer and chat template.

    Args:
        tokenizer: A fast tokenizer with an end token.
        chat_template: "auto" is the tokenizer's template, or plain text if it has none;
            "none" is plain text: the contents of the messages joined by an empty line, after the
            tokenizer's BOS.
        system_prompt: Put before conversations that bring no system message.
        template_kwargs: Variables for the template, such as `enable_thinking`; those of an example
            win over these.
        train_on: Which assistant turns of an original are labels: its completion ("last"), or all
            of them, each with its end token. Of a counterfactual it is always the completion.

    Raises:
        ValueError: An argument is malformed, the tokenizer has no end token, or the template
            refuses a short question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
        system_prompt: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        train_on: Literal["last", "all"] = "last",
    ) -> None:
        self.tokenizer, self.train_on = tokenizer, train_on
        self.template = ChatTemplate(tokenizer, chat_template, system_prompt, template_kwargs or {})
        self._prompts: dict[str, _Prompt] = {}
        plain = self.template.source is None
        self._prefix_ids = _leading_special_ids(tokenizer) if plain else []
        eos: int | None = tokenizer.eos_token_id
        end_id = eos if plain else self._end_of_turn()
        if end_id is None:
            raise ValueError(
                f"tokenizer: must have an end token, got none in {self.template.name}; set its "
                "eos_token, so that a completion can end"
            )
        self._end_id = end_id
        self.end_ids: tuple[int, ...] = tuple(sorted({end_id, end_id if eos is None else eos}))
        self._ends = tuple(tokenizer.convert_ids_to_tokens(list(self.end_ids)))
        self._anchors = [(anchor, self._ids(anchor)) for anchor in ANCHORS]
        split = [*self._ids("]"), *self._ids("The")]
        self._marks_beginnings = not plain and self._ids("]The") != split

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all that decides a rendering; a template's date of today is part of it."""
        one = self.template
        chat = (one.sources, one.system_prompt, one.variables, one.probe)
        parts = (tokenizer_fingerprint(self.tokenizer), *chat, self._prefix_ids, self.end_ids)
        every = ("all",) if self.train_on == "all" else ()
        return hashlib.sha256(cache_key(*parts, *every).encode()).hexdigest()

    def prompt(self, example: Example) -> Rendering:
        """Render the prompt, up to the start of the model's answer or the end of its prefix.

        Keys of messages that stand nowhere in the template are noted in the example as
        "message_key_ignored", its template_kwargs as "template_variable_ignored".

        Args:
            example: An example whose last message is the user's.

        Returns:
            The rendering of T tokens, none of them a label.

        Raises:
            UnusableRow: The template refuses the conversation or changes the user's text; the last
                message is not the user's; or the text has been through a template already.
        """
        self._note_ignored(example)
        prompt = self._prompt(example)
        return (self._with_prefix(example, prompt) if example.prefix else prompt).rendering

    def text(self, example: Example) -> str:
        """Return what `prompt` renders as one text, without the start token of plain text.

        Raises:
            UnusableRow: As for `prompt`.
        """
        prompt = self._prompt(example)
        return (self._with_prefix(example, prompt) if example.prefix else prompt).text

    def render(self, example: Example) -> Rendering:
        """Render the prompt, then the completion's tokens and the end token as labels.

        The completion is tokenized behind the prompt and the response's prefix. Its end token is
        dropped where it has one (note "end_token_stripped"). If the generation prompt opens a
        thought:

        - a completion that opens it again loses its tag (note "think_tag_stripped");
        - a completion that closes it is not changed;
        - any other is written as the template writes an answer without a thought, mostly after an
          empty one (note "thought_closed"). The labels then begin with the closing tag, which the
          model must write to leave the thought. The row is refused if the template cannot do so.

        A `reply` with keys that the template reads is rendered by the template, as long as its
        content is the example's completion.

        With `train_on` "all" the texts of an original's earlier assistant turns are labels too;
        tool calls and thoughts that the template writes beside them are not.

        Args:
            example: An example with a completion.

        Returns:
            The rendering of T tokens, prompt and labels.

        Raises:
            UnusableRow: As for `prompt`; or the completion is empty; or the template's form of it
                does not go on from the generation prompt; or an earlier turn that is to be a label
                does not stand in the prompt as it is.
        """
        self._note_ignored(example)
        prompt, text = self._both(example)
        if not text.strip():
            raise UnusableRow("empty_completion", "the completion is empty")
        ids, _ = self._tokens_behind(prompt, text)
        labels = np.asarray([*ids, self._end_id], dtype=np.int32)
        behind = np.ones(len(labels), dtype=np.bool_)
        head, earlier = prompt.rendering, prompt.rendering.loss_mask
        if self.train_on == "all" and example.branch == "original":
            earlier = self._earlier_labels(example, prompt)
        return Rendering(
            input_ids=np.concatenate([head.input_ids, labels]),
            loss_mask=np.concatenate([earlier, behind]),
            offsets=np.concatenate([head.offsets, np.full((len(labels), 2), -1, np.int32)]),
            prunable=np.concatenate([head.prunable, ~behind]),
        )

    def written(self, example: Example) -> Written:
        """Return the texts of what `render` makes tokens of.

        Raises:
            UnusableRow: As for `render`.
        """
        whole = self._prompt(example).text
        prompt, text = self._both(example)
        start = "".join(self.tokenizer.convert_ids_to_tokens(self._prefix_ids))
        _, spans = self._tokens_behind(prompt, text)
        return Written(
            start="" if whole.startswith(start) else start,
            prompt=whole,
            prefix=prompt.text[len(whole) :],
            completion=text,
            spans=spans,
            end=str(self.tokenizer.convert_ids_to_tokens(self._end_id)),
        )

    def _both(self, example: Example) -> tuple[_Prompt, str]:
        """Return the prompt, with the response's prefix behind it, and the completion's text."""
        prompt = self._prompt(example)
        if example.prefix:
            prompt = self._with_prefix(example, prompt)
            return prompt, prompt.rest
        return prompt, self._completion(example, prompt)

    def _prompt(self, example: Example) -> _Prompt:
        key = cache_key(example.messages, example.places, example.template_kwargs)
        if key in self._prompts:
            return self._prompts[key]
        if not example.messages or example.messages[-1]["role"] != "user":
            raise UnusableRow("no_user_turn", "the last message must be the user's turn")
        self.template.check_raw(example.messages[-1]["content"])
        text = self.template.apply(example.messages, example.template_kwargs)
        turns = replace(example, segment=0, prefix="") if example.segment else example
        places = self.template.find_texts(turns, text)
        encoding = self._encode(text)
        ids = encoding.ids
        prefix = [] if ids[: len(self._prefix_ids)] == self._prefix_ids else self._prefix_ids
        offsets = np.full((len(prefix) + len(ids), 2), -1, dtype=np.int32)
        if not example.segment:
            for place, (first, _) in zip(places, example.parts, strict=True):
                found = text_offsets(encoding.offsets, place.start, place.stop, place.shift, text)
                inside = found[:, 0] >= 0
                offsets[len(prefix) :][inside] = found[inside] + first
        rendering = Rendering(
            input_ids=np.asarray([*prefix, *ids], dtype=np.int32),
            loss_mask=np.zeros(len(offsets), dtype=np.bool_),
            offsets=offsets,
            prunable=solid_tokens(offsets, turns.text),
        )
        return remember(self._prompts, key, _Prompt(text, text[places[-1].stop :], rendering))

    def _earlier_labels(self, example: Example, prompt: _Prompt) -> Mask:
        """bool [T] over the prompt: the tokens of earlier assistant turns and their ends."""
        none = prompt.rendering.loss_mask
        turns = earlier_turns(example.messages)
        if not turns:
            return none
        try:
            turned = replace(example, turns=turns, segment=0)
            places = self.template.find_texts(turned, prompt.text)
        except UnusableRow as problem:
            raise UnusableRow(
                "not_renderable",
                f"the chat template of {self.template.name} changes an earlier assistant turn, "
                "which can then be no label; use train_on last, or another template",
            ) from problem
        encoding = self._encode(prompt.text)
        tokens = turn_tokens(places, prompt.text, encoding.ids, encoding.offsets, self.end_ids)
        return np.concatenate([none[: len(none) - len(tokens)], tokens])

    def _with_prefix(self, example: Example, prompt: _Prompt) -> _Prompt:
        """Return the prompt with the response's prefix behind it, whose tokens are the domain."""
        whole = replace(example, completion=example.prefix + example.completion, reply=None)
        rest = self._without_end(example)
        written = self._completion(whole, prompt)
        head = written.removesuffix(rest)
        # The template may write something in front of the response, or strip what opens a thought.
        if not (
            written.endswith(rest)
            and (head.endswith(example.prefix) or example.prefix.endswith(head))
        ):
            raise UnusableRow(
                "not_renderable",
                f"the chat template of {self.template.name} changes the response's beginning "
                f"{example.prefix[:40]!r}, so that it cannot be analyzed",
            )
        shift = len(example.prefix) - len(head)
        ids, spans = self._tokens_behind(prompt, head)
        offsets = text_offsets(spans, max(-shift, 0), len(head), max(shift, 0), head)
        first = prompt.rendering
        rendering = Rendering(
            input_ids=np.concatenate([first.input_ids, np.asarray(ids, dtype=np.int32)]),
            loss_mask=np.zeros(len(first) + len(ids), dtype=np.bool_),
            offsets=np.concatenate([first.offsets, offsets]),
            prunable=np.concatenate([first.prunable, solid_tokens(offsets, example.prefix)]),
        )
        return _Prompt(prompt.text + head, "", rendering, rest)

    def _completion(self, example: Example, prompt: _Prompt) -> str:
        """Return the text that the model must write after the prompt, up to its end token."""
        text = self._without_end(example)
        reply = example.reply or {}
        read = (reply.keys() - {"role", "content"}) & self.template.named
        if read and reply["content"] == example.completion:
            turn = {**reply, "content": text}
            written = self.template.reply_after(prompt.text, example, turn, self._ends)
            if written is None:
                raise UnusableRow(
                    "not_renderable",
                    f"with {sorted(read)} the chat template of {self.template.name} writes a reply "
                    "that does not go on from its generation prompt; change the row or "
                    "template_kwargs",
                )
            return written
        opened = THOUGHT.search(prompt.tail) if self.template.source else None
        return self._in_thought(example, prompt, text, *opened.groups()) if opened else text

    def _in_thought(
        self, example: Example, prompt: _Prompt, text: str, tag: str, space: str
    ) -> str:
        """Return a completion as it goes on from an open thought."""
        if text.lstrip().startswith(tag):
            _note(example, "think_tag_stripped")
            rest = text.lstrip().removeprefix(tag)
            kept = next(n for n in range(len(space), -1, -1) if rest.startswith(space[:n]))
            return rest[kept:]
        if f"{tag[0]}/{tag[1:]}" in text:
            return text
        turn = {"role": "assistant", "content": text}
        written = self.template.reply_after(prompt.text, example, turn, self._ends)
        if written is None:
            raise UnusableRow(
                "open_thought",
                f"the generation prompt of {self.template.name} opens a thought with {tag}, the "
                "completion has none; give completions with their thought, or template_kwargs or "
                "a template that leave it closed",
            )
        _note(example, "thought_closed")
        return written

    def _without_end(self, example: Example) -> str:
        text = example.completion
        while (bare := text.rstrip()).endswith(self._ends):
            text = bare.removesuffix(next(end for end in self._ends if bare.endswith(end)))
            _note(example, "end_token_stripped")
        return text

    def _tokens_behind(self, prompt: _Prompt, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize a text behind a prompt; return its ids and their characters in it.

        Alone, it would begin with the mark of a space under tokenizers of the SentencePiece family.
        If its first characters would melt into the prompt's last token, which the model is given,
        it is tokenized behind an anchor, or else alone.
        """
        contexts = [(prompt.text, prompt.rendering.input_ids.tolist()), *self._anchors]
        for context, ids in contexts if self._marks_beginnings else ():
            both = self._encode(context + text)
            if both.ids[: len(ids)] == ids:
                shift = len(context)
                spans = [(max(a - shift, 0), b - shift) for a, b in both.offsets[len(ids) :]]
                return both.ids[len(ids) :], spans
        alone = self._encode(text)
        return alone.ids, alone.offsets

    def _encode(self, text: str) -> Encoding:
        """Tokenize without special tokens, in half of the time that the tokenizer's call takes."""
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:  # left by an earlier call of the tokenizer
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()
        encoding: Encoding = backend.encode(text, add_special_tokens=False)
        return encoding

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._encode(text).ids
        return ids

    def _end_of_turn(self) -> int | None:
        """Return the first special token that the template writes after a reply, else EOS."""
        eos: int | None = self.tokenizer.eos_token_id
        added = self.tokenizer.added_tokens_decoder
        for token in self._ids(self.template.reply_tail):
            if token in self.tokenizer.all_special_ids or (token in added and added[token].special):
                return token
            if str(self.tokenizer.decode([token])).strip():
                break
        return eos

    def _note_ignored(self, example: Example) -> None:
        turns = [*example.messages, example.reply or {}]
        if {key for turn in turns for key in turn} - self.template.named - {"role", "content"}:
            _note(example, "message_key_ignored")
        if example.template_kwargs.keys() - self.template.named:
            _note(example, "template_variable_ignored")


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a fast tokenizer's rules, vocabulary and special tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)  # these two change with every call that pads or truncates
    rules.pop("truncation", None)
    content = [rules, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _note(example: Example, code: str) -> None:
    if code not in example.notes:
        example.notes.append(code)


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before plain text: its BOS, or none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    starts = (n for n in range(len(full)) if full[n : n + len(bare)] == bare)
    return list(full[: next(starts, 0)])
