"""evalplus's own verdicts; runs in the environment of the harnesses, never in LeaF's.

    python evalplus_verdicts.py PROGRAMS.jsonl > VERDICTS.jsonl

A line of the input has `dataset` ("humaneval" or "mbpp"), `task_id` and `program`; a line of the
output is evalplus's status ("pass", "fail" or "timeout") on the `base` and the `plus` inputs, in
the same order. HUMANEVAL_OVERRIDE_PATH and MBPP_OVERRIDE_PATH name the files of the datasets.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# evalplus reads the clock: on a busy machine its own limits, 1 s and 4 times, fail right programs.
PATIENCE = {"min_time_limit": 4.0, "gt_time_limit_factor": 10.0}
READERS = {"humaneval": "get_human_eval_plus", "mbpp": "get_mbpp_plus"}


def judge(dataset: str, problem: dict[str, Any], programs: list[str]) -> list[dict[str, str]]:
    """Return evalplus's verdicts on programs for one problem."""
    from evalplus import evaluate

    not_none = evaluate.MBPP_OUTPUT_NOT_NONE_TASKS if dataset == "mbpp" else []
    task_id = problem["task_id"]
    # A problem at a time and no file kept: the values of all problems take a gigabyte.
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(sys.stderr):
        evaluate.CACHE_DIR = cache
        expected = evaluate.get_groundtruth({task_id: problem}, "values", not_none)[task_id]
    found = [
        evaluate.check_correctness(
            dataset, 0, problem, program, expected, fast_check=True, **PATIENCE
        )
        for program in programs
    ]
    return [{part: result[part][0] for part in ("base", "plus")} for result in found]


def main() -> None:
    import evalplus.data

    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    indices: dict[tuple[str, str], list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault((row["dataset"], row["task_id"]), []).append(index)
    problems = {
        name: getattr(evalplus.data, READERS[name])() for name in {name for name, _ in indices}
    }
    verdicts: dict[int, dict[str, str]] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tasks = {
            pool.submit(
                judge, name, problems[name][task_id], [rows[i]["program"] for i in of_task]
            ): of_task
            for (name, task_id), of_task in indices.items()
        }
        for task, of_task in tasks.items():
            verdicts.update(zip(of_task, task.result(), strict=True))
    for index in range(len(rows)):
        print(json.dumps(verdicts[index]))


if __name__ == "__main__":
    main()
