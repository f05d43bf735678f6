"""One process of a `leaf detect` that several share; a launcher starts this script.

`torchrun shard_run.py CONFIG.yaml PLAN.json`: the plan gives a rank further options, and the number
of batches after whose storing it kills itself: {"1": {"options": [...], "kill_after": 2}}. Each
rank writes to `output_dir`.RANK what it computed, and what torch.distributed was left as.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import detect_pair
import torch.distributed

from leaf_distill.cli import main
from leaf_distill.detection import answers, scores


def count_rows(module: Any, name: str, passes: dict[str, int]) -> None:
    """Let `passes` count the rows that a function of a module passes a model over."""
    run = getattr(module, name)

    def counted(*args: Any, **options: Any) -> Any:
        found = run(*args, **options)
        passes[name] = passes.get(name, 0) + len(found)
        return found

    setattr(module, name, counted)


if __name__ == "__main__":
    rank = os.environ.get("RANK", "0")
    plan = json.loads(Path(sys.argv[2]).read_text()).get(rank, {})
    if "kill_after" in plan:
        detect_pair.kill_after(plan["kill_after"])
    rows: dict[str, int] = {}
    count_rows(answers, "generate", rows)
    count_rows(scores, "saliency", rows)
    status = main(["detect", "--config", sys.argv[1], *plan.get("options", [])])
    left = torch.distributed.is_initialized()
    done = {"status": status, "rows": rows, "initialized": left}
    Path(f"{sys.argv[1]}.{rank}.json").write_text(json.dumps(done))
    sys.exit(status)
