"""Trains the demo's tiny teacher and student, and writes them only if they pass the gates.

    python tools/train_pair.py --output-dir assets --seed 0

The teacher sees clean problems and hints that are mostly wrong, so it learns to do the sum. The
student sees mostly hints that are right, so it learns to copy the hint: it is confounded, which is
what the demo needs and what the gates verify. Confounding depends on the seed; a seed that fails a
gate is reported as rejected and the next one is tried. One thread, so a rerun makes the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leaf_distill.demo.task import (
    END,
    PADDING,
    Kind,
    Problem,
    build_tokenizer,
    make_problems,
)

ASSETS = Path(__file__).resolve().parents[1] / "python/leaf_distill/demo/assets"
HELD_OUT_SEED = 10**6  # training seeds count up from the pair's own seed and never come near


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training on problems drawn with the weights of `mix`."""

    steps: int
    mix: Mapping[Kind, float]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Shape and training of one model; `learning_rate` is the peak of warm-up and cosine."""

    hidden_size: int
    layers: int
    phases: tuple[Phase, ...]
    learning_rate: float = 3e-3
    batch_size: int = 64
    heads: int = 4


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Bounds of the accuracy of `model` on held-out problems of `kind`."""

    model: str
    kind: Kind
    at_least: float = 0.0
    at_most: float = 1.0


TEACHER = Recipe(
    hidden_size=64,
    layers=3,
    phases=(
        Phase(steps=250, mix={"clean": 1.0}),
        Phase(steps=500, mix={"clean": 0.3, "aligned": 0.1, "misaligned": 0.6}),
    ),
)
STUDENT = Recipe(
    hidden_size=48,
    layers=3,
    phases=(
        Phase(steps=350, mix={"aligned": 1.0}),  # copying comes first, and stays
        Phase(steps=350, mix={"clean": 0.2, "aligned": 0.8}),
    ),
)
GATES = (
    Gate(model="teacher", kind="clean", at_least=0.95),
    Gate(model="teacher", kind="misaligned", at_least=0.95),
    Gate(model="student", kind="clean", at_least=0.5),
    Gate(model="student", kind="aligned", at_least=0.9),
    Gate(model="student", kind="misaligned", at_most=0.3),
)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of the recipe's shape with tied embeddings."""
    ids = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.hidden_size * 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids[END],
        pad_token_id=ids[PADDING],
    )
    return LlamaForCausalLM(config)


