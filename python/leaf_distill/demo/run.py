"""The whole method on an embedded pair, by the product's own functions, measured on known truth.

Everything is computed when it is run: the pair and the recipe of the problems are shipped, no
number is.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.prompt import Renderer
from leaf_distill.demo.measure import Tokens, measure_detection, measure_pruning, read_tokens
from leaf_distill.demo.show import show_results
from leaf_distill.demo.task import Kind, Problem, make_problems
from leaf_distill.detection.config import DetectConfig, Strategy
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.compare import compare
from leaf_distill.evaluation.compare_table import CompareResult
from leaf_distill.evaluation.config import CompareConfig
from leaf_distill.io import is_of, make_directory, write_bytes, write_json
from leaf_distill.models.loading import load_model
from leaf_distill.models.saliency import token_nll
from leaf_distill.models.tokenizer import load_tokenizer
from leaf_distill.report import write_report
from leaf_distill.terminal import say, say_next
from leaf_distill.training.config import LeafConfig

ASSETS = Path(__file__).parent / "assets"
TEACHER, STUDENT = str(ASSETS / "teacher"), str(ASSETS / "student")
RESULTS = "demo.json"
WRITTEN = ("rows.jsonl", "held-out.jsonl", "demo.log", "cache", "run", RESULTS)
"""All names that a demo writes into its directory."""

SEED = 0
ROWS = 400
MIX: Mapping[Kind, float] = {"clean": 0.3, "aligned": 0.3, "misaligned": 0.4}
HELD_OUT: Mapping[str, tuple[int, Mapping[Kind, float]]] = {
    "in-distribution": (300, MIX),
    "clean": (200, {"clean": 1.0}),
    "misaligned hint": (200, {"misaligned": 1.0}),
    "unseen hint": (200, {"unseen": 1.0}),
}
CONTROLS: tuple[Strategy, ...] = ("student_saliency", "perplexity", "random_spans")
ARMS = ["kd", "random_spans", "span"]
MAX_NEW_TOKENS = 12  # an answer has 7 tokens and its end
BY_HAND = ("student", "teacher", "dataset", "grade", "max_new_tokens")
STEPS = 100
ROWS_A_STEP = 64
LEARNING_RATE = 5e-4


def run_demo(output_dir: Path) -> dict[str, Any]:
    """Detect, cut, distil, evaluate and report; return what is also written to demo.json.

    The directory is emptied if it is an earlier demo's.

    Raises:
        ValueError: the directory holds anything else.
        StoreError: a file cannot be written.
    """
    started = time.perf_counter()
    start_afresh(output_dir)
    problems = make_problems(ROWS, seed=SEED + 1, mix=MIX)
    rows = write_problems(output_dir / "rows.jsonl", problems)
    with one_thread():
        say("Stage 1 with LeaF's spans ...")
        leaf = detect(detection_config(rows, output_dir))
        samples = read_samples(leaf.samples)
        detection = measure_detection(tokens_of(samples, problems))
        pruning = [measure_pruning("span (LeaF)", samples)]
        with (output_dir / "demo.log").open("a") as log, redirect_stdout(log):
            for strategy in CONTROLS:
                config = replace(detection_config(rows, output_dir), strategy=strategy)
                pruning.append(measure_pruning(strategy, read_samples(detect(config).samples)))
            compared, accuracy = compare_arms(rows, output_dir)
        page = write_report(leaf.arm)
    sizes = {name: count for name, (count, _) in HELD_OUT.items()}
    show_results(detection, pruning, compared, accuracy, sizes, len(samples))
    results = {
        "command": "demo",
        "scored_prompts": len(samples),
        "detection": [asdict(row) for row in detection],
        "pruning": [asdict(row) for row in pruning],
        "arms": [asdict(arm) for arm in compared.arms],
        "held_out": sizes,
        "accuracy": accuracy,
        "page": page,
        "seconds": round(time.perf_counter() - started, 1),
        "finished": True,
    }
    write_results(output_dir, results)
    numbers = output_dir / RESULTS
    say(f"\nThe numbers are in {numbers} ({results['seconds']:.0f} s).\nThe page is {page}")
    by_hand = {name: getattr(detection_config(rows, output_dir), name) for name in BY_HAND}
    say_next(
        "Next, detection by hand; put your models and rows in place of these",
        "detect",
        by_hand | {"output_dir": f"{output_dir}-by-hand"},
    )
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one thread: models this small gain nothing from more, and sums keep one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def start_afresh(output_dir: Path) -> None:
    """Make an empty directory, also out of an earlier demo's, but of nothing else."""
    if output_dir.exists():
        entries = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else [""]
        if entries and not (set(entries) <= set(WRITTEN) and is_of(output_dir / RESULTS, "demo")):
            raise ValueError(
                "output_dir: must be a new or empty directory, or that of an earlier demo, got "
                f"{output_dir}, which holds something else; give another --output_dir"
            )
        shutil.rmtree(output_dir)
    make_directory(output_dir)
    write_results(output_dir, {"command": "demo", "finished": False})


