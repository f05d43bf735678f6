"""All benchmarks of a GPU within a budget of time; the results as JSON and as a page.

    python -m on_gpu OUTPUT [--seconds 240] [--command TEXT] [--tiny]

Exit status 1: one of our own kernels failed, or gave a wrong result.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from steps import exit_when_told

from . import machine, supervise
from .report import file_name, page

_RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--command", default="python -m on_gpu")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    exit_when_told()  # with the worker
    rows = supervise.run(output / "rows.jsonl", arguments.seconds, arguments.tiny)
    data = {
        "gpu": machine.gpu_name(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": arguments.command,
        "machine": machine.facts(),
        "kernels": machine.kernel_resources(),
        "rows": rows,
    }
    (output / "results.json").write_text(json.dumps(data, indent=1))
    (output / "rows.jsonl").unlink()
    text, name = page(data), file_name(data["gpu"])
    (output / name).write_text(text)
    if not arguments.tiny:
        (_RESULTS / name).write_text(text)
    print(text)
    counts = Counter(row["status"] for row in rows)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    ours = [row for row in rows if row["variant"].startswith(("cuda", "triton"))]
    return int(any(row["status"] in ("failed", "refused") for row in ours))


if __name__ == "__main__":
    sys.exit(main())
