"""Times distillation steps of several contenders in turn, in one run, on equal rows.

    python benchmarks/training.py TEACHER STUDENT ROWS.jsonl [--batch 8] [--steps 6] [--threads 2]
        [--columns '{"prompt": "question", "completion": "answer"}'] [--output FILE.md]

TEACHER and STUDENT are model directories; `examples/smollm2.py` makes a pair. A step is the
teacher's forward pass, and the student's forward and backward pass, of one batch; the optimizer,
whose time no contender changes, is left out. Each batch goes to all contenders in turn, whose order
changes from step to step. The contenders:

packed: `LeafTrainer` as it is by default: rows one after the other, without padding.
padded: the same with `packing` off.

No speed is shown of a contender whose loss or gradient is another than the first one's. Both the
time that passed and the processors' own seconds are shown; ratios are of the latter, which other
programs on the machine change less. Memory is the peak of the process's resident memory during a
step above what it was before, gradients included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
COLUMNS = '{"prompt": "question", "completion": "answer"}'

Step = Callable[[Sequence[Any]], float]
"""Takes the examples of a batch, adds to the student's gradients, and returns the loss."""


@dataclass
class Contender:
    """A way to make a step, and its measures, one for each step."""

    name: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    loss: float = 0.0
    gradient: float = 0.0

    def run(self, student: Any, batch: Sequence[Any]) -> None:
        from memory import peak_extra_mib

        def timed() -> None:
            started, worked = time.perf_counter(), time.process_time()
            self.loss = self.step(batch)
            self.seconds.append(time.perf_counter() - started)
            self.cpu_seconds.append(time.process_time() - worked)

        student.zero_grad(set_to_none=True)
        self.mib.append(peak_extra_mib(timed) or 0.0)
        gradients = [one.grad for one in student.parameters() if one.grad is not None]
        self.gradient = float(sum(float(one.double().square().sum()) for one in gradients) ** 0.5)

    def check(self, first: Contender) -> None:
        """Refuse a step that is not the first contender's, beyond rounding in float32."""
        for name, tolerance in (("loss", 1e-5), ("gradient", 1e-4)):
            ours, theirs = getattr(first, name), getattr(self, name)
            if not abs(ours - theirs) <= tolerance * abs(ours):
                raise AssertionError(f"{name}: {first.name} has {ours}, {self.name} {theirs}")


def leaf_contenders(trainer: Any) -> list[Contender]:
    """Return `LeafTrainer` with rows one after the other, and padded."""
    from leaf_distill.data.collator import collate

    def step(packing: bool) -> Step:
        def run(batch: Sequence[Any]) -> float:
            trainer.args.packing = packing
            with trainer.packing():
                batches, counts = trainer.get_batch_samples(iter([collate(batch)]), 1, "cpu")
                return float(trainer.training_step(trainer.model, batches[0], counts))

        return run

    return [Contender("packed", step(True)), Contender("padded", step(False))]


def make_trainer(arguments: argparse.Namespace) -> Any:
    from leaf_distill import LeafConfig
    from leaf_distill.data.dataset import load_examples
    from leaf_distill.training.trainer import LeafTrainer

    rows = load_examples(
        arguments.dataset,
        columns=json.loads(arguments.columns),
        max_rows=arguments.batch * arguments.steps,
    )
    config = LeafConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        originals_per_step=arguments.batch,
        per_device_train_batch_size=arguments.batch,
        report_to="none",
        disable_tqdm=True,
    )
    return LeafTrainer(arguments.student, arguments.teacher, config, rows)


def compare(arguments: argparse.Namespace) -> str:
    """Measure all contenders; return the page."""
    import torch

    torch.set_num_threads(arguments.threads)
    trainer = make_trainer(arguments)
    examples = trainer.train_dataset.examples
    lengths = [len(one.renderings["student"]) for one in examples]
    contenders = leaf_contenders(trainer)
    for contender in contenders:  # a warm-up
        contender.step(examples[:2])
    starts = range(0, len(examples) - arguments.batch + 1, arguments.batch)
    for turn, start in enumerate(starts):
        shift = turn % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            contender.run(trainer.model, examples[start : start + arguments.batch])
        for contender in contenders[1:]:
            contender.check(contenders[0])
        shown = {one.name: round(one.cpu_seconds[-1], 2) for one in contenders}
        print(f"batch {turn}: {shown}", file=sys.stderr, flush=True)
    tokens = [sum(lengths[start : start + arguments.batch]) for start in starts]
    widest = [max(lengths[start : start + arguments.batch]) for start in starts]
    padding = 1 - sum(tokens) / (arguments.batch * sum(widest))
    return page(contenders, tokens, padding, arguments)


def page(
    contenders: Sequence[Contender],
    tokens: Sequence[int],
    padding: float,
    arguments: argparse.Namespace,
) -> str:
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Distillation steps on a CPU",
        "",
        f"- {time.strftime('%Y-%m-%d')}, {cpu_name()}, {arguments.threads} threads, Python "
        f"{platform.python_version()}, {versions}",
        f"- {len(tokens)} batches of {arguments.batch} rows of {Path(arguments.dataset).name}, "
        f"{min(tokens)} to {max(tokens)} tokens a batch; padded, {padding:.0%} of the tokens of a "
        "batch would be padding",
        f"- command: `python {command}`",
        "",
        "| contender | tokens / s | CPU seconds a step | MiB above the weights | "
        f"CPU seconds / {contenders[0].name} |",
        "|---|---:|---:|---:|---:|",
    ]
    first = contenders[0].cpu_seconds
    for one in contenders:
        speed = median(n / s for n, s in zip(tokens, one.seconds, strict=True))
        ratio = median(ours / theirs for ours, theirs in zip(one.cpu_seconds, first, strict=True))
        lines.append(
            f"| {one.name} | {speed:.0f} | {median(one.cpu_seconds):.2f} | {max(one.mib):.0f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("dataset")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--columns", default=COLUMNS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = compare(arguments)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
