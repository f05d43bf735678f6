"""Applies a chat template, and finds the user's text in the string that it writes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from leaf_distill.data.example import Example, Message, UnusableRow

PROBE: tuple[Message, ...] = ({"role": "user", "content": "What is 2 + 2?"},)
CACHE = 1024  # entries of each cache: frames of a template, prompts of a Renderer

OPENING = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""Markup with which a template's first turn begins."""

RESERVED = {
    name
    for name in inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if name not in ("self", "tools", "documents", "kwargs")
} | {"messages"}
"""Names that no variable of a template may have."""

T = TypeVar("T")


class Place(NamedTuple):
    """Where a content stands in a rendered conversation.

    Attributes:
        start, stop: characters of the rendered text.
        shift: characters of the content that were stripped in front.
    """

    start: int
    stop: int
    shift: int


class ChatTemplate:
    """The chat template of a tokenizer, or plain text, with a system prompt and variables.

    Attributes:
        source: The template's text, None for plain text; `sources` has those for special cases.
        named: The words in it. A key or variable that is not among them is not read.
        probe: A short question as the template writes it.
        reply_tail: The text that the template writes after a reply.

    Raises:
        ValueError: `chat_template` is neither "auto" nor "none", a variable has the name of an
            argument, or the template refuses a short question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str,
        system_prompt: str | None,
        variables: Mapping[str, Any],
    ) -> None:
        if chat_template not in ("auto", "none"):
            raise ValueError(f"chat_template: must be 'auto' or 'none', got {chat_template!r}")
        if wrong := sorted(RESERVED & variables.keys()):
            raise ValueError(f"template_kwargs: must be variables of a chat template, got {wrong}")
        self.tokenizer = tokenizer
        self.name: str = tokenizer.name_or_path or type(tokenizer).__name__
        self.system_prompt = system_prompt
        self.variables = dict(variables)
        sources = tokenizer.chat_template if chat_template == "auto" else None
        self.sources = sources if isinstance(sources, dict) else {"default": sources}
        self.source: str | None = self.sources.get("default")
        self.named = set(re.findall(r"\w+", " ".join(filter(None, self.sources.values()))))
        self._frames: dict[str, tuple[str, ...] | None] = {}
        try:
            self.probe = self.apply(PROBE, {})
            talk = self.apply([*PROBE, {"role": "assistant", "content": "REPLY"}], {}, reply=True)
        except UnusableRow as problem:
            raise ValueError(f"chat_template: must render a question, got: {problem}") from problem
        self.reply_tail = talk.rpartition("REPLY")[2]
        self._bos, self._opening = _opening(talk, tokenizer.bos_token or "")

    def apply(
        self, messages: Sequence[Message], variables: Mapping[str, Any], *, reply: bool = False
    ) -> str:
        """Return the conversation as one string, ready for the reply, or ending with one."""
        turns = [dict(turn) for turn in messages]
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        if self.source is None:
            return "\n\n".join(turn["content"] for turn in turns)
        variables = {**self.variables, **variables}
        if wrong := sorted(RESERVED & variables.keys()):
            detail = f"chat_template_kwargs: must be variables of a chat template, got {wrong}"
            raise UnusableRow("bad_chat_template_kwargs", detail)
        with_tools = self.sources.get("tool_use") if variables.get("tools") else None
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=with_tools or self.source,
                tokenize=False,
                add_generation_prompt=not reply,
                **variables,
            )
        except Exception as error:  # a template is a program and may fail in any way
            reason = str(error) or type(error).__name__
            raise UnusableRow(
                "not_renderable",
                f"the chat template of {self.name} refuses the conversation with roles "
                f"{[turn['role'] for turn in turns]}: {reason:.300}; change the row or "
                "system_prompt, or use chat_template='none'",
            ) from error
        return str(text)

    def find_texts(self, example: Example, text: str) -> list[Place]:
        """Find the content of each of `example.places` in the rendered conversation.

        The template writes the same frame around them for all rows with the same other messages.
        The frame is asked for once, and again for a row that it does not fit.

        Raises:
            UnusableRow: The template changes a content beyond stripping it.
        """
        blank = self._with_contents(example, [""] * len(example.places))
        key = cache_key(blank, example.places, example.template_kwargs)
        contents = [str(example.messages[place]["content"]) for place in example.places]
        found = _places(self._frames.get(key), text, contents)
        if found is None:
            frame = remember(self._frames, key, self._frame(example, text))
            found = _places(frame, text, contents)
        if found is None:
            raise UnusableRow(
                "not_renderable",
                f"the chat template of {self.name} changes the user's text beyond stripping it, so "
                "its characters cannot be told apart from the template's; use chat_template="
                "'none', or a template that writes the text once, as it is; it begins "
                f"{contents[-1][:40]!r}",
            )
        return found

    @staticmethod
    def _with_contents(example: Example, contents: Sequence[str]) -> list[Message]:
        turns = list(example.messages)
        for place, content in zip(example.places, contents, strict=True):
            turns[place] = {**turns[place], "content": content}
        return turns

    def _frame(self, example: Example, text: str) -> tuple[str, ...] | None:
        """Return the texts around the contents, None if the template repeats or moves one."""
        word = "USERTEXT"
        while word in text:
            word += "X"
        marks = [f"{word}{at}." for at in range(len(example.places))]
        blank = self.apply(self._with_contents(example, marks), example.template_kwargs)
        frame = []
        for mark in marks:
            before, _, blank = blank.partition(mark)
            frame.append(before)
        frame.append(blank)
        return None if any(word in part for part in frame) else tuple(frame)

    def check_raw(self, content: str) -> None:
        """Refuse a text that begins as the template itself begins a conversation."""
        start = content.lstrip().removeprefix(self._bos).lstrip()
        if self.source and self._opening and start.startswith(self._opening):
            raise UnusableRow(
                "already_rendered",
                f"the prompt begins with {self._opening!r}, so it has been through a chat template "
                "already; give the messages themselves, or use chat_template='none'",
            )

    def reply_after(
        self, prompt: str, example: Example, turn: Message, ends: Sequence[str]
    ) -> str | None:
        """Return the text of a reply as the template writes it, without its end.

        None if the conversation with the reply does not begin with `prompt`, the same conversation
        made ready for a reply.
        """
        talk = self.apply([*example.messages, turn], example.template_kwargs, reply=True)
        if not talk.startswith(prompt):
            return None
        written = talk.removeprefix(prompt)
        if written.endswith(self.reply_tail):
            return written.removesuffix(self.reply_tail)
        end = next((end for end in ends if end in written), None)
        return written if end is None else written.rpartition(end)[0]


def template_differences(teacher: ChatTemplate, student: ChatTemplate) -> list[str]:
    """Say in sentences how the prompts of the two models differ around the same user's text."""
    both = {"teacher": teacher, "student": student}
    sentences = []
    if (teacher.source is None) != (student.source is None):
        chat, plain = ("student", "teacher") if teacher.source is None else ("teacher", "student")
        sentences.append(f"The {chat} gets a chat template, the {plain} plain text.")
    elif teacher.source != student.source:
        sentences.append("The teacher's and the student's chat templates are different.")
    if teacher.system_prompt != student.system_prompt:
        sentences.append(
            f"The teacher's system prompt is {teacher.system_prompt!r}, the student's "
            f"{student.system_prompt!r}."
        )
    for who, one in both.items():
        if unread := sorted(one.variables.keys() - one.named):
            sentences.append(f"The chat template of the {who} does not read {', '.join(unread)}.")
    dated = " and the ".join(who for who, one in both.items() if "strftime_now" in one.named)
    if dated:
        sentences.append(
            f"The chat template of the {dated} writes the date of the day: a run continued on "
            "another day starts over."
        )
    if teacher.probe != student.probe:
        sentences.append(
            f"The same question reads {_short(teacher.probe)} to the teacher and "
            f"{_short(student.probe)} to the student."
        )
    return sentences