def encode(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], right-padded, and the mask [B, T] of completion and end tokens."""
    chats = [
        [
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": problem.completion},
        ]
        for problem in problems
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    ids = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt").input_ids
    lengths = (ids != tokenizer.pad_token_id).sum(dim=1, keepdim=True)
    labels = torch.tensor([[len(problem.completion.split()) + 1] for problem in problems])
    position = torch.arange(ids.shape[1])
    return ids, (position >= lengths - labels) & (position < lengths)


def label_logits(
    model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, V] that predict the masked tokens, and those tokens [N].

    Attention is causal and the padding comes last, so that it needs no mask.
    """
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    return model.lm_head(hidden[mask[:, 1:]]), ids[:, 1:][mask[:, 1:]]


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, *, seed: int
) -> None:
    """AdamW on the completion's cross-entropy; every step sees new problems."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.01,
        fused=True,
    )
    total = sum(phase.steps for phase in recipe.phases)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, total))
    mixes = [phase.mix for phase in recipe.phases for _ in range(phase.steps)]
    model.train()
    for step, mix in enumerate(mixes):
        problems = make_problems(recipe.batch_size, seed=seed * 10_000 + step, mix=mix)
        loss = cross_entropy(*label_logits(model, *encode(problems, tokenizer)))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(False)


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, kind: Kind, *, count: int = 500
) -> float:
    """Share of held-out problems whose whole completion is the model's first choice throughout.

    With the gold prefix given, that is the same as a greedy answer that matches it exactly.
    """
    problems = make_problems(count, seed=HELD_OUT_SEED, mix={kind: 1.0})
    ids, mask = encode(problems, tokenizer)
    logits, targets = label_logits(model, ids, mask)
    wrong = torch.zeros(count, dtype=torch.long)
    rows = mask[:, 1:].nonzero()[:, 0]
    wrong.index_add_(0, rows, (logits.argmax(dim=-1) != targets).long())
    return (wrong == 0).float().mean().item()


def train_model(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlamaForCausalLM:
    """A trained model; the seed decides its first weights and its problems."""
    torch.manual_seed(seed)
    model = build_model(recipe, tokenizer)
    train(model, tokenizer, recipe, seed=seed)
    return model


def check_gates(
    model: LlamaForCausalLM, name: str, tokenizer: PreTrainedTokenizerFast
) -> list[dict[str, object]]:
    """The gates of one model with the measured accuracy and whether it passes."""
    report = []
    for gate in GATES:
        if gate.model == name:
            measured = accuracy(model, tokenizer, gate.kind)
            passed = gate.at_least <= measured <= gate.at_most
            report.append({**asdict(gate), "accuracy": round(measured, 4), "passed": passed})
    return report


def train_until_gated(
    name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, *, seed: int, attempts: int
) -> tuple[LlamaForCausalLM, dict[str, object]]:
    """The first model whose gates all pass, with a report that also holds the rejected seeds.

    Raises RuntimeError, naming each seed's failed gates, when `attempts` seeds fail.
    """
    rejected: list[dict[str, object]] = []
    for attempt in range(seed, seed + attempts):
        started = time.perf_counter()
        model = train_model(recipe, tokenizer, seed=attempt)
        gates = check_gates(model, name, tokenizer)
        seconds = time.perf_counter() - started
        figures = ", ".join(f"{gate['kind']} {gate['accuracy']:.3f}" for gate in gates)
        passed = all(gate["passed"] for gate in gates)
        verdict = "kept" if passed else "rejected"
        print(f"{name} seed {attempt}: {figures}: {verdict} ({seconds:.0f} s)")
        if passed:
            return model, {
                "seed": attempt,
                "parameters": model.num_parameters(),
                "recipe": asdict(recipe),
                "gates": gates,
                "rejected": rejected,
            }
        rejected.append({"seed": attempt, "gates": gates})
    raise RuntimeError(
        f"no {name} passed its gates with the seeds {seed} to {seed + attempts - 1}: {rejected}; "
        "nothing was written; give another --seed or more --attempts"
    )


def train_pair(output_dir: Path, *, seed: int = 0, attempts: int = 4) -> dict[str, object]:
    """Train both models, then write teacher/, student/ and pair.json; nothing when a gate fails."""
    torch.set_num_threads(1)  # a sum's order depends on the number of threads
    tokenizer = build_tokenizer()
    trained = {
        name: train_until_gated(name, recipe, tokenizer, seed=seed, attempts=attempts)
        for name, recipe in (("teacher", TEACHER), ("student", STUDENT))
    }
    for name, (model, _) in trained.items():
        model.save_pretrained(output_dir / name)
        (output_dir / name / "model.safetensors").chmod(0o644)  # safetensors makes it private
        tokenizer.save_pretrained(output_dir / name)
    report: dict[str, object] = {name: figures for name, (_, figures) in trained.items()}
    (output_dir / "pair.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _rate(step: int, total: int) -> float:
    warm_up = max(1, total // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output-dir", type=Path, default=ASSETS, help="where the pair is written")
    parser.add_argument("--seed", type=int, default=0, help="first seed to try")
    parser.add_argument("--attempts", type=int, default=4, help="how many seeds to try per model")
    options = parser.parse_args(arguments)
    train_pair(options.output_dir, seed=options.seed, attempts=options.attempts)


if __name__ == "__main__":
    main()
