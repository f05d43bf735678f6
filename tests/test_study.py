"""The study on known distractors: its problems, splits, truth, measures and pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STUDY = Path(__file__).resolve().parents[1] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))  # its modules are flat, as the command runs them
import cutting  # noqa: E402
import detection  # noqa: E402
import distillation  # noqa: E402
import page_scores  # noqa: E402
import page_training  # noqa: E402
import pair  # noqa: E402
import problems as study_problems  # noqa: E402
import run as study_run  # noqa: E402
import settings  # noqa: E402
import tables  # noqa: E402
from measures import Row, aucs, first_phrases, mean, unmentioned  # noqa: E402
from problems import Problem, as_rows, group_similar, load_gsm8k, load_problems  # noqa: E402

from leaf_distill.data.dataset import load_examples  # noqa: E402
from leaf_distill.detection.counterfactual import changed, tidied  # noqa: E402

sys.path.remove(str(STUDY))


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return load_problems()


def test_every_expression_has_the_value_of_the_gold_number_and_is_the_only_one() -> None:
    text = "Tom has 1,200 apples in 30 boxes and 2 pears."
    assert study_problems.expressions(text, 40.0) == {"1,200 / 30"}
    assert study_problems.expressions(text, 1230.0) == {"1,200 + 30"}
    assert study_problems.expressions("2 and 2", 4.0) == {"2 + 2", "2 * 2"}
    assert study_problems.expressions("3 of 10", 7.0) == {"10 - 3"}


def test_labels_use_two_numbers_of_both_forms(problems: list[Problem]) -> None:
    for one in problems:
        used = set(study_problems.numbers(one.label))
        assert 1 <= len(used) <= 2
        assert used <= set(study_problems.numbers(one.plain))
        assert used <= set(study_problems.numbers(one.adversarial))


def test_no_template_is_in_two_splits(problems: list[Problem]) -> None:
    sizes = {name: len(study_problems.of_split(problems, name)) for name in study_problems.SIZES}
    assert all(sizes[name] >= count for name, count in study_problems.SIZES.items())
    assert len(study_problems.of_split(problems, "A")) > 400
    split = {at: one.split for at, one in enumerate(problems)}
    of_template: dict[str, set[str]] = {}
    for one in problems:
        of_template.setdefault(one.template, set()).add(one.split)
    assert all(len(names) == 1 for names in of_template.values())
    assert 300 < len(of_template) < len(problems)
    for group in group_similar([one.plain for one in problems]):
        assert len({split[at] for at in group}) == 1
    texts = [{one.plain for one in problems if one.split == name} for name in (*sizes, "A")]
    assert not any(one & other for one, other in combinations(texts, 2))


def test_all_but_what_trains_models_has_exact_truth(problems: list[Problem]) -> None:
    assert all(one.exact for one in problems if one.split != "A")
    assert load_problems() == problems
    assert load_problems(seed=1) != problems


def test_similar_texts_are_of_one_template_through_others_too() -> None:
    texts = [
        "Tom has 3 red apples and buys some more of them today",
        "Eva has 5 red apples and buys some more of them today",
        "Eva has 5 green apples and buys some more of them today",
        "A train leaves the station at noon",
    ]
    assert sorted(map(sorted, group_similar(texts))) == [[0, 1, 2], [3]]


def test_distractors_that_are_nearly_those_of_another_split_are_counted() -> None:
    texts = ["the sticker says 9 units", "the sticker says 7 units", "a red car drives by"]
    one, same, other = (
        Problem("p", "", text, ((0, len(text)),), True, "", split)
        for text, split in zip(texts, "CAB", strict=True)
    )
    assert study_problems.copied_share([one, same, other], "C", "A") == 1.0
    assert study_problems.copied_share([one, same, other], "C", "B") == 0.0


def plain_words(text: str) -> str:
    return "".join(char for char in text.lower() if char.isalnum())


def test_the_oracle_cut_restores_the_plain_text(problems: list[Problem]) -> None:
    exact = [one for one in problems if one.split in ("B", "C")]
    examples = load_examples(as_rows(exact, "adversarial"))
    for example, one in zip(examples, exact, strict=True):
        cut = changed(example, tidied(example, one.ranges))
        assert plain_words(cut.text) == plain_words(one.plain), one.name


def test_gsm8k_gets_a_sentence_of_another_problem_before_its_question(tmp_path: Path) -> None:
    rows = [
        ("Tom has 7 apples. He buys 5 more. How many has he?", "7+5=<<7+5=12>>12\n#### 12"),
        (
            "Eva sees 40 birds. She is glad. How many eyes do 3 birds have?",
            "3*2=<<3*2=6>>6\n#### 6",
        ),
    ]
    lines = "\n".join(json.dumps({"question": q, "answer": a}) for q, a in rows)
    (tmp_path / "train.jsonl").write_text(lines)
    (tmp_path / "test.jsonl").write_text("")
    (one,) = load_gsm8k(tmp_path)
    assert (one.plain, one.label) == (rows[0][0], "7 + 5")
    ((start, stop),) = one.ranges
    assert one.adversarial[:start] + one.adversarial[stop:] == one.plain
    assert one.adversarial[start:stop] == "Eva sees 40 birds. "
    assert one.adversarial[stop:] == "How many has he?"


def test_shipped_gsm8k_problems_have_one_sentence_with_a_number_of_another(
    problems: list[Problem],
) -> None:
    found = load_gsm8k()
    assert len(found) == 85 and {one.split for one in found} == {"gsm8k"}
    assert not {one.plain for one in found} & {one.plain for one in problems}
    for one in found:
        ((start, stop),) = one.ranges
        assert one.adversarial[:start] + one.adversarial[stop:] == one.plain
        (number,) = study_problems.numbers(one.adversarial[start:stop])
        assert number not in study_problems.numbers(one.plain)
        assert set(study_problems.numbers(one.label)) <= set(study_problems.numbers(one.plain))


def test_packed_rows_are_read_again_and_have_the_same_bytes(tmp_path: Path) -> None:
    rows = [{"name": "p", "plain": "a b\u00e9"}]
    for name in ("one.gz", "two.gz"):
        study_problems.write_packed(tmp_path / name, rows)
    assert study_problems.read_packed(tmp_path / "one.gz") == rows
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


PLAIN = "<<Passage>>tom has 7 apples and 2 pears.<<Question>> how many fruits?"
WHOLE = "<<Passage>>tom has 7 apples and 2 pears. the sticker says 3.<<Question>> how many fruits?"
SOLVED = "<<Explanation>>tom has 7 and 2.<<FinalAnswer>>9.0"


def test_problems_of_a_folder_are_cleaned_pairs(tmp_path: Path) -> None:
    pairs = [(PLAIN, WHOLE), (PLAIN, PLAIN.replace("7", "8")), ("no number", WHOLE)]
    for kind in ("simple", "complex"):
        for name, at in (("adversarial", 1), ("non_adversarial", 0)):
            lines = [
                json.dumps({"id": f"p_{number}", "prompt": pair[at], "completion": SOLVED})
                for number, pair in enumerate(pairs)
            ]
            (tmp_path / f"{kind}_{name}_train.json").write_text("\n".join(lines))
    found = load_problems(tmp_path)
    assert [one.name for one in found] == ["simple/p_0"]  # the complex one is the same problem
    one = found[0]
    assert one.adversarial == "tom has 7 apples and 2 pears. the sticker says 3. how many fruits?"
    assert [one.adversarial[a:b].strip() for a, b in one.ranges] == ["the sticker says 3."]
    assert one.label == "7 + 2"


def planted_rows(count: int = 60, tokens: int = 25, students: int = 2) -> list[Row]:
    """Rows in which one score is the truth and another was drawn without it."""
    draw = np.random.default_rng(0)
    rows = []
    for at in range(count):
        phrase = np.arange(tokens) // 5
        planted_phrase = np.array([True, *(draw.random(tokens // 5 - 2) < 0.3), False])
        planted = planted_phrase[phrase]
        suspicion = {
            "truth": planted + draw.random(tokens) / 2,
            "shuffled": draw.random(tokens),
            "tied": np.zeros(tokens),
        }
        number = draw.random(tokens) < 0.5
        name = f"p{at // students}"
        one = Row(
            at % students, name, name, planted, number, phrase, planted_phrase, dict(suspicion)
        )
        rows.append(one)
    return rows


def test_planted_truth_has_an_auc_of_one_and_a_shuffled_score_one_half() -> None:
    rows = planted_rows()
    assert set(aucs(rows, "truth")) == {1.0}
    numbers = aucs(rows, "truth", numbers=True)
    assert set(numbers[np.isfinite(numbers)]) == {1.0}
    found, error = mean(aucs(rows, "shuffled"), rows) or (0.0, 0.0)
    assert abs(found - 0.5) < 3 * error < 0.15
    assert set(aucs(rows, "tied")) == {0.5}
    bare = replace(rows[0], planted=rows[0].planted & False)
    assert np.isnan(aucs([bare], "truth")).all()
    assert mean(aucs([bare], "truth"), [bare]) is None


def test_ties_count_half_in_an_auc() -> None:
    planted = np.array([True, True, False, False])
    values = np.array([1.0, 0.0, 0.0, 0.0])
    row = Row(0, "p", "p", planted, planted, planted.astype(int), planted, {"score": values})
    # There are four pairs: the first planted token wins two and the second ties twice.
    assert aucs([row], "score").tolist() == [(2 + 2 / 2) / 4]


def test_the_first_phrase_is_a_distractor_by_the_truth_and_by_chance_otherwise() -> None:
    rows = planted_rows()
    assert set(first_phrases(rows, "truth")) == {1.0}
    chance = np.mean([row.planted_phrase.mean() for row in rows])
    assert first_phrases(rows, "tied").mean() == pytest.approx(chance)
    found, error = mean(first_phrases(rows, "shuffled"), rows) or (0.0, 0.0)
    assert abs(found - chance) < 3 * error < 0.3


@dataclass(frozen=True)
class Cell:
    """A row of a student."""

    student: int
    template: str


@pytest.mark.parametrize(
    ("of_student", "of_template", "of_row"), [(0.1, 0.0, 0.4), (0.3, 0.0, 0.1), (0.0, 0.3, 0.1)]
)
def test_errors_are_the_spread_of_means_over_students_templates_and_rows(
    of_student: float, of_template: float, of_row: float
) -> None:
    draw = np.random.default_rng(0)
    cells = [Cell(student, f"t{template}") for student in range(6) for template in range(40)]
    found, errors = [], []
    for _ in range(60):
        effects = of_student * draw.normal(size=6)[:, None] + of_template * draw.normal(size=40)
        values = effects.ravel() + of_row * draw.normal(size=240)
        one, error = mean(values, cells, draws=200) or (0.0, 0.0)
        found.append(one)
        errors.append(error)
    assert 0.7 < np.sqrt(np.mean(np.square(errors))) / np.std(found) < 1.4


def test_an_error_of_one_student_is_that_of_templates() -> None:
    values = np.array([0.0, 0.0, 1.0, 1.0])
    alone = [Cell(1, "a"), Cell(1, "a"), Cell(1, "b"), Cell(1, "b")]
    apart = [Cell(1, name) for name in "abcd"]
    wide, narrow = (mean(values, cells) or (0.0, 0.0) for cells in (alone, apart))
    assert wide[0] == narrow[0] == 0.5
    assert wide[1] == pytest.approx(0.5 / np.sqrt(2), rel=0.1)
    assert narrow[1] == pytest.approx(0.5 / 2, rel=0.1)


def test_a_difference_is_paired_and_its_mean_is_over_batch_orders() -> None:
    assert tables.shown((0.25, 0.05), sign=True) == "+25.0 ± 5.0"
    assert tables.shown(None) == ""
    assert tables.is_above((0.16, 0.05), errors=3)
    assert not tables.is_above((0.14, 0.05), errors=3)
    assert not tables.is_above((0.0, 0.0), errors=3)
    mine = {1: [{"right": [True, True, False]}, {"right": [True, False, False]}]}
    other = {1: [{"right": [False, True, False]}]}
    lines = page_training._answered(mine, other, (0, 2), ["a", "b"])
    assert [(one.template, one.values["right"]) for one in lines] == [("a", 1.0), ("b", -0.5)]
    assert page_training._answered(mine, {2: other[1]}, (0, 2), ["a", "b"]) == []


def test_the_control_marks_numbers_that_the_label_lacks() -> None:
    text = "Tom has 1,200 apples of 30 grams"
    offsets = np.array([[0, 8], [8, 11], [11, 13], [13, 24], [24, 26], [26, 32]])
    assert unmentioned(text, offsets, "1200 + 7").tolist() == [0, -1, -1, 0, 1, 0]


def test_a_score_is_read_from_the_arms_and_the_cuts_from_their_answers() -> None:
    problem = Problem("p", "a. c?", "a. b. c?", ((2, 5),), True, "1 + 2")
    candidates = [
        {"cut": [[0, 2]], "student_verdict": "wrong", "teacher_verdict": None, "kept": False},
        {"cut": [[2, 5]], "student_verdict": "right", "teacher_verdict": "right", "kept": True},
    ]
    line = cutting._line(problem, candidates)
    assert (line["first"], line["any"], line["both"]) == (False, True, True)
    assert (line["asked"], line["inside"], line["cut"]) == (3, 3, 5)
    example = load_examples([{"prompt": "Tom has 7, weighs 30 kg, and buys 5.", "completion": "-"}])
    found = cutting.absent_numbers(replace(problem, label="7 + 5"), example[0])
    assert [[example[0].text[a:b].strip() for a, b in cut] for cut in found] == [["weighs 30 kg,"]]
    two = replace(problem, ranges=((2, 5), (6, 7), (8, 9)))
    assert cutting.one_more(two, example[0]) == [two.ranges[:1], two.ranges[:2], two.ranges]


def test_every_table_has_the_control_without_a_model() -> None:
    assert detection.CONTROL in cutting.BY_HAND
    for arms, end in ((distillation.ALL_HAVE, ""), (distillation.FEW_HAVE, ", 10 %")):
        assert {f"no model{end}", f"{distillation.AS_MANY}{end}"} <= {*arms}
    assert {*distillation.WITHOUT_CUTS} < {*distillation.ARMS}
    assert distillation.KD_OF_FEW in distillation.WITHOUT_CUTS
    assert page_training._base("search, 10 %") == distillation.KD_OF_FEW
    assert page_training._base("search") == distillation.KD


def test_an_arm_is_better_by_three_errors_than_each_rival_and_loses_no_more_than_a_point() -> None:
    above, near = (0.16, 0.05), (0.14, 0.05)
    assert page_training._is_better([above, above, (-0.01, 0.05)])
    assert not page_training._is_better([above, near, (0.0, 0.05)])
    assert not page_training._is_better([above, above, (-0.02, 0.05)])
    assert not page_training._is_better([above, None, (0.0, 0.05)])


def test_where_few_problems_have_distractors_the_others_are_plain(
    problems: list[Problem], tmp_path: Path
) -> None:
    rows = study_problems.of_split(problems, "B", 50)
    quick = settings.PROFILES["quick"]
    config = detection.settings_of(tmp_path, "student-1", rows, "B", "all", quick)
    source = distillation.Source(config, rows, tmp_path / "by-hand")
    made: list[distillation.Source] = []
    keep = distillation.of_few(lambda few: made.append(few) or few.place)
    assert keep(source) == keep(source) == made[0].place
    mixed = made[0].config
    assert made[0] == made[1]
    assert mixed.output_dir != config.output_dir
    lines = [json.loads(line) for line in Path(mixed.dataset).read_text().splitlines()]
    kept = [
        one.ranges if one.adversarial in {line["prompt"] for line in lines} else () for one in rows
    ]
    assert [one.ranges for one in made[0].problems] == kept
    bare = next(one for one in made[0].problems if not one.ranges)
    example = load_examples(as_rows([bare], "adversarial"))[0]
    assert not [*cutting.all_at_once(bare, example), *cutting.one_more(bare, example)]
    forms = [line["prompt"] == one.adversarial for line, one in zip(lines, rows, strict=True)]
    assert sum(forms) == 5
    plain = [line["prompt"] == one.plain for line, one in zip(lines, rows, strict=True)]
    assert [not one for one in forms] == plain
    table = pq.read_table(distillation.with_share(distillation.FEW)(source))
    assert set(table["branch"].to_pylist()) == {"original"}
    assert [row[0]["content"] for row in table["prompt"].to_pylist()] == [
        line["prompt"] for line in lines
    ]


def test_names_fit_beside_a_chart() -> None:
    names = [*detection.SCORES, detection.FALL, *cutting.ARMS, *cutting.BY_HAND, *distillation.ARMS]
    short = [page_scores.brief(name) for name in names]
    assert max(map(len, short)) <= 38
    assert len({*short}) == len({*names})


def test_a_step_is_done_once_and_a_directory_is_of_one_study(tmp_path: Path) -> None:
    study = settings.Study(tmp_path, settings.PROFILES["quick"], {"base": "None"})
    done: list[int] = []
    for _ in range(2):
        assert study.step("one", lambda: [done.append(1) or len(done)]) == [1]
    again = settings.Study(tmp_path, settings.PROFILES["quick"], {"base": "None"})
    assert again.done("one") == [1] and again.done("two") is None
    with pytest.raises(ValueError, match="output_dir: must be new or of the same study"):
        settings.Study(tmp_path, settings.PROFILES["cpu"], {"base": "None"})


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_run_in_processes_and_an_error_stops_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.syspath_prepend(str(STUDY))  # which the processes take over
    profile = replace(settings.PROFILES["quick"], workers=workers)
    places = [tmp_path / f"{at}" for at in range(3)]
    study_run.each(profile, os.mkdir, [(place,) for place in places])
    assert all(place.is_dir() for place in places)
    with pytest.raises(FileExistsError):
        study_run.each(profile, os.mkdir, [(places[0],)])


def test_a_killed_study_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "started.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.append({str(STUDY)!r})\n"
        "from dataclasses import replace\n"
        "from run import each\n"
        "from settings import PROFILES\n"
        "if __name__ == '__main__':\n"
        "    profile = replace(PROFILES['quick'], workers=2)\n"
        f"    each(profile, os.system, [('echo $PPID > {tmp_path}/worker; sleep 100',)])\n"
    )
    root = STUDY.parents[1]
    search = os.pathsep.join((str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")))
    study = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": search})
    known = tmp_path / "worker"
    while study.poll() is None and not (known.exists() and known.read_text().strip()):
        time.sleep(0.1)
    worker = Path("/proc") / known.read_text().strip() / "stat"
    assert is_running(worker)
    study.kill()
    study.wait()
    end = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(stat: Path) -> bool:
    """Whether a process goes on; one that ended may wait for its parent to notice."""
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make_base(directory: Path) -> Path:
    """Save a tiny model whose tokens are the bytes of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("role", "layers", "forms"), [("teacher", None, 2), ("student", 3, 1)])
