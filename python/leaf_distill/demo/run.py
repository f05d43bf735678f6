"""The whole method on an embedded pair, with the product's own functions, measured on known truth.

Everything is computed when it is run: the pair and the recipe of the problems are shipped, no
number is.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils.logging import disable_progress_bar

from leaf_distill.config import DetectConfig, EvaluateConfig, Strategy
from leaf_distill.data.prompt import Renderer
from leaf_distill.demo import show
from leaf_distill.demo.measure import (
    Arm,
    Tokens,
    measure_detection,
    measure_pruning,
    perplexity,
    read_tokens,
)
from leaf_distill.demo.task import Kind, Problem, make_problems
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.models.loading import load_model, load_tokenizer
from leaf_distill.report import write_report
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.distill import distill

ASSETS = Path(__file__).parent / "assets"
TEACHER, STUDENT = str(ASSETS / "teacher"), str(ASSETS / "student")
RESULTS = "demo.json"

SEED = 0
ROWS = 400
MIX: Mapping[Kind, float] = {"clean": 0.3, "aligned": 0.3, "misaligned": 0.4}
HELD_OUT: Mapping[str, tuple[int, Mapping[Kind, float]]] = {
    "in-distribution": (300, MIX),
    "clean": (200, {"clean": 1.0}),
    "misaligned hint": (200, {"misaligned": 1.0}),
    "unseen hint": (200, {"unseen": 1.0}),
}
MAX_NEW_TOKENS = 12  # an answer has 7 tokens and its end
STEPS = 100
ROWS_A_STEP = 64
LEARNING_RATE = 5e-4


def run_demo(pair: str, output_dir: Path) -> dict[str, Any]:
    """Run the demo of `pair`, "tiny" or "smollm2", and return what it also writes to demo.json.

    The directory is emptied if it is an earlier demo's. Raises ValueError for an unknown pair, for
    a directory that holds anything else, or when packages that the pair needs are missing.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading, which is quick here
    if pair == "tiny":
        return run_tiny(output_dir)
    if pair == "smollm2":
        from leaf_distill.demo.smollm2 import run_smollm2

        return run_smollm2(output_dir)
    raise ValueError(f"pair: needs tiny or smollm2, came {pair!r}")


def run_tiny(output_dir: Path) -> dict[str, Any]:
    """Detect, cut, distil, evaluate and report with the embedded pair on planted problems."""
    started = time.perf_counter()
    start_afresh(output_dir)
    problems = make_problems(ROWS, seed=SEED + 1, mix=MIX)
    rows = write_problems(output_dir / "rows.jsonl", problems)
    log = output_dir / "demo.log"
    with one_thread():
        with quietly("stage 1 with random spans, the control", log):
            random_rows, random_samples = detect_with("random_spans", rows, output_dir)
        print(
            "stage 1 with LeaF's spans, from the answers and saliencies that are stored by now ..."
        )
        leaf_rows, samples = detect_with("span", rows, output_dir)
        detection = measure_detection(tokens_of(samples, problems))
        pruning = [
            measure_pruning("LeaF spans", samples),
            measure_pruning("random spans", random_samples),
        ]
        arms = []
        for name, dataset in (("KD", rows), ("random spans", random_rows), ("LeaF", leaf_rows)):
            with quietly(f"distillation: {name}", log):
                arms.append(distill_on(name, dataset, output_dir))
        models = {"nothing": Path(STUDENT), **{arm.name: arm.model for arm in arms}}
        with quietly("evaluation of every student", log):
            accuracy = evaluate_all(models, output_dir)
        page = write_report(output_dir / "detect")

    sizes = {name: count for name, (count, _) in HELD_OUT.items()}
    show.tiny(detection, pruning, arms, accuracy, sizes, len(samples))
    results = {
        "pair": "tiny",
        "scored_prompts": len(samples),
        "detection": [asdict(row) for row in detection],
        "pruning": [asdict(row) for row in pruning],
        "distillation": [asdict(arm) for arm in arms],
        "held_out": sizes,
        "accuracy": accuracy,
        "page": page,
    }
    return finish(output_dir, results, page, started)


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and sums keep one order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quietly(what: str, log: Path) -> Iterator[None]:
    """Say what is being done, and send what it prints to the log."""
    print(f"{what} ...", flush=True)
    with log.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def start_afresh(output_dir: Path) -> None:
    """Make an empty directory, also out of an earlier demo's, but of nothing else."""
    if output_dir.exists():
        ours = output_dir.is_dir() and (output_dir / RESULTS).is_file()
        if not ours and (output_dir.is_file() or any(output_dir.iterdir())):
            raise ValueError(
                "output_dir: needs a new or empty directory, or that of an earlier demo, but "
                f"{output_dir} holds something else; give another --output_dir"
            )
        shutil.rmtree(output_dir)
    output_dir.mkdir(parents=True)
    write_results(output_dir, {"finished": False})


