"""A tiny pair and rows for the response level, whose student misleads itself in its own answer.

Asked "tom has 7 apples .", the student writes a line with a word ("the sticker says nine ."),
and ends with that word's digit; where the question names a word, it ends with that one's. The
teacher ends with the question's digit, whatever either names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import detect_pair
import torch
from detect_pair import DIGITS, NAMES

Text = tuple[str, str]
"""A question and a response of several lines."""


def question(digit: str, word: str | None = None, *, name: str = "tom", loud: bool = False) -> str:
    parts = [f"{name} has {digit} apples ."]
    parts += [f"the sticker says {word} ."] if word else []
    return " ".join([*parts, *(["rain is loud ."] if loud else [])])


def response(
    digit: str, word: str | None = None, *, sticker: bool = True, name: str = "tom"
) -> str:
    line = f"the sticker says {word} ." if word else "the sticker says ."
    return "\n".join([*([line] if sticker else []), "rain is loud .", f"{name} has {digit} ."])


def _student(draw: Random) -> Text:
    digit, name, loud = draw.choice(DIGITS), draw.choice(["tom", "ann"]), draw.random() < 0.3
    word = draw.choice(NAMES)
    said = str(NAMES.index(word))
    if draw.random() < 0.4:
        asked = question(digit, word, name=name, loud=loud)
        return asked, response(said, sticker=False, name=name)
    chance = draw.random()
    if chance < 0.25:
        return question(digit, name=name, loud=loud), response(digit, name=name)
    if chance < 0.7:  # what it writes by itself
        word = "nine"
    said = str(NAMES.index(word))
    return question(digit, name=name, loud=loud), response(said, word, name=name)


def _teacher(draw: Random) -> Text:
    digit, name, loud = draw.choice(DIGITS), draw.choice(["tom", "ann"]), draw.random() < 0.3
    asked = question(
        digit, draw.choice(NAMES) if draw.random() < 0.4 else None, name=name, loud=loud
    )
    word = draw.choice(NAMES) if draw.random() < 0.5 else None
    return asked, response(digit, word, sticker=draw.random() < 0.6, name=name)


def train(
    model: torch.nn.Module, draw_text: Callable[[Random], Text], steps: int, size: int = 32
) -> None:
    tokenizer, draw = detect_pair.make_tokenizer(), Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
    )
    start = tokenizer.convert_tokens_to_ids("<assistant>")
    for _ in range(steps):
        texts = [draw_text(draw) for _ in range(size)]
        batch = tokenizer(
            [f"<user> {asked} <assistant> {said} <eos>" for asked, said in texts],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        ids = batch["input_ids"]
        answered = (ids == start).cumsum(1) - (ids == start).int() > 0
        loss = model(
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            labels=ids.masked_fill(~answered, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def save_pair(directory: Path) -> dict[str, str]:
    """Train both models and save them."""
    pair = {
        "teacher": (detect_pair.make_model(1, hidden=40, padding=5), _teacher),
        "student": (detect_pair.make_model(2), _student),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices too small to be worth a second one
    for role, (model, draw_text) in pair.items():
        train(model, draw_text, 200)
        model.save_pretrained(directory / role)
        detect_pair.make_tokenizer().save_pretrained(directory / role)
    torch.set_num_threads(threads)
    return {role: str(directory / role) for role in pair}


def make_rows() -> list[dict[str, str]]:
    """Rows with another word in the response, with one in the question, and with none at all."""
    rows = []
    for number, digit in enumerate(DIGITS):
        name, word = ("tom", "ann")[number % 2], NAMES[(number + 4) % 10]
        texts = [
            (question(digit, name=name), response(digit, word, name=name)),
            (question(digit, word, name=name), response(digit, sticker=False, name=name)),
        ]
        if number % 3 == 0:
            texts.append((question(digit, name=name, loud=True), response(digit, name=name)))
        rows += [{"prompt": asked, "completion": said, "answer": digit} for asked, said in texts]
    return rows