def test_a_model_has_the_lower_layers_of_which_the_lowest_stay(
    problems: list[Problem], tmp_path: Path, role: str, layers: int | None, forms: int
) -> None:
    base = str(make_base(tmp_path))
    maker = pair.Maker(base, problems, settings.PROFILES["quick"])
    model, losses = maker.make(role, layers, 0)
    assert model.config.num_hidden_layers == len(model.model.layers) == (layers or 4)
    before = maker.model.model
    for at, layer in enumerate(model.model.layers):
        same = torch.equal(layer.mlp.up_proj.weight, before.layers[at].mlp.up_proj.weight)
        assert same == (at < 1), at
    # Run in two parts and at once, the trained model has the same logits.
    rows = maker.rows("C-dev", ["plain"])
    whole, _ = pair.label_logits(model, rows, [0, 1])
    again = pair.copied(model, range(layers or 4))
    assert torch.equal(pair.label_logits(again, rows, [0, 1])[0], whole)
    upper = pair.copied(model, [1, 2])
    assert upper.config.num_hidden_layers == 2
    assert upper.model.layers[1].self_attn.layer_idx == 1
    assert maker.make(role, layers, 0)[1] == losses
    assert maker.make(role, layers, 1)[1] != losses
    trained = maker.rows("A", pair.FORMS[:forms])
    assert len(trained.inputs) == forms * len(maker.rows("A", ["plain"]).inputs)


