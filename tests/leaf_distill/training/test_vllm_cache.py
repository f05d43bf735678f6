"""A cache filled from a real vLLM server, beside that of the same model in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_pair import (
    losses,
    make_config,
    make_rows,
    make_student,
    make_teacher,
    make_tokenizer,
    render,
)
from real_servers import VLLM, RealServer, running

from leaf_distill.data.collator import collate
from leaf_distill.training.cache import cache_teacher
from leaf_distill.training.config import CacheConfig
from leaf_distill.training.teacher_cache import StoredTeacher, TeacherCache
from leaf_distill.training.trainer import LeafTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.is_file(), reason="vLLM is not installed; run: make .venv/.vllm"),
]

WIDE = {"hidden_size": 128, "vocab_size": 48}  # heads of 64, which vLLM's kernels take


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("pair")
    models = {"teacher": make_teacher(**WIDE), "student": make_student(vocab_size=48)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in models}


@pytest.fixture(scope="module")
def vllm(pair: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    with running("vllm", pair["teacher"], tmp_path_factory.mktemp("logs") / "vllm") as server:
        yield server


def fill(directory: Path, pair: dict[str, str], rows: Any, **settings: Any) -> StoredTeacher:
    dataset = directory.with_suffix(".jsonl")
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**pair, "signal": "topk", "top_k": 20, **settings}
    cache_teacher(CacheConfig(dataset=str(dataset), output_dir=str(directory), **given))
    return StoredTeacher(TeacherCache(directory), torch.device("cpu"))


def test_vllms_cache_is_that_of_the_live_teacher(
    pair: dict[str, str], vllm: RealServer, tmp_path: Path
) -> None:
    rows = make_rows(20, 7, cross=2)
    served = fill(tmp_path / "served", pair, rows, teacher_server_url=vllm.url)
    live = fill(tmp_path / "live", pair, rows)
    assert served.cache.manifest["server"]["model"] == "real"
    assert len(served.cache) == len(live.cache) == 29
    for example in render(rows):
        batch = collate([example])
        ours, theirs = served(batch), live(batch)
        assert torch.equal(ours.ids, theirs.ids)
        assert float((ours.logprobs - theirs.logprobs).abs().max()) < 5e-4
        assert float((ours.tail_logprob.exp() - theirs.tail_logprob.exp()).abs().max()) < 1e-4
    found = []
    for name in ("served", "live"):
        config, student = make_config(tmp_path / "run"), make_student(vocab_size=48)
        cache = tmp_path / name
        trainer = LeafTrainer(
            student, None, config, rows, None, make_tokenizer(), teacher_cache=cache
        )
        trainer.train()
        found.append(torch.tensor(losses(trainer)))
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=0)


def test_what_vllm_refuses_is_one_sentence(
    pair: dict[str, str], vllm: RealServer, tmp_path: Path
) -> None:
    rows = make_rows(3, 0)
    settings = {"teacher_server_url": vllm.url}
    with pytest.raises(
        ValueError,
        match=r"^top_k: must be at most what the server at .* allows, got 32 \(.*max allowed: 20",
    ):
        fill(tmp_path / "cache", pair, rows, top_k=32, **settings)
    words = len(rows[1]["completion"][0]["content"].split())
    rows[1]["prompt"][0]["content"] = " ".join(["w1"] * (61 - words))
    with pytest.raises(
        ValueError, match=r"^max_length: must be below the context of the server .* row of 64 tok"
    ):
        fill(tmp_path / "cache", pair, rows, **settings)
