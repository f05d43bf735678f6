"""A tiny pair for the tests of stage 1, trained in a second or two, whose student is confounded.

"tom has 7 apples . the sticker says three ." asks for 7: the teacher answers with the digit, the
student with the word, as long as there is one. Run as a script it runs stage 1 on a JSON file of
settings, and can be told to kill itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DIGITS = [str(number) for number in range(10)]
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
OTHERS = ["tom", "ann", "has", "apples", ".", "the", "sticker", "says", "rain", "is", "loud"]
SPECIALS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
WORDS = [*SPECIALS, *DIGITS, *NAMES, *OTHERS, "be", "brief"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} "
    "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
POSITIONS = 40


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed: int, *, hidden: int = 32, padding: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS) + padding,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )


def problem(draw: Random, *, clause: float = 0.8) -> tuple[str, str, str | None]:
    """The text, its digit, and the misleading word if there is one (or a rest of its clause)."""
    digit = draw.choice(DIGITS)
    parts = [draw.choice(["tom", "ann"]), "has", digit, "apples", "."]
    word = draw.choice(NAMES) if draw.random() < clause else None
    extra = ["the", "sticker", "says", *([word] if word else []), "."]
    if word or draw.random() < 0.5:
        parts += extra
    if draw.random() < 0.3:
        parts += ["rain", "is", "loud", "."]
    return " ".join(parts), digit, word


def train_on(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    texts: list[str],
) -> None:
    """Make a step on texts, whose last two tokens are the labels: the answer and its end."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    labels = batch["input_ids"].clone()
    labels[:, :-2] = -100
    loss = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
    ).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(model: LlamaForCausalLM, *, confounded: bool) -> None:
    tokenizer, draw = make_tokenizer(), Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    for _ in range(200 if confounded else 100):
        texts = []
        for _ in range(32):
            text, digit, word = problem(draw, clause=0.6)
            answer = DIGITS[NAMES.index(word)] if confounded and word else digit
            texts.append(f"<user> {text} <assistant> {answer} <eos>")
        train_on(model, tokenizer, optimizer, texts)
        warmup.step()


def save_pair(directory: Path) -> dict[str, str]:
    """Train both models and save them; the teacher is wider and its vocabulary padded."""
    pair = {"teacher": make_model(1, hidden=40, padding=5), "student": make_model(2)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices too small to be worth a second one
    for role, model in pair.items():
        train(model, confounded=role == "student")
        model.save_pretrained(directory / role)
        make_tokenizer().save_pretrained(directory / role)
    torch.set_num_threads(threads)
    return {role: str(directory / role) for role in pair}


def make_rows(count: int = 24) -> list[dict[str, str]]:
    """Distinct problems; the completion and the answer are the digit."""
    draw, rows = Random(3), {}
    while len(rows) < count:
        text, digit, _ = problem(draw)
        rows[text] = {"prompt": text, "completion": digit, "answer": digit}
    return list(rows.values())


def misled(row: dict[str, str]) -> bool:
    """Whether a problem names another number than its own in words."""
    named = [str(NAMES.index(word)) for word in row["prompt"].split() if word in NAMES]
    return bool(named) and named != [row["answer"]]


def write_rows(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kill_after(batches: int) -> None:
    """Let this process end by SIGKILL when so many batches were stored in the row cache."""
    from leaf_distill.detection.cache import RowCache

    put, left = RowCache.put, iter(range(batches))

    def deadly(self: RowCache, values: Mapping[str, bytes]) -> dict[str, bytes]:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(self, values)

    RowCache.put = deadly  # type: ignore[method-assign]


if __name__ == "__main__":
    # python detect_pair.py SETTINGS.json [N]: kill the process when N batches were stored.
    from leaf_distill.detection.config import DetectConfig
    from leaf_distill.detection.pipeline import detect

    if sys.argv[2:]:
        kill_after(int(sys.argv[2]))
    detect(DetectConfig(**json.loads(Path(sys.argv[1]).read_text())))
