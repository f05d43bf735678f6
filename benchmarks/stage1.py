"""Times saliency beside a bare pass and the release's loop, each in a fresh process, in turn.

    python benchmarks/stage1.py TEACHER STUDENT ROWS.jsonl [--rows 64] [--rounds 2] [--threads 2]
        [--columns '{"prompt": "question", "completion": "answer"}'] [--output FILE.md]

TEACHER and STUDENT are model directories; `examples/smollm2.py` makes a pair (that of
`results/` has LAYERS = 10). The contenders:

ours: `leaf_distill.models.saliency.saliency` with the batches of `leaf detect`; `ours 512` with
    batches of 512 tokens.
bare: a forward pass and a backward pass to the input embeddings, weights frozen, nothing else; at
    several batch sizes; with full logits and an attention mask, as one writes it first, or with
    logits at the labels alone and no mask, which padding at the end needs none of. The best counts.
release: the official loop with its faults mended: one row at a time, weights with gradients that
    are never set to zero, full logits.

Both the time that passed and the processors' own seconds are shown; ratios are of the latter, which
other programs on the machine change less. Memory is the peak of the process's resident memory above
the loaded weights, as Linux counts it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "python"), str(ROOT)]
RESULTS = Path(__file__).parent / "results"
OURS, RELEASE = "ours", "release"
BARE = ("bare full 512", "bare labels 1", "bare labels 512", "bare labels 1024")
COLUMNS = '{"prompt": "question", "completion": "answer"}'


def worker(contender: str, directory: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure one contender on one model in this process."""
    import torch
    from memory import peak_extra_mib

    from leaf_distill.data.collator import plan_batches
    from leaf_distill.data.dataset import load_examples
    from leaf_distill.detection.answers import prompted_model
    from leaf_distill.detection.config import DetectConfig
    from leaf_distill.models.loading import LazyModel

    torch.set_num_threads(arguments.threads)
    model = prompted_model("student", LazyModel(directory, device="cpu"), DetectConfig())
    examples = load_examples(
        arguments.dataset, columns=json.loads(arguments.columns), max_rows=arguments.rows
    )
    rows = [model.renderer.render(example) for example in examples]
    loaded: Any = model.model.load()
    size = {OURS: model.batch_tokens(DetectConfig()), RELEASE: 1}.get(contender)
    size = int(contender.split()[-1]) if size is None else size
    plan = plan_batches([len(row) for row in rows], max_tokens=size)
    run = contender_pass(contender, loaded)
    run([min(rows, key=len)])  # a warm-up

    found: dict[str, float] = {"tokens": sum(map(len, rows))}

    def measure() -> None:
        start, worked = time.perf_counter(), time.process_time()
        for batch in plan:
            run([rows[at] for at in batch])
        found["seconds"] = time.perf_counter() - start
        found["cpu_seconds"] = time.process_time() - worked

    if contender == RELEASE:  # the gradients of the weights count as memory of the loop
        loaded.zero_grad(set_to_none=True)
    found["mib"] = peak_extra_mib(measure) or 0.0
    return found