def finish(
    output_dir: Path, results: Mapping[str, Any], page: Path, started: float
) -> dict[str, Any]:
    """Write the results and say where they are."""
    seconds = round(time.perf_counter() - started, 1)
    whole = {**results, "seconds": seconds, "finished": True}
    path = write_results(output_dir, whole)
    print(f"\nThe numbers are in {path} ({seconds:.0f} s).\nThe page is {page}")
    return whole


def write_problems(path: Path, problems: Sequence[Problem]) -> Path:
    """Write problems as JSON lines."""
    lines = (json.dumps(problem.as_row()) + "\n" for problem in problems)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def detect_with(
    strategy: Strategy, rows: Path, output_dir: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """Stage 1 with the paper's settings; returns its dataset and what it saw in each scored row.

    The last number of an answer is what counts. Another strategy in the same run directory starts
    from the stored saliencies and writes its own dataset over the last one, hence the copy.
    """
    config = DetectConfig(
        student=STUDENT,
        teacher=TEACHER,
        dataset=str(rows),
        output_dir=str(output_dir / "detect"),
        strategy=strategy,
        grade="number",
        max_new_tokens=MAX_NEW_TOKENS,
        seed=SEED,
    )
    result = detect(config)
    dataset = output_dir / f"rows-{strategy}.parquet"
    shutil.copyfile(result.dataset, dataset)
    samples: list[dict[str, Any]] = pq.read_table(result.samples).to_pylist()
    return dataset, samples


def tokens_of(samples: Sequence[Mapping[str, Any]], problems: Sequence[Problem]) -> list[Tokens]:
    """The scored prompts' tokens with the truth, the scores, and two simple rivals' scores."""
    student = load_model(STUDENT)
    renderer = Renderer(load_tokenizer(STUDENT))
    draw = random.Random(SEED)
    rows = []
    for sample in samples:
        rivals = {
            "perplexity": perplexity(student, renderer, sample["user_text"]),
            "random": np.array([draw.random() for _ in sample["offsets"]]),
        }
        rows.append(read_tokens(sample, problems[sample["row_id"]].planted, rivals))
    return rows


def distill_on(name: str, dataset: Path, output_dir: Path) -> Arm:
    """Distill the student: so many steps of so many rows, whatever the dataset holds.

    With counterfactuals a step has fewer originals, so that every arm reads as many rows.
    """
    branches = Counter(row.get("branch", "original") for row in read_rows(dataset))
    a_step = round(ROWS_A_STEP * branches["original"] / branches.total())
    model = output_dir / f"student-{name.lower().replace(' ', '-')}"
    result = distill(
        DistillArguments(student=STUDENT, teacher=TEACHER, dataset=str(dataset)),
        LeafConfig(
            output_dir=str(model),
            max_steps=STEPS,
            originals_per_step=a_step,
            per_device_train_batch_size=a_step,
            dataloader_drop_last=True,  # every step is a full one
            learning_rate=LEARNING_RATE,
            seed=SEED,
            logging_steps=STEPS // 4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
        ),
    )
    log = [entry for entry in result.metrics["log"] if "loss" in entry]
    return Arm(
        name=name,
        model=model,
        steps=log[-1]["step"],
        originals=branches["original"],
        counterfactuals=branches["counterfactual"],
        originals_a_step=a_step,
        tokens=log[-1]["num_input_tokens_seen"],
        kl_first=log[0]["loss"],
        kl_last=log[-1]["loss"],
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .parquet or .jsonl file."""
    if path.suffix == ".parquet":
        table: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return table
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def evaluate_all(models: Mapping[str, Path], output_dir: Path) -> dict[str, dict[str, float]]:
    """Accuracy of each model on each held-out set, all of them problems of other seeds."""
    sets = {
        name: make_problems(count, seed=seed, mix=mix)
        for seed, (name, (count, mix)) in enumerate(HELD_OUT.items(), start=SEED + 100)
    }
    owners = [name for name, problems in sets.items() for _ in problems]
    problems = [problem for group in sets.values() for problem in group]
    rows = write_problems(output_dir / "held-out.jsonl", problems)
    accuracy: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        result = evaluate(
            EvaluateConfig(
                model=str(model),
                dataset=str(rows),
                output_dir=str(output_dir / "evaluation" / model.name),
                grade="number",
                max_new_tokens=MAX_NEW_TOKENS,
            )
        )
        verdicts = pq.read_table(result.answers).select(["row_id", "verdict"]).to_pylist()
        right = Counter(owners[line["row_id"]] for line in verdicts if line["verdict"] == "right")
        accuracy[name] = {held_out: right[held_out] / len(sets[held_out]) for held_out in sets}
    return accuracy


def write_results(output_dir: Path, results: Mapping[str, Any]) -> Path:
    """Write results as JSON; what could not be measured (NaN) becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return str(value) if isinstance(value, Path) else value

    path = output_dir / RESULTS
    path.write_text(json.dumps(plain(results), indent=2) + "\n", encoding="utf-8")
    return path