def test_students_have_seeds_of_their_own_and_rejected_ones_are_kept_as_results(
    problems: list[Problem], tmp_path: Path
) -> None:
    base = str(make_base(tmp_path / "base"))
    strict = replace(settings.PROFILES["quick"], student_gate=(1.1, 1.0), attempts=2)
    study = settings.Study(tmp_path / "study", strict, {})
    with pytest.raises(RuntimeError, match="student-1: none of 2 seeds passed its gate"):
        pair.make_model(study, base, problems, "student-1")
    tried = [study.done(f"pair-student-1-seed-{seed}") for seed in (1, 3)]
    assert [(one["seed"], one["kept"]) for one in tried] == [(1, False), (3, False)]
    assert not list((study.root / "pair").iterdir())


def study_command(base: Path, output: Path) -> list[str]:
    profile = ["--profile", "quick", "--base", str(base), "--output_dir", str(output)]
    return [sys.executable, str(STUDY), *profile]


def tables_of(page: Path) -> list[str]:
    text, _, _ = page.read_text().partition("## Settings and time")
    return [line for line in text.splitlines() if line.startswith("|")]


def assert_weighted_as_the_product_does(root: Path, base: Path) -> None:
    """log_gap with the product's weight orders the tokens of a row as the score does."""
    inputs = study_run.Inputs(root, "quick", str(base))
    study, problems = inputs.study(), inputs.problems()
    config = study_run.source_of(study, problems, 0, "B-dev", "C-dev").config
    samples = detection.samples_of(replace(config, **detection.SCORING, score="log_gap"))
    weighted = study.done("weights")
    assert len(samples) == len(weighted) > 0
    for sample, one in zip(samples, weighted, strict=True):
        score = np.array(sample["score"])[np.array(sample["prunable"])]
        values = np.array(one["suspicion"]["0.5"])
        assert np.corrcoef(score, values)[0, 1] < -0.999


