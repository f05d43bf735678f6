"""One loss and one gradient, however a step is cut, launched or computed.

`materialised_loss` is the definition, in plain PyTorch: one batch a step, the full logits of both
models, softmax in float64. Every objective under every cut must give its loss and its weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import distill_pair
import numpy as np
import pytest
import torch
from distill_pair import (
    WORDS,
    assert_same,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    weights,
)
from torch import Tensor

from leaf_distill.training.trainer import LeafTrainer

OBJECTIVES: dict[str, dict[str, Any]] = {
    "pool": {},
    "number": {"kd_weight": 0.4, "temperature": 2.0},
    "sample": {"span_weighting": "sample", "kd_weight": "0.9:0.2"},
    "sample_pool": {"span_weighting": "sample"},
    "entropy": {"token_selection": "entropy", "token_share": 0.4, "kd_weight": 0.4},
    "tip": {"token_selection": "tip", "token_share": 0.6, "span_weighting": "sample"},
    "reverse_kl": {"divergence": "reverse_kl", "temperature": 2.0},
    "jsd": {"divergence": "0.3", "token_selection": "tip", "token_share": 0.6},
    "random": {"token_selection": "random", "token_share": 0.4, "kd_weight": "0.2:1"},
}
CUTS: dict[str, dict[str, Any]] = {
    "one_batch": {},
    "accumulation": {"per_device_train_batch_size": 2},
    "passes": {"max_batch_tokens": 40, "per_device_train_batch_size": 4},
    "padded": {"max_batch_tokens": 40, "per_device_train_batch_size": 4, "packing": False},
    "checkpointing": {"gradient_checkpointing": True, "per_device_train_batch_size": 4},
}
# The others are slow: each objective and each cut is in a fast one.
FAST = [(objective, "passes") for objective in OBJECTIVES] + [("tip", cut) for cut in CUTS]
# 20 originals in steps of 8: the last step of an epoch has 4, on two ranks all of them on one.
STEPS = {"max_steps": 5, "originals_per_step": 8, "per_device_train_batch_size": 8}
TWO_RANKS = {"max_batch_tokens": 40, "per_device_train_batch_size": 4}


def cut_rows() -> list[dict[str, Any]]:
    """20 originals; of the first three 4, 3 and 2 counterfactuals."""
    rows = make_rows(20, 9)
    for i, row_id in enumerate([0, 0, 0, 0, 1, 1, 1, 2, 2]):
        rows[20 + i] |= {"row_id": row_id, "candidate_id": i}
    return rows


def materialised_loss(trainer: LeafTrainer, model: torch.nn.Module, batch: Any) -> Tensor:
    """The loss of a batch that is a whole optimizer step, from the full logits."""
    args, step = trainer.args, trainer.state.global_step
    student = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    with torch.no_grad():
        teacher = trainer.teacher_model(
            input_ids=batch["teacher_input_ids"], attention_mask=batch["teacher_attention_mask"]
        ).logits
    k = Counter(row["row_id"] for row in cut_rows() if row["branch"] == "counterfactual")
    total, count = [torch.zeros((), dtype=torch.float64) for _ in range(2)], [0.0, 0.0]
    for row, row_id in enumerate(batch["row_id"].tolist()):
        log_s, log_t = (
            (logits[row, mask[row]][:, : len(WORDS)].double() / args.temperature).log_softmax(-1)
            for logits, mask in (
                (student, batch["loss_mask"]),
                (teacher, batch["teacher_loss_mask"]),
            )
        )
        kl = divergence_rows(log_s, log_t, args.divergence)
        entropy = -(log_s.exp() * log_s).sum(-1)
        chosen = chosen_tokens(args, (args.seed, step, row_id), kl.tolist(), entropy.tolist())
        term = int(batch["counterfactual"][row])
        weight = 1 / k[row_id] if term and args.span_weighting == "sample" else 1.0
        total[term] = total[term] + weight * kl[chosen].sum()
        count[term] += weight * len(chosen)
    if args.kd_weight == "pool" or 0 in count:
        share = count[0] / sum(count)
    else:
        first, *last = map(float, str(args.kd_weight).split(":"))
        share = first + (last[0] - first) * step / 4 if last else first
    terms = [total[term] / (count[term] or 1) for term in (0, 1)]
    return args.temperature**2 * (share * terms[0] + (1 - share) * terms[1])


def divergence_rows(log_s: Tensor, log_t: Tensor, divergence: Any) -> Tensor:
    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if isinstance(divergence, str):
        return kl(log_t, log_s) if divergence == "kl" else kl(log_s, log_t)
    log_m = (divergence * log_t.exp() + (1 - divergence) * log_s.exp()).log()
    return divergence * kl(log_t, log_m) + (1 - divergence) * kl(log_s, log_m)


def chosen_tokens(args: Any, seed: Any, kl: list[float], entropy: list[float]) -> list[int]:
    n = len(kl)
    if args.token_selection == "all":
        return list(range(n))
    wanted = math.ceil(args.token_share * n)
    if args.token_selection == "random":
        drawn = np.random.default_rng(seed).random(n)
        return sorted(range(n), key=lambda i: -drawn[i])[:wanted]
    falling = sorted(range(n), key=lambda i: -entropy[i])
    if args.token_selection == "entropy":
        return falling[:wanted]
    uncertain, low = falling[: math.ceil(wanted / 2)], falling[math.ceil(n / 2) :]
    return uncertain + sorted(low, key=lambda i: -kl[i])[: wanted // 2]


class Materialised(LeafTrainer):
    """A trainer with the loss of this page in place of its own."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return materialised_loss(self, model, inputs)