def cache_key(*parts: object) -> str:
    """Return a text that is the same for equal messages and variables."""
    return repr(parts)


def remember(cache: dict[str, T], key: str, value: T) -> T:
    """Store and return a value; a full cache loses its oldest one."""
    if len(cache) >= CACHE:
        cache.pop(next(iter(cache)))
    cache[key] = value
    return value


def _opening(talk: str, bos: str) -> tuple[str, str]:
    """Return the tokenizer's BOS, and the markup behind it with which a conversation begins.

    The mark of every turn, which some models name as their BOS, does not count as one.
    """
    bos = "" if talk.count(bos) > 1 else bos
    opening = OPENING.match(talk.lstrip().removeprefix(bos).lstrip())
    return bos, opening[0] if opening else ""


def _places(
    frame: tuple[str, ...] | None, text: str, contents: Sequence[str]
) -> list[Place] | None:
    """Return where contents stand in their frame, None unless they stand there as they are."""
    if frame is None or not text.startswith(frame[0]):
        return None
    places, at = [], len(frame[0])
    for number, content in enumerate(contents):
        after, is_last = frame[number + 1], number == len(contents) - 1
        left = len(content) - len(content.lstrip())
        stripped = ((content, 0), (content.rstrip(), 0), (content.lstrip(), left))
        for kept, shift in (*stripped, (content.strip(), left)):
            stop = at + len(kept)
            fits = text[at:] == kept + after if is_last else text.startswith(kept + after, at)
            if fits:
                places.append(Place(at, stop, shift))
                at = stop + len(after)
                break
        else:
            return None
    return places


def _short(text: str) -> str:
    return repr(text if len(text) <= 240 else f"{text[:160]}...{text[-60:]}")