@pytest.mark.slow
def test_the_study_runs_goes_on_after_a_kill_and_reruns_to_the_digit(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    root = STUDY.parents[1]
    search = os.pathsep.join((str(root), str(root / "python"), os.environ.get("PYTHONPATH", "")))
    env = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    first = study_command(base, tmp_path / "first")
    running = subprocess.Popen(first, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    steps = tmp_path / "first" / "steps"
    while running.poll() is None and not (steps / "cutting-1.json").exists():
        time.sleep(0.2)
    running.kill()
    running.communicate()
    known = {path: path.stat().st_mtime_ns for path in steps.glob("*.json")}
    assert known and not (tmp_path / "first" / "study.md").exists()
    for command in (first, study_command(base, tmp_path / "second")):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert all(path.stat().st_mtime_ns == at for path, at in known.items())
    tables = tables_of(tmp_path / "first" / "study.md")
    assert tables == tables_of(tmp_path / "second" / "study.md")
    page = (tmp_path / "first" / "study.md").read_text()
    assert "This is a rehearsal" in page and "FIGURE" not in page
    assert "| students | " in page
    names = {line.split(" | ")[0].removeprefix("| ") for line in tables}
    expected = {*detection.SCORES, detection.FALL, *cutting.ARMS, *cutting.BY_HAND}
    expected |= {*distillation.arms_of(settings.PROFILES["quick"])}
    assert expected <= names
    assert_weighted_as_the_product_does(tmp_path / "first", base)
    for name in ("detection-B", "cutting", "distillation"):
        assert (tmp_path / "first" / f"study-{name}.svg").exists() and f"study-{name}.svg" in page
    assert not list((tmp_path / "first").glob("student-1/students/*"))