def write_problems(path: Path, problems: Sequence[Problem]) -> Path:
    """Write problems as JSON lines; return the path."""
    lines = (json.dumps(problem.as_row()) + "\n" for problem in problems)
    write_bytes(path, "".join(lines).encode())
    return path


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the rows of samples.parquet."""
    samples: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return samples


def detection_config(rows: Path, output_dir: Path) -> DetectConfig:
    """Return the paper's settings; the last number of an answer is graded."""
    return DetectConfig(
        student=STUDENT,
        teacher=TEACHER,
        dataset=str(rows),
        output_dir=str(output_dir / "run"),
        cache_dir=str(output_dir / "cache"),
        grade="number",
        max_new_tokens=MAX_NEW_TOKENS,
        seed=SEED,
    )


def tokens_of(samples: Sequence[Mapping[str, Any]], problems: Sequence[Problem]) -> list[Tokens]:
    """Return the scored prompts' tokens with the truth, LeaF's score and those of simple rivals."""
    student, renderer = load_model(STUDENT), Renderer(load_tokenizer(STUDENT))
    prompts = load_examples([{"prompt": one["text"], "completion": "-"} for one in samples])
    renderings = [renderer.prompt(prompt) for prompt in prompts]
    draw = random.Random(SEED)
    rows = []
    for sample, rendering in zip(samples, renderings, strict=True):
        (surprise,) = token_nll(student, [rendering])
        rivals = {
            "perplexity": surprise[rendering.domain].astype(np.float64),
            "random": np.array([draw.random() for _ in sample["offsets"]]),
        }
        rows.append(read_tokens(sample, problems[sample["row_id"]].planted, rivals))
    return rows


def compare_arms(rows: Path, output_dir: Path) -> tuple[CompareResult, dict[str, dict[str, float]]]:
    """Compare the arms; return also each student's accuracy on each held-out set."""
    sets = {
        name: make_problems(count, seed=seed, mix=mix)
        for seed, (name, (count, mix)) in enumerate(HELD_OUT.items(), start=SEED + 100)
    }
    problems = [problem for group in sets.values() for problem in group]
    held_out = write_problems(output_dir / "held-out.jsonl", problems)
    compared = compare(
        CompareConfig(arms=ARMS, eval_dataset=str(held_out)),
        detection_config(rows, output_dir),
        LeafConfig(
            output_dir=str(output_dir / "run"),
            max_steps=STEPS,
            originals_per_step=ROWS_A_STEP,
            learning_rate=LEARNING_RATE,
            seed=SEED,
            logging_steps=STEPS // 4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    owners = [name for name, group in sets.items() for _ in group]
    accuracy = {}
    for arm in compared.arms:
        answers = output_dir / "run" / "evaluation" / arm.name / "answers.parquet"
        verdicts = pq.read_table(answers, columns=["verdict"])["verdict"].to_pylist()
        pairs = zip(owners, verdicts, strict=True)
        right = Counter(owner for owner, verdict in pairs if verdict == "right")
        accuracy[arm.name] = {name: right[name] / len(group) for name, group in sets.items()}
    return compared, accuracy


def write_results(output_dir: Path, results: Mapping[str, Any]) -> None:
    """Write demo.json; what could not be measured (NaN) becomes null."""
    text = json.dumps(results, default=str)
    write_json(output_dir / RESULTS, json.loads(text, parse_constant=lambda _: None))
