"""Training from a stored teacher: the live loss to the bit, and every refusal before a step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from distill_pair import (
    assert_same,
    label_log_probabilities,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    render,
    weights,
)

from leaf_distill.cli import main
from leaf_distill.data.collator import collate
from leaf_distill.models.loading import load_model
from leaf_distill.training import cache_writer
from leaf_distill.training.cache import CacheResult, cache_teacher
from leaf_distill.training.cache_columns import rendering_key
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.teacher import LiveTeacher
from leaf_distill.training.teacher_cache import StoredTeacher, TeacherCache
from leaf_distill.training.trainer import LeafTrainer

COMMON = 45  # tokens that both models make logits for


def save(model: Any, directory: Path) -> str:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_teacher(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_student(), tmp_path_factory.mktemp("student"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fill(directory: Path, teacher: str, rows: list[dict[str, Any]], **settings: Any) -> CacheResult:
    dataset = write_rows(directory.with_suffix(".jsonl"), rows)
    return cache_teacher(
        CacheConfig(teacher=teacher, dataset=dataset, output_dir=str(directory), **settings)
    )


def make(
    directory: Path, teacher: Any, rows: Any, cache: Path | None = None, **settings: Any
) -> LeafTrainer:
    config = make_config(directory / "run", **settings)
    return LeafTrainer(
        make_student(), teacher, config, rows, rows, make_tokenizer(), teacher_cache=cache
    )


# ---- hidden states ----


def test_stored_hidden_states_give_the_live_loss_to_the_bit(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(20, 7, cross=2)
    fill(tmp_path / "cache", teacher, rows)
    results = []
    for source, cache in ((teacher, None), (None, tmp_path / "cache")):
        # Passes of another size: each holds other rows than the batches of the cache.
        trainer = make(tmp_path, source, rows, cache, max_batch_tokens=64)
        trainer.train()
        measured = trainer.evaluate()
        results.append((losses(trainer), measured["eval_loss"], weights(trainer.model)))
    live, stored = results
    assert len(live[0]) == 6
    assert stored[:2] == live[:2]
    assert_same(stored[2], live[2])


def test_every_turns_labels_are_stored_and_a_cache_without_them_is_refused(
    teacher: str, tmp_path: Path
) -> None:
    roles = ("user", "assistant", "user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": f"w{i} w{i + n}"} for n, role in enumerate(roles)]}
        for i in range(8)
    ]
    fill(tmp_path / "all", teacher, rows, train_on="all")
    settings = {"train_on": "all", "max_steps": 2}
    live = make(tmp_path, teacher, rows, **settings)
    stored = make(tmp_path, None, rows, tmp_path / "all", **settings)
    assert stored.train_dataset is not None and stored.train_dataset.label_tokens == 8 * 6
    live.train()
    stored.train()
    assert_same(weights(stored.model), weights(live.model))
    with pytest.raises(ValueError, match=r"teacher_cache: must be made with .*'train_on': 'all'"):
        make(tmp_path, None, rows, tmp_path / "all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_hidden_states_and_head_are_stored_as_they_are(
    dtype: str, teacher: str, tmp_path: Path
) -> None:
    rows = make_rows(5, 2)
    fill(tmp_path / "cache", teacher, rows, dtype=dtype)
    device = torch.device("cpu")
    live = LiveTeacher(load_model(teacher, dtype=dtype), device)
    stored = StoredTeacher(TeacherCache(tmp_path / "cache"), device)
    batch = collate(render(rows))
    theirs, ours = live(batch), stored(batch)
    assert ours.states.dtype == getattr(torch, dtype)
    assert torch.equal(ours.states, theirs.states)
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert (ours.head.scale, ours.head.softcap) == (theirs.head.scale, theirs.head.softcap)


def test_a_heads_bias_scale_and_softcap_are_stored(tmp_path: Path) -> None:
    head = LiveTeacher(make_teacher(), torch.device("cpu")).head
    with_all = type(head)(head.weight, torch.arange(48.0), 0.5, 30.0)
    cache_writer.write_head(tmp_path / "head.safetensors", with_all)
    from leaf_distill.training.teacher_cache import _read_head

    read = _read_head(tmp_path / "head.safetensors", torch.device("cpu"))
    assert torch.equal(read.bias, with_all.bias) and (read.scale, read.softcap) == (0.5, 30.0)


def test_a_rank_reads_the_head_to_the_cpu(teacher: str, tmp_path: Path) -> None:
    """Under torchrun the device of a rank is "cpu:0"."""
    fill(tmp_path / "cache", teacher, make_rows(2, 0))
    first, second = (
        StoredTeacher(TeacherCache(tmp_path / "cache"), torch.device(name))(
            collate(render(make_rows(2, 0)))
        )
        for name in ("cpu", "cpu:0")
    )
    assert torch.equal(first.head.weight, second.head.weight)


def test_a_batch_without_labels_has_a_signal_of_no_rows(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(2, 0)
    fill(tmp_path / "cache", teacher, rows)
    stored = StoredTeacher(TeacherCache(tmp_path / "cache"), torch.device("cpu"))
    batch = collate(render(rows))
    batch["teacher_loss_mask"] = torch.zeros_like(batch["teacher_loss_mask"])
    assert stored(batch).states.shape == (0, 24)
    live = LiveTeacher(make_teacher().eval(), torch.device("cpu"))
    assert live(batch).states.shape == (0, 24)


def test_the_same_tokens_with_other_labels_are_another_row(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(1, 0)
    rows.append({**rows[0], "context": 3})  # the first word of the response is given
    fill(tmp_path / "cache", teacher, rows)
    examples = render(rows)
    ids, labels = zip(
        *(
            (one.renderings["teacher"].input_ids, one.renderings["teacher"].loss_mask)
            for one in examples
        ),
        strict=True,
    )
    assert ids[0].tolist() == ids[1].tolist() and labels[0].sum() == labels[1].sum() + 1
    stored = StoredTeacher(TeacherCache(tmp_path / "cache"), torch.device("cpu"))
    assert len(stored(collate(examples)).states) == labels[0].sum() + labels[1].sum()


# ---- the top k ----


def stored_measures(cache: Path, rows: Any, tmp_path: Path) -> dict[str, float]:
    return make(tmp_path, None, rows, cache, kd_weight=0.4).evaluate()


def test_the_stored_top_k_is_that_of_the_teachers_logits(
    teacher: str, student: str, tmp_path: Path
) -> None:
    rows = make_rows(6, 2)
    result = fill(tmp_path / "cache", teacher, rows, student=student, signal="topk", top_k=5)
    stored = StoredTeacher(TeacherCache(tmp_path / "cache"), torch.device("cpu"))
    model, outside = make_teacher().eval(), []
    for example in render(rows):
        expected = label_log_probabilities(model, example.renderings["teacher"])
        assert expected.shape[1] == COMMON
        found = stored(collate([example]))
        top, ids = expected.topk(5)
        assert torch.equal(found.ids, ids)
        assert float((found.logprobs - top).abs().max()) <= 1 / 16384 + 1e-5
        tail = (1 - top.exp().sum(-1)).log()
        assert torch.allclose(found.tail_logprob, tail, atol=1e-4)
        outside.append(tail.exp())
    mass = torch.cat(outside)
    assert result.summary["outside"]["mean"] == pytest.approx(float(mass.mean()), rel=1e-4)
    assert result.summary["outside"]["highest"] == pytest.approx(float(mass.max()), rel=1e-4)
    assert result.summary["label_tokens"] == len(mass)


def test_the_loss_of_a_top_k_falls_short_less_and_less_and_is_whole_at_the_vocabulary(
    teacher: str, student: str, tmp_path: Path
) -> None:
    rows = make_rows(12, 5)
    whole = make(tmp_path, teacher, rows, kd_weight=0.4).evaluate()
    short = []
    for top_k in (1, 8, 32, 1024):
        cache = tmp_path / f"cache{top_k}"
        fill(cache, teacher, rows, student=student, signal="topk", top_k=top_k)
        measured = stored_measures(cache, rows, tmp_path)
        short.append(whole["eval_loss"] - measured["eval_loss"])
        said = json.loads((cache / "summary.json").read_text())["difference"]
        assert said["label_tokens"] > 0
        missing = said["whole"] - said["stored"]
        assert missing == pytest.approx(short[-1], rel=0.5, abs=1e-5)  # weighted another way
    assert short[0] > short[1] > short[2] > 1e-4
    assert abs(short[3]) < 1e-5 * whole["eval_loss"] + 1e-5
    assert measured["eval_teacher_entropy"] == pytest.approx(whole["eval_teacher_entropy"], 1e-4)


def test_a_student_learns_from_a_stored_top_k(teacher: str, student: str, tmp_path: Path) -> None:
    rows = make_rows(20, 7)
    fill(tmp_path / "cache", teacher, rows, student=student, signal="topk", top_k=16)
    trainer = make(tmp_path, None, rows, tmp_path / "cache", num_train_epochs=8)
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert "agreement" in trainer.state.log_history[0]
    assert "nll" not in trainer.state.log_history[0]  # it would take a product of its own


# ---- what is new, what was killed ----


def keys_of(cache: Path) -> list[list[bytes]]:
    return [pq.read_table(part)["key"].to_pylist() for part in sorted(cache.glob("part-*"))]


def test_a_dataset_that_grew_costs_what_is_new(
    teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, rows = tmp_path / "cache", make_rows(9, 4)
    fill(cache, teacher, rows[:6])
    before = (cache / "part-00000.parquet").read_bytes()
    result = fill(cache, teacher, rows)
    assert (cache / "part-00000.parquet").read_bytes() == before
    assert [len(keys) for keys in keys_of(cache)] == [6, 7] and result.summary["rows"] == 13
    assert "rows 13 (new 7)" in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in cache.glob("part-*")}
    shutil.copytree(cache, tmp_path / "copy")
    fill(cache, teacher, rows)  # nothing is left to do
    assert made == {path: path.stat().st_mtime_ns for path in cache.glob("part-*")}


@pytest.mark.slow
def test_a_killed_cache_goes_on_where_it_was(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(60, 20)
    dataset, cache = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "cache"
    code = (
        "import sys, time\n"
        "from leaf_distill.cli import main\n"
        "from leaf_distill.training import cache_writer\n"
        "cache_writer.PART_BYTES = 4000\n"
        "add = cache_writer.CacheWriter.add\n"
        "def slowly(self, rows):\n"
        "    time.sleep(0.05)\n"
        "    add(self, rows)\n"
        "cache_writer.CacheWriter.add = slowly\n"
        "main(sys.argv[1:])\n"
    )
    command = ["cache", "--teacher", teacher, "--dataset", dataset, "--output_dir", str(cache)]
    command += ["--max_batch_tokens", "64"]  # some rows at a time: a part is of whole batches
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen([sys.executable, "-c", code, *command], env=environment)
    deadline = time.monotonic() + 120
    while not (cache / "part-00001.parquet").exists() and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    there = keys_of(cache)
    assert len(there) >= 2 and sum(map(len, there)) < 80
    result = fill(cache, teacher, rows)
    after = keys_of(cache)
    assert after[: len(there)] == there
    flat = [key for keys in after for key in keys]
    assert len(flat) == len(set(flat)) == result.summary["rows"] == 80


# ---- refusals ----


def test_missing_rows_are_named_before_anything_runs(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(9, 4)
    fill(tmp_path / "cache", teacher, rows[:7])
    with pytest.raises(
        ValueError,
        match=r"train_dataset: must be in the teacher_cache.*got 6 rows"
        r".*row_id 7, 8, 9, 10, 11, 12\); run `leaf cache`",
    ):
        make(tmp_path, None, rows, tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"chat_template": "none"}, "must be made with the chat template and the settings"),
        ({"system_prompt": "w1"}, "must be made with the chat template and the settings"),
        ({"temperature": 2.0}, "temperature: must be that of the probabilities in teacher_cache"),
        ({"divergence": "jsd"}, "divergence: must be kl where teacher_cache holds the signal topk"),
    ],
)
def test_another_rendering_temperature_or_divergence_is_refused(
    settings: dict[str, Any], sentence: str, teacher: str, student: str, tmp_path: Path
) -> None:
    rows = make_rows(3, 0)
    fill(tmp_path / "cache", teacher, rows, student=student, signal="topk")
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path, None, rows, tmp_path / "cache", **settings)


def test_a_stored_top_k_is_not_mixed_with_labels(
    teacher: str, student: str, tmp_path: Path
) -> None:
    rows = make_rows(6, 2)
    fill(tmp_path / "cache", teacher, rows, signal="topk", top_k=4, student=student)
    with pytest.raises(ValueError, match=r"^ce_weight: must be 0 or 1 with a stored top k"):
        make(tmp_path, None, rows, tmp_path / "cache", ce_weight=0.5)


def test_a_training_on_labels_alone_asks_nothing_of_a_cache(
    teacher: str, student: str, tmp_path: Path
) -> None:
    rows = make_rows(6, 2)
    fill(tmp_path / "cache", teacher, rows[:2], signal="topk", top_k=4, student=student)
    settings = {"ce_weight": 1.0, "temperature": 2.0, "max_steps": 1}
    make(tmp_path, None, rows, tmp_path / "cache", **settings).train()


def test_what_a_cache_has_decided_is_refused_beside_it(teacher: str, tmp_path: Path) -> None:
    rows, cache = make_rows(3, 0), tmp_path / "cache"
    fill(cache, teacher, rows)
    args, tokenizer = make_config(tmp_path / "run"), make_tokenizer()
    given = {"teacher_dtype": "bfloat16", "teacher_device": "cpu", "teacher_quantization": "int8"}
    for name, value in {**given, "teacher_processing_class": tokenizer}.items():
        with pytest.raises(ValueError, match=f"^{name}: must be left out with teacher_cache"):
            LeafTrainer(
                *(make_student(), None, args, rows, None, tokenizer),
                teacher_cache=cache,
                **{name: value},
            )


def test_a_collator_that_changes_what_the_teacher_reads_is_named(
    teacher: str, tmp_path: Path
) -> None:
    rows, cache = make_rows(3, 0), tmp_path / "cache"
    fill(cache, teacher, rows)

    def other(examples: Any) -> Any:
        batch = collate(examples)
        batch["teacher_input_ids"][:, 1] = 7
        return batch

    trainer = LeafTrainer(
        *(make_student(), None, make_config(tmp_path / "run"), rows, None, make_tokenizer()),
        data_collator=other,
        teacher_cache=cache,
    )
    with pytest.raises(ValueError, match=r"^data_collator: must keep the teacher's tokens"):
        trainer.train()


def test_a_student_of_fewer_tokens_is_refused(teacher: str, tmp_path: Path) -> None:
    rows, larger = make_rows(3, 0), save(make_student(vocab_size=48), tmp_path / "larger")
    fill(tmp_path / "cache", teacher, rows, student=larger, signal="topk")
    with pytest.raises(ValueError, match="at most the 45 tokens of the student, got 48"):
        make(tmp_path, None, rows, tmp_path / "cache")


def test_another_teacher_is_refused(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(3, 0)
    fill(tmp_path / "cache", teacher, rows)
    make(tmp_path, teacher, rows, tmp_path / "cache")  # the same one is none
    other = save(make_teacher(hidden_size=24, initializer_range=0.2), tmp_path / "other")
    with pytest.raises(ValueError, match="teacher_cache: must hold the signal of the teacher"):
        make(tmp_path, other, rows, tmp_path / "cache")
    with pytest.raises(ValueError, match="teacher_model: must be None or a name"):
        make(tmp_path, make_teacher(), rows, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"output_dir: .* another content of the teacher"):
        fill(tmp_path / "cache", other, rows)
    with pytest.raises(ValueError, match=r"output_dir: .* another dtype 'float32', not 'bfloat16'"):
        fill(tmp_path / "cache", teacher, rows, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"output_dir: .* another tokenizer or template"):
        fill(tmp_path / "cache", teacher, rows, system_prompt="w1")


def test_a_directory_with_other_files_is_left_alone(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir: must be empty or hold a cache"):
        fill(tmp_path / "cache", teacher, make_rows(3, 0))
    with pytest.raises(ValueError, match="teacher_cache: must be a directory that `leaf cache`"):
        make(tmp_path, None, make_rows(3, 0), tmp_path / "cache")


def test_a_damaged_part_is_named(teacher: str, tmp_path: Path) -> None:
    rows = make_rows(9, 4)
    fill(tmp_path / "cache", teacher, rows)
    part = tmp_path / "cache" / "part-00000.parquet"
    cache = TeacherCache(tmp_path / "cache")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-00000.parquet: must be as LeaF writes it"):
        for example in render(rows):
            cache.read(rendering_key(example.renderings["teacher"]))
    part.write_bytes(data[:100])
    with pytest.raises(ValueError, match=r"part-00000.parquet: must be as LeaF writes it"):
        TeacherCache(tmp_path / "cache")


# ---- the commands ----


def test_the_commands_need_no_teacher_once_it_is_stored(
    teacher: str, student: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    dataset, cache = write_rows(tmp_path / "rows.jsonl", make_rows(8, 3)), str(tmp_path / "cache")
    argv = ["--student", student, "--teacher", str(own), "--dataset", dataset]
    assert main(["cache", *argv, "--output_dir", cache, "--signal", "topk", "--top_k", "9"]) == 0
    out = capsys.readouterr().out
    assert f"The cache {cache}: rows 11 (new 11)" in out and "Mass outside" in out
    assert "nats from the cache" in out
    shutil.rmtree(own)
    output = tmp_path / "out"
    argv = ["--student", student, "--teacher_cache", cache, "--dataset", dataset, "--use_cpu"]
    assert main(["distill", *argv, "--output_dir", str(output), "--show", "1"]) == 0
    assert "the student and the teacher read" in capsys.readouterr().out
    argv += ["--output_dir", str(output), "--originals_per_step", "8", "--max_steps", "1"]
    assert main(["distill", *argv]) == 0, capsys.readouterr().err
    card = (output / "README.md").read_text()
    assert f"distilled from `{own}`" in card
    assert "stored by `leaf cache`: the 9 largest log-probabilities" in card
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["teacher"]["name"] == str(own)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("cache --teacher t --dataset d", "output_dir: must be given"),
        ("cache --dataset d --output_dir o", "teacher: must be given"),
        ("cache --teacher t --dataset d --output_dir o --signal topk", "student: must be given"),
        ("cache --signal half", "--signal: must be one of hidden, topk, got 'half'"),
        ("cache --teacher t --dataset d --output_dir o --top_k 0", "top_k: must be from 1 to 1024"),
        (
            "cache --teacher t --dataset d --output_dir o --temperature 0",
            "temperature: must be from 0.001 to 1000.0, got 0",
        ),
        (
            "cache --teacher t --dataset d --output_dir o --top_k 8",
            "top_k: must come with signal topk, got 8",
        ),
        ("distill --student s --dataset d --output_dir o", "teacher: must be given"),
        (
            "distill --student s --dataset d --output_dir o --teacher_cache c --teacher_device cpu",
            "teacher_device: must be left out with teacher_cache, got 'cpu'",
        ),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(
    argv: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(argv.split())
    assert sentence in capsys.readouterr().err
