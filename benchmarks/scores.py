"""Times the scores of prompt tokens on one model, row by row, and writes a table.

    python benchmarks/scores.py --model DIRECTORY --dataset FILE.jsonl [--rows 16]

Gradients, likelihoods and interventions of each row are timed in turn, in one run. Interventions
are checked against whole sequences on every row before their time counts. The table is printed and
written to benchmarks/results/scores-cpu.md.
"""

from __future__ import annotations

import argparse
import platform
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, Ids
from leaf_distill.detection.answers import PromptedModel, prompted_model
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import changed
from leaf_distill.detection.substitution import Vocabulary
from leaf_distill.detection.units import words
from leaf_distill.models import intervention
from leaf_distill.models.intervention import answer_kl
from leaf_distill.models.loading import LazyModel
from leaf_distill.models.saliency import saliency, token_nll

RESULTS = Path(__file__).parent / "results" / "scores-cpu.md"
BASE, WHOLE = "gradient (gap)", "intervention, whole sequences"


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def prompts(
    scored: PromptedModel, example: Example, vocabulary: Vocabulary, units: int, draws: int
) -> list[Ids]:
    """Return changed prompts: some replacements of words that lie evenly over the text."""
    draw, found = random.Random(example.row_id), words(example.text, example.parts)
    chosen = [found[at] for at in np.linspace(0, len(found) - 1, units).astype(int)]
    changes = []
    for one in chosen:
        for _ in range(draws):
            other = vocabulary.replace(example.text, one, draw)
            edited = changed(example, [one], () if other is None else [other])
            changes.append(scored.prompt(edited).input_ids)
    return changes


def whole(call: Callable[[], Any]) -> Any:
    """Run without the reuse of a prefix."""
    reuse = intervention.can_reuse
    intervention.can_reuse = lambda model: False
    try:
        return call()
    finally:
        intervention.can_reuse = reuse


def measure(
    arguments: argparse.Namespace,
) -> tuple[dict[str, list[tuple[float, float]]], list[int]]:
    config = DetectConfig(max_batch_tokens=arguments.max_batch_tokens)
    scored = prompted_model("student", LazyModel(arguments.model, device="cpu"), config)
    examples = load_examples(arguments.dataset, max_rows=20 * arguments.rows)
    vocabulary = Vocabulary(example.text for example in examples)
    short = [one for one in examples if len(scored.renderer.render(one)) <= arguments.max_tokens]
    model, times, lengths = scored.model.load(), {}, []
    for number, example in enumerate(short[: arguments.rows]):
        row = scored.renderer.render(example)
        changes = prompts(scored, example, vocabulary, arguments.units, arguments.draws)
        calls: dict[str, Callable[[], Any]] = {
            BASE: lambda row=row: saliency(model, [row]),
            "likelihood (lens)": lambda row=row: token_nll(model, [row]),
            "intervention": lambda row=row, changes=changes: answer_kl(
                model, row, changes, max_tokens=arguments.max_batch_tokens
            ),
            WHOLE: lambda row=row, changes=changes: whole(
                lambda: answer_kl(model, row, changes, max_tokens=arguments.max_batch_tokens)
            ),
        }
        if number >= arguments.whole:
            del calls[WHOLE]
        found = {name: timed(call) for name, call in calls.items()}
        if WHOLE in found:
            reused, exact = (found[name][1] for name in ("intervention", WHOLE))
            if not np.allclose(reused, exact, rtol=1e-3, atol=1e-5):
                raise SystemExit(f"row {example.row_id}: {reused} reused, {exact} whole")
        if number:  # the first row warms up
            lengths.append(len(row))
            for name, (seconds, _) in found.items():
                times.setdefault(name, []).append((seconds, found[BASE][0]))
        print(example.row_id, {name: round(one[0], 2) for name, one in found.items()}, flush=True)
    return times, lengths


def table(
    times: dict[str, list[tuple[float, float]]],
    lengths: Sequence[int],
    arguments: argparse.Namespace,
) -> str:
    cpu = Path("/proc/cpuinfo")
    model_name = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    machine = model_name[1] if model_name else platform.machine()
    lines = [
        "# Scores of prompt tokens on a CPU",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d}, {machine}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}",
        f"- {Path(arguments.model).name}, {len(lengths)} rows of {Path(arguments.dataset).name} "
        f"behind one that warms up; {min(lengths)} to {max(lengths)} tokens, median "
        f"{statistics.median(lengths):.0f}; {arguments.units} words, {arguments.draws} draws",
        f"- command: `python benchmarks/scores.py {shlex.join(sys.argv[1:])}`",
        "",
        "One model; both have to run. The ratio is the median over the rows of a time divided by "
        "that of the same row's gradients, with the lowest and highest. The first interventions "
        "were compared with whole sequences.",
        "",
        "| score | rows | median ms a row | x gradient |",
        "|---|---:|---:|---:|",
    ]
    for name, pairs in times.items():
        ratios = [one / base for one, base in pairs]
        median = statistics.median(one for one, _ in pairs) * 1e3
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        lines.append(f"| {name} | {len(pairs)} | {median:.0f} | {spread} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the scores of prompt tokens.")
    parser.add_argument("--model", required=True, help="directory of a model")
    parser.add_argument("--dataset", required=True, help="rows with prompts and completions")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--max_tokens", type=int, default=4096, help="longest row")
    parser.add_argument("--whole", type=int, default=4, help="first rows that run whole, too")
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--max_batch_tokens", type=int, default=1024)
    arguments = parser.parse_args()
    result = table(*measure(arguments), arguments)
    RESULTS.write_text(result)
    print(result)


if __name__ == "__main__":
    main()
