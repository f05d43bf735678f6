"""Examples to token ids, and every token of the user's own text back to its characters.

The user's text is found in the rendered prompt by rendering once more with a placeholder in its
place, never by searching for it, so that a text which repeats the template's words does no harm.
A special-token string inside the user's text ("<|im_end|>") becomes that special token, as it does
in transformers' own `apply_chat_template` and in the servers built on it: the model is scored on
what it would really be given. Such a token belongs to the user's text, and so to the domain.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from leaf_distill.data.example import Example, Rendering, UnusableRow
from leaf_distill.data.template import ChatTemplate, cache_key, remember

THOUGHT = re.compile(r"(<(?:think|thinking|thought|reasoning)>|\[THINK\])(\s*)\Z")
"""The end of a generation prompt that leaves a thought open: its tag, and white space."""

ANCHORS = ("\n", "]", "0")
"""Characters behind which a text does not begin."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    text: str
    tail: str  # what follows the user's text, with the generation prompt
    rendering: Rendering


class Renderer:
    """Renders examples for one model with its tokenizer and chat template.

    Args:
        tokenizer: A fast tokenizer with an end token.
        chat_template: "auto" is the tokenizer's own template, or plain text where it has none;
            "none" is plain text: the contents of the messages joined by an empty line, after the
            tokenizer's own BOS.
        system_prompt: Put before conversations that bring no system message.
        template_kwargs: Variables for the template, such as `enable_thinking`; those of an example
            win over these.

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
    ) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, chat_template, system_prompt, template_kwargs or {})
        self._prompts: dict[str, _Prompt] = {}
        plain = self.template.source is None
        self._prefix_ids = _leading_special_ids(tokenizer) if plain else []
        eos: int | None = tokenizer.eos_token_id
        end_id = eos if plain else self._end_of_turn()
        if end_id is None:
            raise ValueError(
                f"tokenizer: must have an end token, got none in {self.template.name}; set its "
                "eos_token, so that a completion can end."
            )
        self._end_id = end_id
        self.end_ids: tuple[int, ...] = tuple(sorted({end_id, *([] if eos is None else [eos])}))
        self._ends = tuple(tokenizer.convert_ids_to_tokens(list(self.end_ids)))
        self._anchors = [(anchor, self._ids(anchor)) for anchor in ANCHORS]
        split = [*self._ids("]"), *self._ids("The")]
        self._marks_beginnings = not plain and self._ids("]The") != split

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all that decides a rendering; a template's date of today is part of it."""
        template = self.template
        parts = [
            tokenizer_fingerprint(self.tokenizer),
            template.sources,
            template.system_prompt,
            template.variables,
            template.probe,
            self._prefix_ids,
            self.end_ids,
        ]
        return hashlib.sha256(cache_key(*parts).encode()).hexdigest()

    def prompt(self, example: Example) -> Rendering:
        """Render up to where the model's answer begins.

        Keys of messages that stand nowhere in the template are noted in the example as
        "message_key_ignored", its template_kwargs as "template_variable_ignored".

        Raises:
            UnusableRow: The template refuses the conversation or changes the user's text; the last
                message is not the user's; or the text has been through a template already.
        """
        self._note_ignored(example)
        return self._prompt(example).rendering

    def render(self, example: Example) -> Rendering:
        """Render the prompt, then the completion's tokens and the end token as labels.

        The completion is tokenized where it stands, behind the prompt. An end token that it brings
        along is dropped (note "end_token_stripped"). Where the generation prompt opens a thought:

        - a completion that opens it again loses its own tag (note "think_tag_stripped");
        - one that closes it goes on from there, as it is;
        - any other is put as the template puts an answer without a thought, which mostly means
          after an empty one (note "thought_closed"). The closing tag is then part of the labels,
          because the model must write it to leave the thought. A template that has no such form
          would have the model answer inside its thought: the row is refused.

        A `reply` with keys that the template reads is what the template makes of it. It is used
        only while its content is the example's completion.

        Raises:
            UnusableRow: As for `prompt`; or the completion is empty; or the template's own form of
                it does not go on from the generation prompt.
        """
        self._note_ignored(example)
        prompt = self._prompt(example)
        text = self._completion(example, prompt)
        if not text.strip():
            raise UnusableRow("empty_completion", "The completion is empty.")
        labels = np.asarray([*self._completion_ids(prompt, text), self._end_id], dtype=np.int32)
        behind = np.ones(len(labels), dtype=np.bool_)
        head = prompt.rendering
        return Rendering(
            input_ids=np.concatenate([head.input_ids, labels]),
            loss_mask=np.concatenate([head.loss_mask, behind]),
            offsets=np.concatenate([head.offsets, np.full((len(labels), 2), -1, np.int32)]),
            prunable=np.concatenate([head.prunable, ~behind]),
        )

    def _prompt(self, example: Example) -> _Prompt:
        key = cache_key(example.messages, example.template_kwargs)
        if key in self._prompts:
            return self._prompts[key]
        if not example.messages or example.messages[-1]["role"] != "user":
            raise UnusableRow("no_user_turn", "The last message must be the user's turn.")
        self.template.check_raw(example.user_text)
        text = self.template.apply(example.messages, example.template_kwargs)
        start, stop, shift = self.template.find_user_text(example, text)
        encoding = self._encode(text)
        ids = encoding.ids
        prefix = [] if ids[: len(self._prefix_ids)] == self._prefix_ids else self._prefix_ids
        offsets = np.full((len(prefix) + len(ids), 2), -1, dtype=np.int32)
        offsets[len(prefix) :] = _user_offsets(encoding.offsets, start, stop, shift)
        # How many characters before each one are no white space.
        solid = np.cumsum([0, *(not character.isspace() for character in example.user_text)])
        rendering = Rendering(
            input_ids=np.asarray([*prefix, *ids], dtype=np.int32),
            loss_mask=np.zeros(len(offsets), dtype=np.bool_),
            offsets=offsets,
            prunable=(offsets[:, 0] >= 0) & (solid[offsets[:, 1]] > solid[offsets[:, 0]]),
        )
        return remember(self._prompts, key, _Prompt(text, text[stop:], rendering))

    def _completion(self, example: Example, prompt: _Prompt) -> str:
        """Return what the model is to write after the prompt, up to its end token."""
        text = self._without_end(example)
        reply = example.reply or {}
        read = (reply.keys() - {"role", "content"}) & self.template.named
        if read and reply["content"] == example.completion:
            turn = {**reply, "content": text}
            written = self.template.reply_after(prompt.text, example, turn, self._ends)
            if written is None:
                raise UnusableRow(
                    "not_renderable",
                    f"With {sorted(read)} the chat template of {self.template.name} writes a reply "
                    "that does not go on from its generation prompt; change the row or "
                    "template_kwargs.",
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
            said = next(n for n in range(len(space), -1, -1) if rest.startswith(space[:n]))
            return rest[said:]
        if f"{tag[0]}/{tag[1:]}" in text:
            return text
        turn = {"role": "assistant", "content": text}
        written = self.template.reply_after(prompt.text, example, turn, self._ends)
        if written is None:
            raise UnusableRow(
                "open_thought",
                f"The generation prompt of {self.template.name} opens a thought with {tag}, the "
                "completion has none; give completions with their thought, or template_kwargs or "
                "a template that leave it closed.",
            )
        _note(example, "thought_closed")
        return written

    def _without_end(self, example: Example) -> str:
        text = example.completion
        while (bare := text.rstrip()).endswith(self._ends):
            text = bare.removesuffix(next(end for end in self._ends if bare.endswith(end)))
            _note(example, "end_token_stripped")
        return text

    def _completion_ids(self, prompt: _Prompt, text: str) -> list[int]:
        """Tokenize a completion where it stands.

        Alone, it would begin with the mark of a space under tokenizers of the SentencePiece family.
        Where its first characters would melt into the prompt's last token, which the model is
        given, it is tokenized behind an anchor, and at last alone.
        """
        contexts = [(prompt.text, prompt.rendering.input_ids.tolist()), *self._anchors]
        for context, ids in contexts if self._marks_beginnings else ():
            whole = self._ids(context + text)
            if whole[: len(ids)] == ids:
                return whole[len(ids) :]
        return self._ids(text)

    def _encode(self, text: str) -> Encoding:
        """Tokenize without special tokens; a call of the tokenizer does the same at twice the time.

        That call, too, takes away the padding and the truncation that an earlier one has left.
        """
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation is not None:
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
        special = _special_ids(self.tokenizer)
        for token in self._ids(self.template.reply_tail):
            if token in special:
                return int(token)
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


def template_differences(teacher: Renderer, student: Renderer) -> list[str]:
    """Say in sentences what the two models are told differently around the same user's text."""
    theirs, ours = teacher.template, student.template
    both = {"teacher": theirs, "student": ours}
    sentences = []
    if (theirs.source is None) != (ours.source is None):
        chat, plain = ("student", "teacher") if theirs.source is None else ("teacher", "student")
        sentences.append(f"The {chat} gets a chat template, the {plain} plain text.")
    elif theirs.source != ours.source:
        sentences.append("The teacher's and the student's chat templates are different.")
    if theirs.system_prompt != ours.system_prompt:
        sentences.append(
            f"The teacher's system prompt is {theirs.system_prompt!r}, the student's "
            f"{ours.system_prompt!r}."
        )
    for who, one in both.items():
        if unread := sorted(one.variables.keys() - one.named):
            sentences.append(f"The chat template of the {who} does not read {', '.join(unread)}.")
    dated = [who for who, one in both.items() if "strftime_now" in one.named]
    if dated:
        sentences.append(
            f"The chat template of the {' and the '.join(dated)} writes the date of the day: "
            "a run continued on another day starts over."
        )
    if theirs.probe != ours.probe:
        sentences.append(
            f"The same question reads {_short(theirs.probe)} to the teacher and "
            f"{_short(ours.probe)} to the student."
        )
    return sentences


def _user_offsets(
    spans: list[tuple[int, int]], start: int, stop: int, shift: int
) -> NDArray[np.int32]:
    """Characters of the user's text, for tokens wholly inside [start, stop); -1 elsewhere.

    A token that begins after the last character so far takes the characters in between: tokenizers
    leave them out when they trim spaces from their offsets or drop them altogether.
    """
    flat = np.fromiter(chain.from_iterable(spans), dtype=np.int32, count=2 * len(spans))
    first, last = flat[0::2], flat[1::2]
    reached = np.empty_like(last)  # the last character before each token
    reached[:1], reached[1:] = start, last[:-1]
    begin = np.minimum(first, np.maximum.accumulate(reached))
    inside = (first >= start) & (last <= stop) & (begin < last)
    offsets = np.full((len(spans), 2), -1, dtype=np.int32)
    offsets[inside, 0] = begin[inside] + (shift - start)
    offsets[inside, 1] = last[inside] + (shift - start)
    return offsets


def _note(example: Example, code: str) -> None:
    if code not in example.notes:
        example.notes.append(code)


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(index for index, token in added if token.special)}


def _leading_special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before plain text: its BOS, or nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for count in range(len(full) - len(bare) + 1):
        if full[count : count + len(bare)] == bare:
            return list(full[:count])
    return []


def _short(text: str) -> str:
    return repr(text if len(text) <= 240 else f"{text[:160]}...{text[-60:]}")