def contender_pass(contender: str, model: Any) -> Callable[[Sequence[Any]], object]:
    """Return the function that makes the norms of some rows."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    from leaf_distill.data.collator import pad
    from leaf_distill.models.saliency import saliency

    if contender.split()[0] == OURS:
        return lambda rows: saliency(model, rows)
    if contender == RELEASE:

        def release(rows: Sequence[Any]) -> object:
            (row,) = rows
            ids = torch.from_numpy(row.input_ids).long()[None]
            labels = ids.masked_fill(~torch.from_numpy(row.loss_mask)[None], -100)
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            model(inputs_embeds=embedded, labels=labels).loss.backward()
            assert embedded.grad is not None
            return np.linalg.norm(embedded.grad[0].numpy(), axis=-1)

        return release

    model.requires_grad_(False)
    labels_only = "labels" in contender

    def bare(rows: Sequence[Any]) -> object:
        batch = pad(rows)
        ids, at = batch["input_ids"], batch["loss_mask"]
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        arguments = {"inputs_embeds": embedded, "use_cache": False}
        if labels_only:
            logits = model.lm_head(model.model(**arguments).last_hidden_state[at])
        else:
            logits = model(**arguments, attention_mask=batch["attention_mask"]).logits[at]
        loss = cross_entropy(logits.float(), ids.roll(-1, 1)[at], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, embedded)
        return gradient.norm(dim=-1).numpy()

    return bare


def measured(contender: str, directory: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run `worker` in a fresh process."""
    threads = str(arguments.threads)
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--worker", contender, directory],
        env=os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(arguments: argparse.Namespace) -> str:
    """Measure all contenders on both models; return the page."""
    best: dict[tuple[str, str], dict[str, float]] = {}
    models = {"teacher": arguments.teacher, "student": arguments.student}
    for _ in range(arguments.rounds):
        for role, directory in models.items():
            for contender in arguments.contenders.split(","):
                found = measured(contender, directory, arguments)
                old = best.setdefault((role, contender), found)
                for name in ("seconds", "cpu_seconds", "mib"):
                    old[name] = min(old[name], found[name])
                print(role, contender, found, file=sys.stderr, flush=True)
    return page(best, arguments)


def page(best: dict[tuple[str, str], dict[str, float]], arguments: argparse.Namespace) -> str:
    command = " ".join(Path(word).name if "/" in word else word for word in sys.argv)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [
        "# Saliency on a CPU",
        "",
        f"- {time.strftime('%Y-%m-%d')}, {cpu_name()}, {arguments.threads} threads, Python "
        f"{platform.python_version()}, {versions}",
        f"- {arguments.rows} rows of {Path(arguments.dataset).name}; the best of "
        f"{arguments.rounds} rounds, each contender in a fresh process, in turn",
        f"- command: `python {command}`",
        "",
        "`ours`: the passes of `leaf detect`. `bare`: one forward pass, and one backward pass to "
        "the embeddings, with full logits and a mask or logits at the labels and no mask, and so "
        "many tokens a batch. "
        "`release`: the loop of the paper's authors with its faults mended, one row at a time, "
        "with gradients of all weights.",
        "",
        "| model | contender | seconds | CPU seconds | MiB above the weights | "
        "CPU seconds / ours | MiB / ours |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for (role, contender), found in best.items():
        ours = best[role, OURS]
        lines.append(
            f"| {role} | {contender} | {found['seconds']:.1f} | "
            f"{found['cpu_seconds']:.1f} | {found['mib']:.0f} | "
            f"{found['cpu_seconds'] / ours['cpu_seconds']:.2f} | {found['mib'] / ours['mib']:.2f} |"
        )
    lines += ["", "| model | ours / best bare | release / ours | memory, ours / release |"]
    lines.append("|---|---:|---:|---:|")
    for role in dict.fromkeys(role for role, _ in best):
        ours, release = best[role, OURS], best.get((role, RELEASE))
        bare = [found["cpu_seconds"] for (one, name), found in best.items()
                if one == role and name.startswith("bare")]  # fmt: skip
        lines.append(
            f"| {role} | {ours['cpu_seconds'] / min(bare) if bare else float('nan'):.2f} | "
            f"{release['cpu_seconds'] / ours['cpu_seconds'] if release else float('nan'):.2f} | "
            f"{ours['mib'] / release['mib'] if release else float('nan'):.2f} |"
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
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--columns", default=COLUMNS)
    parser.add_argument("--contenders", default=",".join((OURS, *BARE, RELEASE)))
    parser.add_argument("--output", type=Path, default=RESULTS / "stage1-cpu.md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(*arguments.worker, arguments)))
        return
    text = compare(arguments)
    arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
