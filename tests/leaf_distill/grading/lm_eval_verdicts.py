"""lm-eval's verdicts on given answers; runs in the environment of the harnesses, never in LeaF's.

    python lm_eval_verdicts.py TASKS_FOLDER TASK ANSWERS.jsonl SAMPLES.jsonl

The answers, one text a line, stand for a model's, in the order of the task's rows. The samples that
lm-eval logs are written, one a line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager


class Said(LM):
    """Has said everything before."""

    def __init__(self, answers: list[str]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.answers[request.doc_id] for request in requests]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError("it generates only")

    loglikelihood_rolling = loglikelihood


def main() -> None:
    folder, task, answers, samples = sys.argv[1:]
    said = Said([json.loads(line) for line in Path(answers).read_text().splitlines()])
    tasks = TaskManager(include_path=folder)
    result = lm_eval.simple_evaluate(said, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    lines = [json.dumps(sample, default=str) + "\n" for sample in result["samples"][task]]
    Path(samples).write_text("".join(lines))


if __name__ == "__main__":
    main()
