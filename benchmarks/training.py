"""Times distillation steps of several contenders in turn, in one run, on equal rows.

    python benchmarks/training.py TEACHER STUDENT ROWS.jsonl [--batch 8] [--steps 6] [--threads 2]
        [--lengths mixed|like] [--dtype float32|bfloat16] [--contenders packed,padded,plain,trl]
        [--columns '{"prompt": "question", "completion": "answer"}'] [--output FILE.md]
        [--device cpu|cuda]

TEACHER and STUDENT are model directories; `examples/smollm2.py` makes a pair (that of
`results/` has LAYERS = 10). A step is the
teacher's forward pass, and the student's forward and backward pass, of one batch; the optimizer,
whose time no contender changes, is left out. Each batch goes to all contenders in turn, whose order
changes from step to step. The contenders:

packed: `LeafTrainer` as it is by default: rows one after the other, without padding.
padded: the same with `packing` off.
plain: the loss as one writes it first, in transformers' Trainer: both models' logits at all
    positions, float32 log-softmaxes at the labels, kl_div.
trl: the experimental GKDTrainer of TRL with lmbda 0 and beta 0, where TRL is installed (in this
    repository: `make .venv/.trl`, then .venv/trl/bin/python).

Rows of like length are the same rows, sorted. With bfloat16 all contenders run under autocast, with
the teacher's weights in bfloat16.

No speed is shown of a contender whose loss or gradient is another than the first one's. Both the
time that passed and the processors' own seconds are shown; ratios are of the latter, which other
programs on the machine change less. Memory is the peak of the process's resident memory above what
it was before, gradients included, in a step of the batch with the most tokens that is not timed.
The memory pool in which LeafTrainer trains on a CPU begins anew with each of its steps here.

With `--device cuda` seconds are those until the GPU is idle, ratios are of them, and memory is what
torch allocates there.
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
# A build that is on the path comes before the sources.
sys.path += [str(ROOT / "python"), str(ROOT)]
COLUMNS = '{"prompt": "question", "completion": "answer"}'

Step = Callable[[Sequence[Any]], float]
"""Takes the examples of a batch, adds to the student's gradients, and returns the loss."""


@dataclass
class Contender:
    """A way to make a step, and its measures: of each step, and the memory of one."""

    name: str
    step: Step
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    mib: float = 0.0
    loss: float = 0.0
    gradient: float = 0.0

    def weigh(self, student: Any, batch: Sequence[Any], on_gpu: bool) -> None:
        """Make a step that is not timed: the C library gives its memory back for this."""
        from memory import peak_extra_gpu_mib, peak_extra_mib

        student.zero_grad(set_to_none=True)
        self.mib = (peak_extra_gpu_mib if on_gpu else peak_extra_mib)(self.step, batch) or 0.0

    def run(self, student: Any, batch: Sequence[Any], on_gpu: bool) -> None:
        import torch

        student.zero_grad(set_to_none=True)
        started, worked = time.perf_counter(), time.process_time()
        self.loss = self.step(batch)
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - worked)
        gradients = [one.grad for one in student.parameters() if one.grad is not None]
        self.gradient = float(sum(float(one.double().square().sum()) for one in gradients) ** 0.5)

    def compared(self, device: str) -> list[float]:
        """Return the seconds that contenders are compared by: on a CPU the processors' own."""
        return self.cpu_seconds if device == "cpu" else self.seconds

    def check(self, first: Contender, factor: float) -> None:
        """Refuse a step that is not the first contender's, beyond rounding.

        Args:
            first: the contender that made its step on the same batch.
            factor: 1 in float32, more for what rounds more.
        """
        for name, tolerance in (("loss", 1e-5 * factor), ("gradient", 1e-4 * factor)):
            ours, theirs = getattr(first, name), getattr(self, name)
            if not abs(ours - theirs) <= tolerance * abs(ours):
                raise AssertionError(f"{name}: {first.name} has {ours}, {self.name} {theirs}")


def leaf_contenders(trainer: Any) -> list[Contender]:
    """Return `LeafTrainer` with rows one after the other, and padded."""
    from leaf_distill.data.collator import collate

    def step(packing: bool) -> Step:
        def run(batch: Sequence[Any]) -> float:
            trainer.args.packing = packing
            made = iter([collate(batch)])
            with trainer.running():
                batches, counts = trainer.get_batch_samples(made, 1, trainer.args.device)
                return float(trainer.training_step(trainer.model, batches[0], counts))

        return run

    return [Contender("packed", step(True)), Contender("padded", step(False))]


def other_contender(name: str, arguments: argparse.Namespace, leaf: Any) -> Contender:
    """Return another trainer's step, of the same student and a teacher of its own."""
    import torch

    from leaf_distill.data.collator import collate
    from leaf_distill.models.loading import load_model

    teacher = load_model(arguments.teacher, dtype=arguments.dtype, device=arguments.device)
    teacher.requires_grad_(False).eval()
    make = plain_trainer if name == "plain" else trl_trainer
    trainer = make(arguments, leaf.model, teacher, leaf.processing_class)

    def run(batch: Sequence[Any]) -> float:
        made = collate(batch)
        ids, at = made["input_ids"], made["loss_mask"]
        labels = torch.full_like(ids, -100)
        labels[:, 1:] = torch.where(at[:, :-1], ids[:, 1:], -100)
        inputs = {"input_ids": ids, "attention_mask": made["attention_mask"], "labels": labels}
        return float(trainer.training_step(leaf.model, inputs, at.sum()))

    return Contender(name, run)


