"""A tiny pair, its rows and measures for the tests of stage 2; run as a script, some trainings.

As a script (`torchrun distill_pair.py RUNS.json`) it trains as each of the named settings says and
writes, on rank 0, the student's weights and the log, so that runs with several processes can be
compared.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leaf_distill.data.collator import render_examples
from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Example, Rendering
from leaf_distill.data.prompt import Renderer
from leaf_distill.training.config import LeafConfig
from leaf_distill.training.trainer import LeafTrainer

# Each training collects garbage, which takes a second over all that transformers has imported.
gc.collect()
gc.freeze()

WORDS = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} "
    "{% if m.role == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def make_model(seed: int, hidden: int = 16, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": hidden,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.3,
        **config,
    }
    return LlamaForCausalLM(LlamaConfig(**settings))


def make_student(**config: Any) -> LlamaForCausalLM:
    return make_model(0, **config)


def make_teacher(**config: Any) -> LlamaForCausalLM:
    # Wider, and padded to more rows than the student has: both happen inside one model family.
    return make_model(1, hidden=24, **{"vocab_size": len(WORDS) + 3, **config})


def make_rows(
    originals: int = 20, counterfactuals: int = 7, *, cross: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    random = Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS[5:]) for _ in range(random.randint(low, high)))

    branches = ["original"] * originals + ["counterfactual"] * counterfactuals
    rows = [
        {
            "row_id": row_id,
            "candidate_id": -1 if branch == "original" else 0,
            "branch": branch,
            "prompt": [{"role": "user", "content": text(3, 9)}],
            "completion": [{"role": "assistant", "content": text(2, 6)}],
        }
        for row_id, branch in enumerate(branches)
    ]
    for row_id in range(cross):  # as long as those that it is made of
        shorter = {"branch": "cross", "candidate_id": counterfactuals, "row_id": row_id}
        theirs = [{"role": "user", "content": text(3, 9)}]
        rows.append({**rows[row_id], **shorter, "teacher_prompt": theirs})
    return rows


def answer(model: Any, row: dict[str, Any]) -> str:
    """The answer of at most 7 tokens that a model's likeliest tokens make, one row at a time."""
    words = f"<user> {row['prompt'][0]['content']} <assistant>".split()
    prompt = len(words)
    while len(words) < prompt + 7 and "<eos>" not in words:
        ids = torch.tensor([[WORDS.index(word) for word in words]])
        with torch.no_grad():
            words.append(WORDS[int(model(input_ids=ids).logits[0, -1].argmax())])
    return " ".join(word for word in words[prompt:] if word not in WORDS[:5])


def make_config(output_dir: Path | str, **settings: Any) -> LeafConfig:
    defaults = {
        "use_cpu": True,
        "originals_per_step": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return LeafConfig(output_dir=str(output_dir), **{**defaults, **settings})


def make_trainer(output_dir: Path | str, rows: Any = None, **settings: Any) -> LeafTrainer:
    rows = make_rows() if rows is None else rows
    return LeafTrainer(
        make_student(),
        make_teacher(),
        make_config(output_dir, **settings),
        rows,
        rows,
        make_tokenizer(),
    )


def losses(trainer: LeafTrainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        difference = float((tensor - theirs[name]).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


def render(rows: Any, template: str = TEMPLATE, **options: Any) -> list[Example]:
    """Rows as examples of the tiny pair, whose teacher may have another template."""
    examples = load_examples(rows)
    renderers = {
        "student": Renderer(make_tokenizer()),
        "teacher": Renderer(make_tokenizer(template)),
    }
    ids = len(WORDS)
    defaults = {"max_length": 4096, "embedding_rows": {"student": ids, "teacher": ids + 3}}
    render_examples(examples, renderers, **{**defaults, **options})  # type: ignore[arg-type]
    return examples


def label_log_probabilities(model: Any, rendering: Rendering) -> Tensor:
    """The model's own, in float64, where the next token is a label."""
    ids = torch.tensor(rendering.input_ids[None]).long()
    at = torch.tensor([*rendering.loss_mask[1:].tolist(), False])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids).logits
    return logits[0, at, : len(WORDS)].double().log_softmax(-1)


def plain_measures(student: Any, teacher: Any, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means per label token from the models' own logits, row by row, in float64."""
    sums: dict[str, float] = {}
    for example in render(rows):
        log_s = label_log_probabilities(student, example.renderings["student"])
        log_t = label_log_probabilities(teacher, example.renderings["teacher"])
        branch = "kd" if example.branch == "original" else "cd"
        labels = torch.tensor(example.renderings["student"].input_ids).long()
        labels = labels[torch.tensor(example.renderings["student"].loss_mask)]
        same = (log_s.argmax(-1) == log_t.argmax(-1)).double()
        for name, value in {
            f"{branch}_loss": (log_t.exp() * (log_t - log_s)).sum(),
            f"{branch}_tokens": torch.tensor(len(log_s)),
            "student_entropy": -(log_s.exp() * log_s).sum(),
            "teacher_entropy": -(log_t.exp() * log_t).sum(),
            "agreement": same.sum(),
            "nll": -log_s.gather(1, labels[:, None]).sum(),
        }.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    n_kd, n_cd = sums.pop("kd_tokens"), sums.pop("cd_tokens")
    tokens = {"kd_loss": n_kd, "cd_loss": n_cd}
    means = {name: value / tokens.get(name, n_kd + n_cd) for name, value in sums.items()}
    means["pool"] = n_kd / (n_kd + n_cd)
    return means


def main(runs: Path) -> None:
    for name, settings in json.loads(runs.read_text()).items():
        rows = settings.pop("rows")
        student, teacher = make_student(), make_teacher()
        if settings.pop("double"):
            student, teacher = student.double(), teacher.double()
        config = make_config(runs.parent / "run", **settings)
        trainer = LeafTrainer(student, teacher, config, rows, rows, make_tokenizer())
        trainer.train()
        trainer.evaluate()
        if trainer.is_world_process_zero():
            torch.save(student.state_dict(), runs.parent / f"{name}.pt")
            log = json.dumps(trainer.state.log_history)
            (runs.parent / f"{name}.json").write_text(log)
        # As at the end of a user's script: all ranks get here, then the processes end.
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