Result = tuple[dict[str, Tensor], list[float]]


def train(
    kind: type[LeafTrainer], directory: Path, *, double: bool = True, **settings: Any
) -> LeafTrainer:
    student, teacher = make_student(), make_teacher()
    if double:
        student, teacher = student.double(), teacher.double()
    config = make_config(directory, **{**STEPS, **settings})
    trainer = kind(student, teacher, config, cut_rows(), None, make_tokenizer())
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights after 5 steps, and the losses, of an objective as it is defined."""

    @cache
    def of(objective: str) -> Result:
        directory = tmp_path_factory.mktemp("materialised")
        trainer = train(Materialised, directory, **OBJECTIVES[objective])
        return weights(trainer.model), losses(trainer)

    return of


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the results of all objectives on two ranks."""
    directory = tmp_path_factory.mktemp("two_ranks")
    runs = {
        f"{objective}-{double}": {**STEPS, **TWO_RANKS, **settings, "double": double}
        for objective, settings in OBJECTIVES.items()
        for double in (True, False)
    }
    file = directory / "runs.json"
    rows = cut_rows()
    file.write_text(json.dumps({name: {**run, "rows": rows} for name, run in runs.items()}))
    torchrun(file, 2)
    return directory


def torchrun(file: Path, processes: int) -> None:
    """Run distill_pair.py as a user runs a training script, on that many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command += ["--master_addr=127.0.0.1", f"--master_port={port}", distill_pair.__file__]
    # The settings say `use_cpu`, but accelerate would still ask for a GPU for each rank.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command.append(str(file))
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as launched:
        try:
            assert launched.wait(timeout=600) == 0
        finally:
            launched.terminate()  # SIGTERM: if it hangs, torchrun ends its ranks as well


def check(expected: Result, double: Result, single: list[float]) -> None:
    assert_same(double[0], expected[0], 1e-10)
    for found in (double[1], single):
        assert len(found) == 5
        assert found == pytest.approx(expected[1], rel=1e-6)


@pytest.mark.parametrize(
    ("objective", "cut"),
    [
        pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow)
        for pair in product(OBJECTIVES, CUTS)
    ],
)
def test_a_step_is_exact_however_it_is_cut(
    tmp_path: Path, expected: Any, objective: str, cut: str
) -> None:
    settings = {**OBJECTIVES[objective], **CUTS[cut]}
    double = train(LeafTrainer, tmp_path, **settings)
    single = train(LeafTrainer, tmp_path, double=False, **settings)
    check(expected(objective), (weights(double.model), losses(double)), losses(single))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_change_nothing(expected: Any, two_ranks: Path, objective: str) -> None:
    logs = {}
    for double in (True, False):
        log = json.loads((two_ranks / f"{objective}-{double}.json").read_text())
        logs[double] = [line["loss"] for line in log if "loss" in line]
    trained = torch.load(two_ranks / f"{objective}-True.pt")
    check(expected(objective), (trained, logs[True]), logs[False])


def test_two_ranks_measure_the_same(tmp_path: Path, two_ranks: Path) -> None:
    one = train(LeafTrainer, tmp_path, **OBJECTIVES["tip"])
    one.evaluate(cut_rows())
    theirs = json.loads((two_ranks / "tip-True.json").read_text())
    assert len(one.state.log_history) == len(theirs) == 7  # five steps, the end, the evaluation
    timed = re.compile("runtime|per_second|total_flos")
    for ours, their in zip(one.state.log_history, theirs, strict=True):
        assert ours.keys() == their.keys()
        for name in (name for name in ours if not timed.search(name)):
            assert their[name] == pytest.approx(ours[name], rel=1e-6), name


@pytest.mark.slow
def test_compiled_models_change_nothing(tmp_path: Path, expected: Any) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    trainer = train(LeafTrainer, tmp_path, **OBJECTIVES["tip"], **CUTS["passes"], **compiled)
    assert isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
    assert_same(weights(trainer.model), expected("tip")[0], 1e-10)
    assert losses(trainer) == pytest.approx(expected("tip")[1], rel=1e-6)
