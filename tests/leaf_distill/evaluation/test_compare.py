"""`leaf compare`: arms at equal compute, and the interval of a difference."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import detect_pair
import distill_pair
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from leaf_distill.detection.config import DetectConfig
from leaf_distill.detection.pipeline import detect
from leaf_distill.evaluation.arms import read_arms
from leaf_distill.evaluation.compare import compare, distill_equally
from leaf_distill.evaluation.compare_table import CompareResult
from leaf_distill.evaluation.compared import ARMS
from leaf_distill.evaluation.config import CompareConfig
from leaf_distill.statistics import paired_bootstrap
from leaf_distill.training.config import DistillArguments, LeafConfig

ROWS = detect_pair.make_rows(40)
CHOSEN = ["kd", "span", "random_spans", "student_saliency"]


def settings(pair: dict[str, str], root: Path) -> tuple[CompareConfig, DetectConfig, LeafConfig]:
    root.mkdir(exist_ok=True)
    train = detect_pair.write_rows(root / "train.jsonl", ROWS[:24])
    test = detect_pair.write_rows(root / "test.jsonl", ROWS[24:])
    detection = DetectConfig(
        **pair,
        dataset=train,
        output_dir=str(root / "out"),
        cache_dir=str(root / "cache"),
        grade="exact",
        max_new_tokens=4,
        threshold=0.15,
    )
    training = LeafConfig(
        output_dir=str(root / "out"),
        max_steps=3,
        originals_per_step=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return CompareConfig(arms=CHOSEN, eval_dataset=test), detection, training


@pytest.fixture(scope="module")
def compared(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("compare") / "root"
    return root, compare(*settings(pair, root))


def test_every_arm_is_trained_at_equal_compute(compared: tuple[Path, CompareResult]) -> None:
    root, result = compared
    assert [arm.name for arm in result.arms] == ["untrained", *CHOSEN]
    trained = {arm.name: arm.training for arm in result.arms if arm.training}
    assert list(trained) == CHOSEN and trained["kd"].counterfactuals == 0
    assert trained["span"].counterfactuals > 0
    for name, one in trained.items():
        assert (one.steps, one.originals) == (3, 24)
        rows = one.originals_a_step * (1 + one.counterfactuals / one.originals)
        assert rows == pytest.approx(8, abs=1)
        arm = "kd" if name == "kd" else f"{name}-threshold-0.15"
        branches = pq.read_table(root / "out/arms" / arm / "dataset.parquet")["branch"].to_pylist()
        assert branches.count("counterfactual") == one.counterfactuals
        assert branches.count("original") == 24


def compared_arms(
    pair: dict[str, str], root: Path, arms: list[str], **changes: Any
) -> tuple[CompareResult, dict[str, Any]]:
    config, detection, training = settings(pair, root)
    training = training.with_changes(max_steps=2, **changes)
    result = compare(replace(config, arms=arms), detection, training)
    return result, json.loads((root / "out/compare.json").read_text())


def branches(root: Path, arm: str) -> Counter[str]:
    (path,) = (root / "out/arms").glob(f"{arm}/dataset.parquet")
    return Counter(pq.read_table(path)["branch"].to_pylist())


@pytest.fixture(scope="module")
def others(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("others") / "root"
    arms = ["augmented", "kd_failed", "release", "cross", "kd", "kd_entropy", "kd_tip", "sft"]
    return root, *compared_arms(pair, root, arms, failed_share=0.75)


def test_arms_have_their_own_settings_and_only_they(others: Any) -> None:
    _, result, stored = others
    trained = {arm["name"]: arm for arm in stored["arms"]}
    for name, arm in ARMS.items():
        if name in trained:
            changed = {"failed_share": 0.75} if name == "kd_failed" else arm.training
            own = {"detection": arm.detection, "training": changed}
            assert trained[name]["settings"] == json.loads(json.dumps(own))
            line = f"- `{name}`: {arm.says}"
            assert line in result.table.read_text()
    cards = {arm.name: (arm.training.model / "run.json") for arm in result.arms if arm.training}
    runs = {name: json.loads(path.read_text()) for name, path in cards.items()}
    assert {name: run["failed_share"] for name, run in runs.items()} == {
        **dict.fromkeys(runs),
        "kd_failed": 0.75,
    }
    chosen = {name: run["token_selection"] for name, run in runs.items()}
    assert chosen == {**dict.fromkeys(runs, "all"), "kd_entropy": "entropy", "kd_tip": "tip"}
    sums = {name: run["ce_weight"] for name, run in runs.items()}
    assert sums == {**dict.fromkeys(runs, 0.0), "sft": 1.0}
    assert {run["max_steps"] for run in runs.values()} == {2}
    assert result.reference == "kd" and result.notes == []


def test_the_rows_of_each_arm_are_those_it_names(others: Any) -> None:
    root, result, _ = others
    assert branches(root, "distractors-*") == {"original": 24, "counterfactual": 24}
    crossed = branches(root, "span-threshold-0.15-cross_branch")
    assert crossed["cross"] > 0 and not crossed["counterfactual"]
    released = branches(root, "span-*-rule-quantile-*select-all-validate-none")
    assert released["counterfactual"] > crossed["cross"]
    _, found = read_arms(root / "out")
    assert len(found) == 3  # kd's rows are no arm of `leaf detect`
    # kd_failed and kd share the originals of the arm that asked, and no detection ran for them.
    table = pq.read_table(root / "out/arms/kd/dataset.parquet")
    assert {*table["student_verdict"].to_pylist()} == {"right", "wrong"}
    assert len(list((root / "out/arms").iterdir())) == 4
    done = {arm.name: arm.training for arm in result.arms if arm.training}
    assert (done["augmented"].originals_a_step, done["kd_failed"].originals_a_step) == (4, 8)
    plain = [done[name] for name in ("kd", "kd_failed", "kd_entropy", "kd_tip", "sft")]
    assert {(one.counterfactuals, one.originals) for one in plain} == {(0, 24)}
    assert done["sft"].kl_last is None and done["kd_tip"].kl_last is not None
    said = {"sft": "fine-tuned on the completions", "augmented": "another prompt inserted."}
    for name, words in said.items():
        assert words in (done[name].model / "README.md").read_text()


def test_arms_on_originals_alone_find_them(pair: dict[str, str], tmp_path: Path) -> None:
    result, _ = compared_arms(pair, tmp_path, ["kd_failed"])
    assert result.reference == "kd_failed"
    made = {path.name for path in (tmp_path / "out/arms").iterdir()}
    assert made == {"kd", "span-threshold-0.15-validate-none"}


def test_an_arm_that_found_nothing_is_named(
    pair: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, detection, training = settings(pair, tmp_path)
    nothing = replace(detection, min_length=40)
    result = compare(replace(config, arms=["span"]), nothing, training.with_changes(max_steps=1))
    assert "span: no counterfactual was found" in caplog.text  # before the training
    (note,) = result.notes
    assert note.startswith("span has no counterfactuals") and note in result.table.read_text()


def test_rows_that_could_not_be_used_are_counted(pair: dict[str, str], tmp_path: Path) -> None:
    config, detection, training = settings(pair, tmp_path)
    detect_pair.write_rows(tmp_path / "test.jsonl", [*ROWS[24:], {**ROWS[0], "prompt": ""}])
    result = compare(replace(config, arms=["kd"]), detection, training.with_changes(max_steps=1))
    (note,) = result.notes
    assert note == "1 row of the evaluation could not be used." and result.problems == 16
    assert note in result.table.read_text()
    assert json.loads((tmp_path / "out/compare.json").read_text())["unreadable_rows"] == 1


def test_failed_rows_need_a_detection_that_asks(pair: dict[str, str], tmp_path: Path) -> None:
    config, detection, training = settings(pair, tmp_path)
    every = replace(detection, select="all")
    with pytest.raises(ValueError, match="select: must be student_wrong with the arm kd_failed"):
        compare(replace(config, arms=["kd", "kd_failed"]), every, training)
    solved = [row for row in ROWS if not detect_pair.misled(row)][:8]
    rows = detect_pair.write_rows(tmp_path / "solved.jsonl", solved)
    with pytest.raises(ValueError, match="failed_share: must come with rows that the student fai"):
        compare(replace(config, arms=["kd_failed"]), replace(detection, dataset=rows), training)
    assert not list((tmp_path / "out/students").glob("*/*"))


@pytest.mark.parametrize("arms", [["kd", "kd"], [], ["span", "spam"]])
def test_arms_are_different_names_of_the_table(arms: list[str]) -> None:
    needed = f"of {', '.join(ARMS)}, got 'spam'" if "spam" in arms else "different names"
    with pytest.raises(ValueError, match=f"^arms: must be {needed}"):
        CompareConfig(arms=arms)


def test_each_arm_has_a_sentence_in_help_and_docs() -> None:
    says = next(item for item in fields(CompareConfig) if item.name == "arms").metadata["help"]
    page = (Path(__file__).parents[3] / "docs/guides/compare.md").read_text()
    for name, arm in ARMS.items():
        assert f"{name}: {arm.says}" in says
        assert f"| `{name}` | {arm.says}" in page


def test_crossed_rows_take_their_share_of_the_compute(pair: dict[str, str], tmp_path: Path) -> None:
    _, _, training = settings(pair, tmp_path)
    rows = distill_pair.make_rows(12, 3, cross=3)
    names = dict.fromkeys(name for row in rows for name in row)
    path = tmp_path / "dataset.parquet"
    pq.write_table(pa.Table.from_pylist([{**names, **row} for row in rows]), path)
    arguments = DistillArguments(**pair, dataset=str(path))
    done = distill_equally(arguments, training, tmp_path / "student")
    assert (done.originals, done.counterfactuals) == (12, 6)
    assert done.originals_a_step == round(8 * 12 / 18)


def test_the_table_is_of_the_answers(compared: tuple[Path, CompareResult]) -> None:
    root, result = compared
    assert result.reference == "kd" and result.problems == 16
    right = {}
    for arm in result.arms:
        answers = pq.read_table(root / "out/evaluation" / arm.name / "answers.parquet")
        right[arm.name] = [verdict == "right" for verdict in answers["verdict"].to_pylist()]
        assert arm.accuracy == sum(right[arm.name]) / 16
        assert arm.interval[0] <= arm.accuracy <= arm.interval[1]
    for arm in result.arms:
        if arm.name == "kd":
            assert arm.difference is None
        else:
            assert arm.difference is not None
            assert arm.difference[0] == pytest.approx(arm.accuracy - sum(right["kd"]) / 16)
    text = result.table.read_text()
    assert all(f"| {name} |" in text for name in right)
    stored = json.loads((root / "out/compare.json").read_text())
    assert [arm["accuracy"] for arm in stored["arms"]] == [arm.accuracy for arm in result.arms]


def test_the_same_command_trains_nothing_again(
    pair: dict[str, str], compared: tuple[Path, CompareResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, result = compared
    monkeypatch.setattr("leaf_distill.training.trainer.LeafTrainer.train", None)
    monkeypatch.setattr("leaf_distill.models.loading.load_model", None)
    assert compare(*settings(pair, root)) == result


def files(root: Path) -> dict[str, tuple[int, bytes]]:
    paths = [path for path in root.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.mark.parametrize(
    ("found", "train", "message"),
    [
        (
            {"grade": "number"},
            {},
            "^grade: must stay exact in a directory whose arm kd was trained with it, got number; "
            "give another output_dir, or the old setting$",
        ),
        ({"threshold": 0.4}, {}, "^threshold: must stay 0.15 in .* arm span was .* got 0.4; give"),
        (
            {"max_rows": 20},
            {},
            "^dataset: must have the rows that the arm kd was trained on, got .*/train.jsonl with "
            "others; give",
        ),
        ({}, {"learning_rate": 2e-3}, "learning_rate was 0.001 and is now 0.002\\nGive another"),
        ({}, {"originals_per_step": 16}, "originals_per_step was 8 and is now 16\\nGive another"),
        ({}, {"max_steps": 4}, "^max_steps: must stay 3 in a directory whose arms have so many"),
    ],
)
def test_a_refused_command_changes_nothing(
    pair: dict[str, str],
    compared: tuple[Path, CompareResult],
    found: dict[str, Any],
    train: dict[str, Any],
    message: str,
) -> None:
    """Also where an arm is new, whose detection and training would come first."""
    root, _ = compared
    config, detection, training = settings(pair, root)
    before = files(root)
    with pytest.raises(ValueError, match=message):
        compare(
            replace(config, arms=["perplexity", *CHOSEN]),
            replace(detection, **found),
            training.with_changes(**train),
        )
    assert files(root) == before


def test_an_arm_that_was_killed_goes_on_with_its_own_learning_rate(
    pair: dict[str, str], compared: tuple[Path, CompareResult], tmp_path: Path
) -> None:
    shutil.copytree(compared[0], tmp_path, dirs_exist_ok=True)
    config, detection, training = settings(pair, tmp_path)
    (metrics,) = tmp_path.rglob("students/kd/metrics.json")
    metrics.unlink()  # it is written last
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is now 0\.002"):
        compare(config, detection, training.with_changes(learning_rate=2e-3))
    assert files(tmp_path) == before


def test_rows_that_changed_are_refused_and_an_arm_without_a_student_is_made_anew(
    pair: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, detection, training = settings(pair, tmp_path)
    training, arm = training.with_changes(max_steps=1), replace(config, arms=["span"])
    with monkeypatch.context() as killed, pytest.raises(TypeError):  # after the detection
        killed.setattr("leaf_distill.evaluation.compare.distill", None)
        compare(arm, replace(detection, grade="number"), training)
    compare(arm, detection, training)
    dataset = tmp_path / "out/arms/span-threshold-0.15/dataset.parquet"
    made = dataset.read_bytes()
    # The originals of kd do not depend on how spans are cut, and it comes later.
    compare(replace(config, arms=["kd"]), replace(detection, threshold=0.3), training)
    # A dataset that another run has replaced is made again.
    detect(replace(detection, max_rows=6))
    assert dataset.read_bytes() != made
    compare(arm, detection, training)
    assert dataset.read_bytes() == made
    detect_pair.write_rows(tmp_path / "train.jsonl", [{**ROWS[0], "answer": "?"}, *ROWS[1:24]])
    with pytest.raises(ValueError, match=r"^dataset: must have the rows that the arm span was"):
        compare(arm, detection, training)
    assert dataset.read_bytes() == made


def test_a_missing_evaluation_set_is_asked_for(pair: dict[str, str], tmp_path: Path) -> None:
    config, detection, training = settings(pair, tmp_path)
    with pytest.raises(ValueError, match="eval_dataset: must be given"):
        compare(replace(config, eval_dataset=""), detection, training)
    with pytest.raises(ValueError, match=r"^eval_dataset: gone\.jsonl: must be a file"):
        compare(replace(config, eval_dataset="gone.jsonl"), detection, training)
    with pytest.raises(ValueError, match=r"^eval_answers: must be left out, got 5"):
        compare(config, detection, training.with_changes(eval_answers=5))
    with pytest.raises(ValueError, match=r"^eval_strategy: must be left out, got epoch; all arms"):
        compare(config, detection, training.with_changes(eval_strategy="epoch"))
    with pytest.raises(ValueError, match=r"^failed_share: must come with the arm kd_failed, got 0"):
        compare(config, detection, training.with_changes(failed_share=0.7))
    assert not (tmp_path / "out").exists()


def test_a_table_of_somebody_else_is_left_alone(pair: dict[str, str], tmp_path: Path) -> None:
    config, detection, training = settings(pair, tmp_path)
    root = Path(detection.output_dir)
    root.mkdir(parents=True)
    for name in ("compare.md", "compare.json", "evaluation/kd/metrics.json", "students/kd/x.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
        with pytest.raises(ValueError, match=r"output_dir: must be (new|empty) or"):
            compare(config, detection, training)
        assert [path.read_text() for path in root.rglob("*") if path.is_file()] == ["mine"]
        (root / name).unlink()


def test_the_bootstrap_is_that_of_problems() -> None:
    reference = np.array([1, 1, 0, 0, 0], dtype=np.bool_)
    right = np.array([1, 0, 1, 1, 0], dtype=np.bool_)
    change = right.astype(int) - reference.astype(int)
    every = [np.mean(pick) for pick in product(change, repeat=5)]  # all resamples there are
    difference, low, high = paired_bootstrap(reference, right, draws=200_000)
    assert difference == pytest.approx(0.2)
    assert (low, high) == pytest.approx(tuple(np.quantile(every, (0.025, 0.975))))


def test_equal_answers_differ_by_nothing() -> None:
    same = np.array([True, False, True])
    assert paired_bootstrap(same, same) == (0.0, 0.0, 0.0)
