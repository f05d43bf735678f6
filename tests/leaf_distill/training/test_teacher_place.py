"""A teacher on another device than the student, spread, or rounded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import torch
from distill_pair import (
    TEMPLATE,
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    render,
)
from transformers import LlamaForCausalLM

from leaf_distill.data.collator import collate
from leaf_distill.training import teacher as teachers
from leaf_distill.training.teacher import LiveTeacher
from leaf_distill.training.trainer import LeafTrainer

SPREAD = {
    **{f"model.{part}": "cpu" for part in ("embed_tokens", "layers.0", "norm", "rotary_emb")},
    **{"model.layers.1": "disk", "lm_head": "disk"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    make_teacher(tie_word_embeddings=False).save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def train(directory: Path, teacher: Any, **options: Any) -> list[float]:
    config = make_config(directory, max_steps=3)
    rows = make_rows()
    trainer = LeafTrainer(make_student(), teacher, config, rows, None, make_tokenizer(), **options)
    trainer.train()
    return losses(trainer)


def test_hidden_states_and_the_head_come_to_the_students_device(saved: Path) -> None:
    """The device "meta" stands for a second one, which this machine may not have."""
    teacher = LiveTeacher(make_teacher().eval(), torch.device("meta"))
    signal = teacher(collate(render(make_rows(3, 1), TEMPLATE)))
    places = {one.device.type for one in (signal.states, signal.head.weight)}
    assert places == {"meta"} and signal.states.shape[1] == 24
    assert {weight.device.type for weight in teacher.model.parameters()} == {"cpu"}


@pytest.mark.parametrize("device", ["cpu", "balanced"])
def test_a_named_place_changes_no_loss(device: str, saved: Path, tmp_path: Path) -> None:
    expected = train(tmp_path, str(saved))
    assert train(tmp_path, str(saved), teacher_device=device) == expected


def test_a_teacher_with_weights_on_the_disk_gives_the_same_loss(
    saved: Path, tmp_path: Path
) -> None:
    spread = LlamaForCausalLM.from_pretrained(
        saved, device_map=SPREAD, offload_folder=str(tmp_path / "offloaded")
    )
    assert {weight.device.type for weight in spread.parameters()} == {"cpu", "meta"}
    found = train(tmp_path, spread)
    assert spread.lm_head.weight.device.type == "meta"  # as it was
    assert found == pytest.approx(train(tmp_path, str(saved)), rel=1e-6)


def test_on_a_cpu_a_row_does_not_depend_on_its_batch() -> None:
    teacher = LiveTeacher(make_teacher().eval(), torch.device("cpu"))
    examples = render(make_rows(8, 4))
    together = teacher(collate(examples)).states
    alone = [teacher(collate([one])).states for one in examples]
    assert torch.equal(together, torch.cat(alone))


def passes_of(teacher: LiveTeacher) -> list[Any]:
    """Return a list that grows by one with each forward pass of any of its models."""
    made: list[Any] = []
    for hook in teacher.hooks:
        hook.model.register_forward_hook(lambda *_: made.append(None))
    return made


def test_a_row_that_comes_again_is_not_read_again() -> None:
    teacher = LiveTeacher(make_teacher().eval(), torch.device("cpu"))
    examples = render(make_rows(8, 4))
    expected = [teacher(collate([one])).states for one in examples]
    passes = passes_of(teacher)
    teacher(collate(examples))
    teacher(collate(examples))
    assert len(passes) == 24
    passes.clear()
    with teacher.keeping():
        teacher(collate(examples[:5]))
        with teacher.keeping():  # an evaluation within a training
            teacher(collate(examples[3:]))
        again = teacher(collate(examples[::-1])).states
        assert torch.equal(again, torch.cat(expected[::-1]))
        again.zero_()  # is nobody else's
        assert torch.equal(teacher(collate(examples)).states, torch.cat(expected))
        assert len(passes) == 12
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(teacher(collate(examples)).states, torch.cat(expected))
    assert len(passes) == 24
    teacher(collate(examples))
    assert len(passes) == 36


def test_the_same_tokens_with_other_labels_are_not_taken_for_the_same() -> None:
    teacher = LiveTeacher(make_teacher().eval(), torch.device("cpu"))
    batch = collate(render(make_rows(3, 0)))
    fewer = {**batch, "teacher_loss_mask": batch["teacher_loss_mask"].clone()}
    fewer["teacher_loss_mask"][:, ::2] = False
    expected = teacher(batch).states, teacher(fewer).states
    with teacher.keeping():
        found = teacher(batch).states, teacher(fewer).states
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_as_many_rows_are_kept_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = LiveTeacher(make_teacher().eval(), torch.device("cpu"))
    examples = render(make_rows(6, 0))
    expected = [teacher(collate([one])).states for one in examples]
    monkeypatch.setattr(teachers, "KEPT_BYTES", sum(one.nbytes for one in expected[:4]))
    passes = passes_of(teacher)
    with teacher.keeping():
        for _ in range(2):
            assert torch.equal(teacher(collate(examples)).states, torch.cat(expected))
    kept = len(examples) * 2 - len(passes)
    assert 4 <= kept < len(examples)


def test_rows_of_a_model_that_remembers_them_are_read_each_time() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = make_teacher(rope_parameters=rope, max_position_embeddings=16).eval()
    teacher = LiveTeacher(model, torch.device("cpu"))
    passes = passes_of(teacher)
    with teacher.keeping():
        teacher(collate(render(make_rows(4, 0))))
        teacher(collate(render(make_rows(4, 0))))
    assert len(passes) == 8


def test_a_training_reads_each_row_once(tmp_path: Path) -> None:
    rows, counts = make_rows(9, 3), []
    for packing in (True, False):
        config = make_config(tmp_path, num_train_epochs=3, eval_strategy="epoch", packing=packing)
        models = make_student(), make_teacher()
        trainer = LeafTrainer(*models, config, rows, rows, make_tokenizer())
        passes = passes_of(trainer._objective.teacher)
        trainer.train()
        counts.append(len(passes))
    assert counts == [len(rows) + 2] * 2  # and twice the shortest one, to compare the head


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teacher_device": "gpu"}, "teacher_device: must be 'auto', 'cpu', 'cuda"),
        ({"teacher_device": "cuda:63"}, "teacher_device: must be one of the"),
        ({"teacher_quantization": "int3"}, "teacher_quantization: must be one of int8, bnb8, nf4"),
    ],
)
def test_a_place_that_is_none_is_named(
    options: dict[str, str], sentence: str, saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path, str(saved), **options)


@pytest.mark.parametrize(
    "options", [{"teacher_device": "balanced"}, {"teacher_quantization": "int8"}]
)
def test_a_model_in_memory_is_not_spread_or_rounded(
    options: dict[str, str], tmp_path: Path
) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: must be left out for a model in memory"):
        train(tmp_path, make_teacher(), **options)


ROUNDED = """
import sys
from pathlib import Path
from test_teacher_place import train

saved, directory = map(Path, sys.argv[1:])
whole = train(directory, str(saved))
rounded = train(directory, str(saved), teacher_quantization="int8")
print("LOSSES", *whole, *rounded)
"""


@pytest.mark.slow
def test_a_rounded_teacher_trains_nearly_alike(saved: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    printed = harness.run(
        "-c", ROUNDED, saved, tmp_path, cwd=tmp_path, within="quantize", PYTHONPATH=path
    )
    line = next(one for one in printed.splitlines() if one.startswith("LOSSES "))
    numbers = [float(word) for word in line.split()[1:]]
    whole, rounded = numbers[:3], numbers[3:]
    assert rounded != whole and rounded == pytest.approx(whole, rel=0.02)
