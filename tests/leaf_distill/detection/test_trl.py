"""TRL trains on the dataset of `leaf detect` by the code of docs/guides/other-trainers.md."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import detected_rows
import harness
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from leaf_distill.data.messages import Message

DOCS = Path(__file__).parents[3] / "docs" / "guides" / "other-trainers.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
MESSAGES, TEXT = (block for block in BLOCKS if "SFTTrainer" in block)

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

pytestmark = pytest.mark.slow


def train(folder: Path, code: str, suffix: str) -> list[tuple[str, str]]:
    """Take a step as a block of the page says; return each row's text, and that of its labels."""
    loader = {".jsonl": '"json"', ".parquet": '"parquet"'}[suffix]
    code = code.replace('"parquet"', loader).replace("dataset.parquet", f"dataset{suffix}")
    code = code.replace('SFTConfig("trl")', 'SFTConfig("trl", use_cpu=True, max_steps=1)')
    (folder / "block.py").write_text(code)
    program = Path(__file__).parents[1] / "trl_step.py"
    printed = harness.run(program, "block.py", cwd=folder, within="trl")
    rows = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("ROW ")]
    decode = AutoTokenizer.from_pretrained(folder / "student").decode
    return [(decode(ids), decode([one for one in labels if one >= 0])) for ids, labels in rows]


def render(folder: Path, messages: list[Message], **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trl_reads_messages_and_trains_on_completions(
    tmp_path: Path, saved: Path, suffix: str
) -> None:
    lines = detected_rows.detected()
    for line in lines:  # columns that only some datasets have
        line |= {"tools": json.dumps(TOOLS), "source": "mine"}
    detected_rows.write(tmp_path, lines)
    kept = [line for line in lines if line["branch"] != "cross" and not line["context"]]
    assert len(kept) == 3
    assert train(tmp_path, MESSAGES, suffix) == [
        (
            render(tmp_path, line["prompt"] + line["completion"]),
            f"{detected_rows.RESPONSE}<|im_end|>\n",
        )
        for line in kept
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trl_reads_a_context_as_a_part_of_the_prompt(
    tmp_path: Path, saved: Path, suffix: str
) -> None:
    lines = detected_rows.detected()
    detected_rows.write(tmp_path, lines)
    found = train(tmp_path, TEXT, suffix)
    whole = [f"{detected_rows.RESPONSE}</s>"] * 3
    assert [labels for _, labels in found] == [*whole, " Tom has 7.</s>"]
    prompt = render(tmp_path, lines[-1]["prompt"], add_generation_prompt=True)
    assert found[-1][0] == f"{prompt}Let me think. Tom has 7.</s>"


def test_trl_trains_on_a_run_of_leaf_detect(
    tmp_path: Path, finished: Any, pair: dict[str, str]
) -> None:
    shutil.copytree(pair["student"], tmp_path / "student")
    shutil.copy(finished.dataset, tmp_path)
    rows = pq.read_table(finished.dataset).to_pylist()
    found = train(tmp_path, MESSAGES, ".parquet")
    assert [labels.split()[0] for _, labels in found] == [
        row["completion"][0]["content"] for row in rows
    ]


def test_trl_would_train_on_a_context_in_messages(tmp_path: Path, saved: Path) -> None:
    detected_rows.write(tmp_path, detected_rows.detected())
    everything = MESSAGES.replace(' and not row["context"]', "")
    *_, (_, labels) = train(tmp_path, everything, ".jsonl")
    assert labels == "Let me think. Tom has 7.<|im_end|>\n"
