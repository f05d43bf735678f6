"""Measures the time, memory and disk that a row of `leaf detect` takes beside the models.

    python benchmarks/scale.py --dataset train.jsonl --tokenizer ./student

Each part runs in a process of its own, so that its memory is its own. A dataset of fewer rows is
repeated, each time with other numbers at the ends of the prompts. The norms that the models would
give are random; everything behind them is the real thing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import ROLES, Example
from leaf_distill.data.prompt import Renderer
from leaf_distill.detection.cache import FILE, RowCache
from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.counterfactual import propose
from leaf_distill.detection.output import write_dataset, write_samples
from leaf_distill.detection.spans import find_spans
from leaf_distill.io import digest
from leaf_distill.models.tokenizer import load_tokenizer

BATCH = 64  # rows of one transaction
SIZE = 640  # bytes of a value: the norms of 160 tokens
Line = tuple[str, int, float, float, float | None, float | None]
"""Part, rows, seconds, processor seconds, bytes of memory and of disk a row."""


def resident() -> int:
    """Return the bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def timed(lines: list[Line], part: str, rows: int, run: Callable[[], Any], *, disk: bool) -> Any:
    """Run one part and add its line; with `disk` its result is the bytes that it wrote."""
    memory, start, used = resident(), time.perf_counter(), time.process_time()
    result = run()
    seconds, used = time.perf_counter() - start, time.process_time() - used
    grown, written = (None, result / rows) if disk else ((resident() - memory) / rows, None)
    lines.append((part, rows, seconds, used, grown, written))
    return result


def measure_cache(rows: int, size: int) -> list[Line]:
    """Store and read values of `size` bytes, in transactions as the passes make them."""
    lines: list[Line] = []
    keys = [digest([at]) for at in range(rows)]
    values = np.random.default_rng(0).bytes(size + rows)
    with tempfile.TemporaryDirectory() as place, RowCache(Path(place)) as cache:

        def put() -> int:
            for at in range(0, rows, BATCH):
                part = range(at, min(at + BATCH, rows))
                cache.put({keys[one]: values[one : one + size] for one in part})
            return (Path(place) / FILE).stat().st_size

        timed(lines, f"cache, put, {size} bytes", rows, put, disk=True)
        found = timed(lines, f"cache, get, {size} bytes", rows, lambda: cache.get(keys), disk=False)
        assert all(found[key] == values[at : at + size] for at, key in enumerate(keys))
    return lines


def repeated(path: str, rows: int) -> list[dict[str, Any]]:
    """Return the first `rows` rows, from the start again where there are fewer."""
    found = load_examples(path, max_rows=rows)
    return [
        {
            "prompt": f"{found[at % len(found)].user_text} ({at})",
            "completion": found[at % len(found)].completion,
        }
        for at in range(rows)
    ]


def measure_rows(path: str, tokenizer: str, rows: int) -> list[Line]:
    """Read, render, detect, cut and write."""
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in repeated(path, rows)))
        renderer = Renderer(load_tokenizer(tokenizer))
        load_examples(str(file), max_rows=100)  # imports
        examples = timed(lines, "read", rows, lambda: load_examples(str(file)), disk=False)
        timed(lines, "render, once for both", rows, lambda: render(examples, renderer), disk=False)
        tokens = sum(len(one.renderings["student"]) for one in examples) / rows
        draw = np.random.default_rng(0)
        for one in examples:
            for role in ROLES:
                one.nll[role] = 1.0
                size = int(one.renderings[role].domain.sum())
                one.norms[role] = draw.random(size, np.float32) ** 2
        config = DetectConfig(threshold=0.02)
        timed(lines, "detect", rows, lambda: find_spans(examples, config), disk=False)
        timed(lines, "cut, render cuts", rows, lambda: cut(examples, renderer), disk=False)

        def write(make: Callable[..., Path]) -> int:
            before = size_of(Path(place))
            make(Path(place), examples)
            return size_of(Path(place)) - before

        timed(lines, "write the dataset", rows, lambda: write(write_dataset), disk=True)
        timed(lines, "write the samples", rows, lambda: write(write_samples), disk=True)
        cuts = sum(len(one.candidates) for one in examples) / rows
        lines.append((f"(a row: {tokens:.0f} tokens, {cuts:.1f} cuts)", rows, 0.0, 0.0, None, None))
    return lines


def size_of(place: Path) -> int:
    return sum(one.stat().st_size for one in place.iterdir())


def render(examples: list[Example], renderer: Renderer) -> None:
    for example in examples:
        example.renderings = dict.fromkeys(ROLES, renderer.render(example))


def cut(examples: list[Example], renderer: Renderer) -> None:
    for example in examples:
        propose(example, strategy="span", seed=0, perplexity=None)
        for candidate in example.candidates:
            candidate.renderings = dict.fromkeys(ROLES, renderer.prompt(candidate))


def apart(function: Callable[..., list[Line]], *arguments: Any) -> list[Line]:
    """Return what a function gives in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(function, arguments)


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    return next(line.split(": ")[1] for line in text.splitlines() if "model name" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description="measure what a row costs beside the models")
    parser.add_argument("--dataset", required=True, help="rows, as `leaf detect` reads them")
    parser.add_argument("--tokenizer", required=True, help="of both models")
    parser.add_argument("--rows", type=int, default=20_000, help="rows to read and render")
    parser.add_argument("--cache_rows", type=int, default=1_000_000, help="rows to store")
    options = parser.parse_args()
    lines = apart(measure_rows, options.dataset, options.tokenizer, options.rows)
    lines += apart(measure_cache, options.cache_rows, SIZE)
    packages = ", ".join(f"{name} {version(name)}" for name in ("leaf-distill", "transformers"))
    print("# The cost of a row beside the models\n")
    print(f"- {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print(f"- Python {platform.python_version()}, {packages}, tokenizers {version('tokenizers')}")
    print(f"- command: `python benchmarks/scale.py --rows {options.rows}", end="")
    print(f" --cache_rows {options.cache_rows} --dataset ... --tokenizer ...`")
    print("- one process, one thread; memory is what the part added to the process, in bytes\n")
    print("| part | rows | s | processor s | rows / processor s | memory a row | disk a row |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for part, rows, seconds, used, memory, disk in lines:
        speed = f"{rows / used:,.0f}" if used else "-"
        memory_text, disk_text = (f"{one:,.0f}" if one else "-" for one in (memory, disk))
        numbers = f"{rows:,} | {seconds:.1f} | {used:.1f} | {speed} | {memory_text} | {disk_text}"
        print(f"| {part} | {numbers} |")


if __name__ == "__main__":
    main()
