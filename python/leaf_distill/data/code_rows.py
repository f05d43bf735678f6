"""Turns the columns of datasets of programs into a prompt and a completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leaf_distill.data.python_source import fenced
from leaf_distill.data.tests import Tests

CODE_FIELDS = ("query", "question_content", "text")
"""Columns that hold the prompt of a row with tests."""

PROMPTS = ("prompt", "question_content", "question", "problem", "text")
SOLUTIONS = ("canonical_solution", "code")
OTHERS = ("messages", "conversations", "completion", "solution", "output")
"""Columns by which a row with tests is in one of the layouts of all rows."""


def as_conversation(fields: Mapping[str, Any], tests: Tests) -> dict[str, Any]:
    """Return the fields of a row with tests, with `prompt` and `completion` as any row has them.

    - LeetCodeDataset: `query` is the prompt and `completion` the solution; its column `prompt` is
      imports.
    - HumanEval, MBPP: `prompt` (`text`), and `canonical_solution` or `code`. Where the prompt is
      the head of the function, prompt and solution together are the completion.
    - LiveCodeBench, APPS: `question_content` or `question`, with the `starter_code`.

    A solution that comes without a Markdown fence gets one. Rows of another layout stay as they
    are.
    """
    told = {name for name, value in fields.items() if isinstance(value, str) and value.strip()}
    if "query" in told and told & {"test", "starter_code"}:
        solution = {"completion": fenced(fields["completion"])} if "completion" in told else {}
        return {**_without(fields, "completion"), "prompt": fields["query"], **solution}
    name = next((one for one in PROMPTS if one in told), None)
    if name is None or any(fields.get(other) for other in OTHERS):
        return dict(fields)
    prompt, starter = fields[name], fields.get("starter_code")
    if "starter_code" in told and starter not in prompt:
        code = fenced(str(starter).rstrip())
        prompt = f"{prompt.rstrip()}\n\nBegin with this code:\n\n{code}"
    reply: dict[str, str] = {}
    for column in SOLUTIONS:
        if column in told and not reply:
            head = tests.prefix if column == "canonical_solution" else ""
            reply = {"completion": fenced(head + fields[column])}
    if not reply and name not in CODE_FIELDS and prompt == fields[name]:
        return dict(fields)
    return {**_without(fields, name), "prompt": prompt, **reply}


def _without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
