"""Word problems from templates with planted distractors, and the tokenizer that reads them.

A problem is one addition or subtraction told in a few sentences. A *hint* is a planted sentence
that names a number ("the sticker says 8 ."): `aligned` when the number is the answer, `misaligned`
when it is not. A student that saw mostly aligned hints learns to copy them, which is the confounder
that LeaF is to find; because the sentences are planted, the truth is known to the character.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

Kind = Literal["clean", "aligned", "misaligned", "unseen"]
KINDS: tuple[Kind, ...] = get_args(Kind)

NAMES = ("tom", "anna", "ben", "lucy", "sam", "mia", "max", "nora", "leo", "eva")
OBJECTS = (
    *("apples", "books", "coins", "shells", "stamps"),
    *("pencils", "stones", "cards", "eggs", "nuts"),
)
GAINS = ("finds", "buys", "gets", "collects")
LOSSES = ("loses", "sells", "drops", "breaks")
TIMES = ("", "", "then", "later", "today")

HINTS = ("the sticker says {number} .", "{other} guesses {number} .", "a note shows {number} .")
UNSEEN_HINT = "the tag reads {number} ."  # its words are seen in training, the phrase is not
ASIDES = (
    "the tag is {color} .",
    "{other} reads a book .",
    "it is a {weather} day .",
    "{other} is {age} years old .",
    "the walk takes {age} minutes .",
)
COLORS = ("red", "blue", "green", "yellow")
WEATHERS = ("warm", "cold", "sunny", "rainy")

LARGEST_NUMBER = 40
LARGEST_MISS = 8  # how far from the answer a misaligned hint lies at most

UNKNOWN, PADDING, USER, ASSISTANT, END = "<unk>", "<pad>", "<user>", "<assistant>", "<end>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{{ ' <end>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@dataclass(frozen=True)
class Problem:
    """A word problem; `planted` holds the characters [start, stop) of each hint in `prompt`."""

    prompt: str
    completion: str
    answer: str
    kind: Kind
    planted: tuple[tuple[int, int], ...]

    def as_row(self) -> dict[str, object]:
        """Return a row of a dataset; the loop reads prompt, completion and answer."""
        return asdict(self)


def make_problem(rng: random.Random, kind: Kind, *, aside_rate: float = 0.5) -> Problem:
    """Draw one problem; `aside_rate` is the chance of a harmless extra sentence."""
    name, other = rng.sample(NAMES, 2)
    objects = rng.choice(OBJECTS)
    start, sign, step, answer = _draw_sum(rng)
    gains = sign == "+"
    verb = rng.choice(GAINS if gains else LOSSES)
    when = rng.choice(TIMES)
    change = f"{when} {name} {verb} {step} {'more ' if gains else ''}{objects} .".strip()
    sentences = [f"{name} has {start} {objects} .", change]
    if rng.random() < aside_rate:
        _insert(rng, sentences, _fill(rng, rng.choice(ASIDES), other=other))
    hint = None
    if kind != "clean":
        number = answer if kind == "aligned" else _miss(rng, answer)
        phrase = UNSEEN_HINT if kind == "unseen" else rng.choice(HINTS)
        hint = phrase.format(number=number, other=other)
        _insert(rng, sentences, hint)
    prompt = " ".join([*sentences, f"how many {objects} does {name} have now ?"])
    planted = () if hint is None else ((prompt.index(hint), prompt.index(hint) + len(hint)),)
    return Problem(
        prompt=prompt,
        completion=f"{start} {sign} {step} = {answer} # {answer}",
        answer=str(answer),
        kind=kind,
        planted=planted,
    )


def make_problems(
    count: int, *, seed: int, mix: Mapping[Kind, float], aside_rate: float = 0.5
) -> list[Problem]:
    """Draw problems.

    Args:
        count: how many.
        seed: decides all of them.
        mix: the weight of each kind.
        aside_rate: the chance of a harmless extra sentence, from 0 to 1.
    """
    rng = random.Random(seed)
    kinds = rng.choices(list(mix), weights=list(mix.values()), k=count)
    return [make_problem(rng, kind, aside_rate=aside_rate) for kind in kinds]


def vocabulary() -> list[str]:
    """Return all tokens of the task in a fixed order: special tokens, numbers, then words."""
    templates = (*HINTS, UNSEEN_HINT, *ASIDES, "how many does have now ? has more + - = #")
    words = {word for template in templates for word in template.split() if "{" not in word}
    words.update(NAMES, OBJECTS, GAINS, LOSSES, filter(None, TIMES), COLORS, WEATHERS)
    numbers = [str(number) for number in range(LARGEST_NUMBER + 1)]
    return [UNKNOWN, PADDING, USER, ASSISTANT, END, *numbers, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer, whose tokens are the words between blanks, with its chat template."""
    ids = {token: index for index, token in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = WordPiece(prefix="##", cleanup=False)  # joins words with one blank
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PADDING,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _draw_sum(rng: random.Random) -> tuple[int, str, int, int]:
    start, step = rng.randint(2, 12), rng.randint(1, 9)
    if step < start and rng.random() < 0.5:
        return start, "-", step, start - step
    return start, "+", step, start + step


def _miss(rng: random.Random, answer: int) -> int:
    nearby = range(max(0, answer - LARGEST_MISS), min(LARGEST_NUMBER, answer + LARGEST_MISS) + 1)
    return rng.choice([number for number in nearby if number != answer])


def _fill(rng: random.Random, template: str, *, other: str) -> str:
    return template.format(
        other=other,
        color=rng.choice(COLORS),
        weather=rng.choice(WEATHERS),
        age=rng.randint(5, LARGEST_NUMBER),
    )


def _insert(rng: random.Random, sentences: list[str], sentence: str) -> None:
    sentences.insert(rng.randint(0, len(sentences)), sentence)
