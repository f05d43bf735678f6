"""Sentences of other rows' prompts, inserted as distractors."""

from __future__ import annotations

import random
from collections.abc import Iterable

from leaf_distill.data.example import Example, Range
from leaf_distill.data.sentences import CLOSERS, LINE_BREAKS, sentences

_QUESTION_MARKS = "?\uff1f\u061f\u037e\u1367"
_TRIES = 16


class Distractors:
    """The sentences of a dataset's prompts that ask nothing, in an order that no hash decides.

    These are all but the last of each text, which mostly is its question, without those that end
    with a question mark, hold no letter, or go over several lines, as code does.

    Args:
        texts: the analyzed turns of the rows.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        found = {text[start:stop].strip() for text in texts for start, stop in sentences(text)[:-1]}
        self.sentences = sorted(filter(_asks_nothing, found))

    def insert(self, example: Example, draw: random.Random) -> tuple[Range, str] | None:
        """Draw a sentence that is not in the row, and the place where it is inserted.

        Args:
            example: a row; its own text stays as it is, character for character.
            draw: decides the result, together with the row and the sentences.

        Returns:
            An empty range of `example.text`, at which a sentence of a turn begins, the last one at
            most; and what is inserted there, the sentence with a blank where the text has one. None
            where no sentence is left or no turn holds text.
        """
        places = [
            (low, high, low + start)
            for low, high in example.parts
            for start, _ in sentences(example.text[low:high])
            if example.text[low:high].strip()
        ]
        sentence = self._other(example.text, draw)
        if sentence is None or not places:
            return None
        low, high, at = draw.choice(places)
        before, after = example.text[low:at], example.text[at:high]
        if not before or before[-1].isspace():
            sentence += " "
        elif after[0].isspace():
            sentence = " " + sentence
        return (at, at), sentence

    def _other(self, text: str, draw: random.Random) -> str | None:
        for _ in range(_TRIES if self.sentences else 0):
            if (found := draw.choice(self.sentences)) not in text:
                return found
        rest = [one for one in self.sentences if one not in text]  # nearly all are in this prompt
        return draw.choice(rest) if rest else None


def _asks_nothing(sentence: str) -> bool:
    asks = sentence.rstrip(CLOSERS)[-1:] in _QUESTION_MARKS
    broken = any(mark in sentence for mark in LINE_BREAKS)
    return not asks and not broken and any(char.isalpha() for char in sentence)
