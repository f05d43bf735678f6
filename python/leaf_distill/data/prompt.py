"""Messages to token ids, and every token of the user's own text back to its characters.

The user's text is found in the rendered prompt by rendering once more with a placeholder in its
place, never by searching for it, so that a text which repeats the template's words does no harm.
A special-token string inside the user's text ("<|im_end|>") becomes that special token, as it does
in transformers' own ``apply_chat_template`` and in the servers built on it: the model is scored on
what it would really be given. Such a token belongs to the user's text, and so to the domain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from leaf_distill.data.dataset import Message

NOWHERE = (-1, -1)
PROBE: tuple[Message, ...] = ({"role": "user", "content": "What is 2 + 2?"},)


@dataclass(frozen=True)
class Rendering:
    """A tokenized prompt, with or without its completion; all lists are of one length.

    ``offsets`` are characters ``[start, stop)`` of the user's text on domain tokens and (-1, -1)
    elsewhere. Consecutive domain tokens leave no hole: characters that a tokenizer drops from its
    offsets, such as a trimmed space, belong to the following token. Tokens that are the bytes of
    one character share it.
    """

    input_ids: list[int]
    label_mask: list[bool]  # completion tokens and the end token, at their own positions
    domain: list[bool]  # tokens wholly inside the last user turn's content
    prunable: list[bool]  # the domain less tokens of whitespace only
    offsets: list[tuple[int, int]]


class Renderer:
    """Renders messages for one model with its tokenizer and chat template.

    ``chat_template``: "auto" is the tokenizer's own, or plain text where it has none; "none" is
    plain text, that is the contents of the messages joined by an empty line, after the tokenizer's
    own BOS. ``system_prompt`` is put before conversations that bring no system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str = "auto",
        system_prompt: str | None = None,
    ) -> None:
        if chat_template not in ("auto", "none"):
            raise ValueError(f"chat_template must be 'auto' or 'none', not {chat_template!r}.")
        self.tokenizer = tokenizer
        self.name: str = tokenizer.name_or_path or type(tokenizer).__name__
        self.system_prompt = system_prompt
        self.template = _template(tokenizer) if chat_template == "auto" else None
        self._prefix_ids = [] if self.template else _leading_special_ids(tokenizer)
        end_id = self._end_id()
        if end_id is None:
            raise ValueError(
                f"The tokenizer of {self.name} has no end token: set its eos_token, so that a "
                "completion can end."
            )
        self._end_id_of_turn = end_id
        self.end_ids: tuple[int, ...] = tuple(
            sorted({end_id, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        )

    @property
    def fingerprint(self) -> str:
        """The sha256 of all that decides a rendering; a template's date of today is part of it."""
        parts = [
            tokenizer_fingerprint(self.tokenizer),
            self.template,
            self.system_prompt,
            self._text(PROBE),
            self._prefix_ids,
            self.end_ids,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def prompt(self, messages: Sequence[Message]) -> Rendering:
        """Render up to where the model's answer begins; the last message must be the user's."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("The last message must be the user's turn.")
        text = self._text(messages)
        start, stop, shift = self._find_user_text(messages, text)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        raw: list[tuple[int, int]] = encoding["offset_mapping"]
        content = messages[-1]["content"]
        offsets = [NOWHERE] * len(self._prefix_ids)
        for span in _inside(raw, start, stop):
            offsets.append(
                span if span == NOWHERE else (span[0] - start + shift, span[1] - start + shift)
            )
        return Rendering(
            input_ids=[*self._prefix_ids, *encoding["input_ids"]],
            label_mask=[False] * len(offsets),
            domain=[span != NOWHERE for span in offsets],
            prunable=[span != NOWHERE and not content[slice(*span)].isspace() for span in offsets],
            offsets=offsets,
        )

    def render(self, messages: Sequence[Message], completion: str) -> Rendering:
        """Render the prompt, then the completion's own tokens and the end token as labels."""
        prompt = self.prompt(messages)
        answer = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        labels = [*answer, self._end_id_of_turn]
        return Rendering(
            input_ids=prompt.input_ids + labels,
            label_mask=prompt.label_mask + [True] * len(labels),
            domain=prompt.domain + [False] * len(labels),
            prunable=prompt.prunable + [False] * len(labels),
            offsets=prompt.offsets + [NOWHERE] * len(labels),
        )

    def _text(self, messages: Sequence[Message], *, reply: bool = False) -> str:
        """The conversation as one string, ready for the reply (or ending with one)."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        if self.template is None:
            return "\n\n".join(turn["content"] for turn in turns)
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=not reply,
            )
        except TemplateError as error:
            raise ValueError(
                f"The chat template of {self.name} refuses the conversation with roles "
                f"{[turn['role'] for turn in turns]}: {error}. Change the row or system_prompt, "
                "or use chat_template='none'."
            ) from error
        return str(text)

    def _find_user_text(self, messages: Sequence[Message], text: str) -> tuple[int, int, int]:
        """Where the user's text stands in the rendered one: start, stop, characters stripped."""
        content = messages[-1]["content"]
        placeholder = "USERTEXT"
        while placeholder in text:
            placeholder += "X"
        blank = self._text([*messages[:-1], {"role": "user", "content": placeholder}])
        before, _, after = blank.partition(placeholder)
        stop = len(text) - len(after)
        kept = text[len(before) : stop]
        # A template that writes the text twice, or not at all, has no such frame around it.
        if text == before + kept + after:
            left = len(content) - len(content.lstrip())
            strips = {content.strip(): left, content.lstrip(): left, content.rstrip(): 0}
            shift = {**strips, content: 0}.get(kept)
            if shift is not None:
                return len(before), stop, shift
        raise ValueError(
            f"The chat template of {self.name} changes the user's text beyond stripping it, so its "
            "characters cannot be told apart from the template's: use chat_template='none', or a "
            f"template that writes the text once, as it is. The text begins {content[:40]!r}."
        )

    def _end_id(self) -> int | None:
        """The token that ends a reply: the first special one after it in the template, else EOS."""
        eos: int | None = self.tokenizer.eos_token_id
        if self.template is None:
            return eos
        reply: Message = {"role": "assistant", "content": "REPLY"}
        after = self._text([*PROBE, reply], reply=True).rpartition("REPLY")[2]
        special = _special_ids(self.tokenizer)
        for token in self.tokenizer(after, add_special_tokens=False)["input_ids"]:
            if token in special:
                return int(token)
            if str(self.tokenizer.decode([token])).strip():
                break
        return eos


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the sha256 of a fast tokenizer's rules, vocabulary and special tokens."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules.pop("padding", None)  # these two change with every call that pads or truncates
    rules.pop("truncation", None)
    content = [rules, {key: str(value) for key, value in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def template_differences(teacher: Renderer, student: Renderer) -> list[str]:
    """Say in sentences what the two models are told differently around the same user's text."""
    sentences = []
    if (teacher.template is None) != (student.template is None):
        chat, plain = ("student", "teacher") if teacher.template is None else ("teacher", "student")
        sentences.append(f"The {chat} gets a chat template, the {plain} plain text.")
    elif teacher.template != student.template:
        sentences.append("The teacher's and the student's chat templates are different.")
    if teacher.system_prompt != student.system_prompt:
        sentences.append(
            f"The teacher's system prompt is {teacher.system_prompt!r}, the student's "
            f"{student.system_prompt!r}."
        )
    dated = [who for who, one in (("teacher", teacher), ("student", student)) if _dated(one)]
    if dated:
        sentences.append(
            f"The chat template of the {' and the '.join(dated)} writes the date of the day: "
            "a run continued on another day starts over."
        )
    texts = [one._text(PROBE) for one in (teacher, student)]
    if texts[0] != texts[1]:
        sentences.append(
            f"The same question reads {_short(texts[0])} to the teacher and {_short(texts[1])} to "
            "the student."
        )
    return sentences


def _inside(raw: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Keep the tokens wholly inside [start, stop), without holes between them; NOWHERE elsewhere.

    A token that begins after the last character so far takes the characters in between: tokenizers
    leave them out when they trim spaces from their offsets or drop them altogether.
    """
    reached = start
    spans = []
    for first, last in raw:
        inside = start <= first and last <= stop
        span = (min(first, reached), last)
        spans.append(span if inside and span[0] < last else NOWHERE)
        reached = max(reached, last)
    return spans


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template; the one called "default" where it has several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


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


def _dated(renderer: Renderer) -> bool:
    return renderer.template is not None and "strftime_now" in renderer.template


def _short(text: str) -> str:
    return repr(text if len(text) <= 240 else f"{text[:160]}...{text[-60:]}")