def plain_trainer(arguments: argparse.Namespace, student: Any, teacher: Any, _: Any) -> Any:
    import torch
    from torch.nn.functional import kl_div, log_softmax
    from transformers import Trainer, TrainingArguments

    class PlainTrainer(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = 1
        ) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            with torch.no_grad():
                target = teacher(**inputs).logits
            at = labels[:, 1:] != -100
            ours = log_softmax(logits[:, :-1][at].float(), dim=-1)
            theirs = log_softmax(target[:, :-1][at].float(), dim=-1)
            return kl_div(ours, theirs, reduction="sum", log_target=True) / num_items_in_batch

    trainer = PlainTrainer(student, TrainingArguments(**shared(arguments)))
    trainer.model_accepts_loss_kwargs = True
    return trainer


def trl_trainer(arguments: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any) -> Any:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return GKDTrainer(
        student,
        teacher,
        GKDConfig(**shared(arguments), lmbda=0.0, beta=0.0, temperature=1.0),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"messages": turns}]),  # it wants one
    )


def shared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of all trainers."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": arguments.device == "cpu",
        "bf16": arguments.dtype == "bfloat16",
        "per_device_train_batch_size": arguments.batch,
        "report_to": "none",
        "disable_tqdm": True,
    }


def make_trainer(arguments: argparse.Namespace) -> Any:
    from leaf_distill import LeafConfig
    from leaf_distill.data.dataset import load_examples
    from leaf_distill.training.trainer import LeafTrainer

    rows = load_examples(
        arguments.dataset,
        columns=json.loads(arguments.columns),
        max_rows=arguments.batch * arguments.steps,
    )
    config = LeafConfig(originals_per_step=arguments.batch, **shared(arguments))
    trainer = LeafTrainer(arguments.student, arguments.teacher, config, rows)
    trainer.accelerator.prepare_model(trainer.model)  # which has autocast run in its forward
    return trainer


def compare(arguments: argparse.Namespace) -> str:
    """Measure all contenders; return the page."""
    import torch

    torch.set_num_threads(arguments.threads)
    trainer = make_trainer(arguments)
    examples = trainer.train_dataset.examples
    if arguments.lengths == "like":
        examples = sorted(examples, key=lambda one: len(one.renderings["student"]))
    lengths = [len(one.renderings["student"]) for one in examples]
    known = {one.name: one for one in leaf_contenders(trainer)}
    contenders = [
        known[name] if name in known else other_contender(name, arguments, trainer)
        for name in arguments.contenders.split(",")
    ]
    starts = range(0, len(examples) - arguments.batch + 1, arguments.batch)
    sizes = {start: sum(lengths[start : start + arguments.batch]) for start in starts}
    largest = max(sizes, key=lambda start: sizes[start])
    for contender in contenders:
        contender.step(examples[:2])  # a warm-up
        batch = examples[largest : largest + arguments.batch]
        contender.weigh(trainer.model, batch, arguments.device == "cuda")
    for turn, start in enumerate(starts):
        shift = turn % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            batch = examples[start : start + arguments.batch]
            contender.run(trainer.model, batch, arguments.device == "cuda")
        for contender in contenders[1:]:
            contender.check(contenders[0], 300 if arguments.dtype == "bfloat16" else 1)
        shown = {one.name: round(one.compared(arguments.device)[-1], 2) for one in contenders}
        print(f"batch {turn}: {shown}", file=sys.stderr, flush=True)
    tokens = list(sizes.values())
    widest = [max(lengths[start : start + arguments.batch]) for start in starts]
    padding = 1 - sum(tokens) / (arguments.batch * sum(widest))
    return page(contenders, tokens, padding, arguments)


def page(
    contenders: Sequence[Contender],
    tokens: Sequence[int],
    padding: float,
    arguments: argparse.Namespace,
) -> str:
    import torch
    from stage1 import cpu_name

    on_gpu, device = arguments.device == "cuda", arguments.device
    machine = torch.cuda.get_device_name() if on_gpu else cpu_name()
    seconds = "Seconds" if on_gpu else "CPU seconds"
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        f"# Distillation steps on a {'GPU' if on_gpu else 'CPU'}",
        "",
        f"- {time.strftime('%Y-%m-%d')}, {machine}, {arguments.threads} threads, Python "
        f"{platform.python_version()}, {versions}",
        f"- {len(tokens)} batches of {arguments.batch} rows of {Path(arguments.dataset).name}, "
        f"{min(tokens)} to {max(tokens)} tokens a batch; padded, {padding:.0%} of the tokens of a "
        "batch would be padding",
        f"- command: `python {command}`",
        "",
        f"| contender | tokens / s | {seconds} a step | MiB above the weights | "
        f"{seconds} / {contenders[0].name} |",
        "|---|---:|---:|---:|---:|",
    ]
    first = contenders[0].compared(device)
    for one in contenders:
        speed = median(n / s for n, s in zip(tokens, one.seconds, strict=True))
        own = one.compared(device)
        ratio = median(ours / theirs for ours, theirs in zip(own, first, strict=True))
        lines.append(
            f"| {one.name} | {speed:.0f} | {median(own):.2f} | {one.mib:.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("dataset")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--lengths", default="mixed", choices=("mixed", "like"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--contenders", default="packed,padded,plain")
    parser.add_argument("--columns", default=COLUMNS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    text = compare(arguments)
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
