"""The two models of a training and their tokenizers, by name or in memory, checked together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from leaf_distill.config import LARGEST, json_object
from leaf_distill.data.collator import ExampleDataset, prepare_dataset
from leaf_distill.data.example import Example, Role
from leaf_distill.data.prompt import Renderer
from leaf_distill.data.template import template_differences
from leaf_distill.data.turns import earlier_turns
from leaf_distill.models.checks import check_causal, embedding_rows, max_positions, warm_up
from leaf_distill.models.lm_head import logit_rows
from leaf_distill.models.loading import load_model
from leaf_distill.models.placement import BALANCED, resolve_device
from leaf_distill.models.source import named
from leaf_distill.models.tokenizer import check_same_tokenizer, load_tokenizer
from leaf_distill.training.config import LeafConfig
from leaf_distill.training.sharding import check_whole, loaded_whole
from leaf_distill.training.teacher_cache import TeacherCache

logger = logging.getLogger(__name__)

Model = str | nn.Module


@dataclass(frozen=True)
class Pair:
    """Student and teacher as LeafTrainer needs them; with a cache, no teacher among the models.

    embedding_rows: the number of token ids in each model's embedding.
    max_length: tokens that a row may have in all, at most the positions of either model.
    span_weighting: as for `prepare_dataset`.
    """

    models: dict[Role, Any]
    renderers: dict[Role, Renderer]
    embedding_rows: dict[Role, int]
    max_length: int
    span_weighting: str

    def prepare(self, rows: Any, name: str) -> tuple[ExampleDataset, list[Example]]:
        """Render rows for both models; see `prepare_dataset`."""
        dataset, left = prepare_dataset(
            rows,
            self.renderers,
            max_length=self.max_length,
            embedding_rows=self.embedding_rows,
            name=name,
            span_weighting=self.span_weighting,
        )
        several = sum(bool(earlier_turns(dataset.examples[i].messages)) for i in dataset.originals)
        if several and self.renderers["student"].train_on == "last":
            logger.warning(
                "%s: %d rows have earlier assistant turns, which are no labels; with train_on all "
                "they are",
                *(name, several),
            )
        return dataset, left


def make_pair(
    args: LeafConfig,
    model: Model,
    teacher_model: Model | TeacherCache,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    teacher_dtype: str = "auto",
    teacher_device: str = "auto",
    teacher_quantization: str | None = None,
    trust_remote_code: bool = False,
    peft_config: Any = None,
) -> Pair:
    """Load what is given by name, wrap the student in an adapter, and check that both fit.

    A student that is loaded here is float32: steps of 1e-5 vanish in bfloat16 weights. Of an
    adapter's directory the adapter is what trains. A teacher is bfloat16 where `args.bf16` is on
    and its device is no CPU beside a GPU, else float32. A tokenizer that is not given is loaded
    from the model's name; the teacher's is the student's where its model has no name. A cache
    brings its own.

    Logs how the two models' prompts differ, positions fewer than `args.max_length`, and trainable
    weights of 16 bits.

    Args:
        args: the settings.
        model, teacher_model: models in memory, or names; in the teacher's place, also its cache.
        tokenizer, teacher_tokenizer: of the student and of the teacher.
        teacher_dtype, teacher_quantization: of a teacher that is given by name.
        teacher_device: "auto" for the student's; see `resolve_device`.
        trust_remote_code: whether code that comes with a named model may run.
        peft_config: the adapter to wrap the student in.

    Raises:
        ValueError: a model or tokenizer cannot be read, the student has no tokenizer, or the two
            models do not share one vocabulary or do share weights.
    """
    tokenizer = tokenizer or _own_tokenizer(model, trust_remote_code)
    if tokenizer is None:
        raise ValueError(
            "processing_class: must be the student's tokenizer, got None; give it, since the model "
            "names no place that has one"
        )
    with named("teacher_model"):
        if isinstance(teacher_model, TeacherCache):
            theirs = teacher_model.tokenizer
        else:
            own = teacher_tokenizer or _own_tokenizer(teacher_model, trust_remote_code)
            theirs = own or tokenizer
    if theirs is not tokenizer:
        check_same_tokenizer(theirs, tokenizer)
    devices = {"student": str(args.device), "teacher": str(args.device)}
    if teacher_device != "auto":
        with named("teacher_device", "device"):
            resolve_device(teacher_device)
        devices["teacher"] = teacher_device
    if teacher_dtype == "auto":
        beside = teacher_device == "cpu" and args.device.type != "cpu"
        teacher_dtype = "bfloat16" if args.bf16 and not beside else "float32"
    dtypes = {"student": "float32", "teacher": teacher_dtype}
    tokenizers: dict[Role, PreTrainedTokenizerBase] = {"student": tokenizer, "teacher": theirs}
    models: dict[Role, Any] = {"student": model}
    if not isinstance(teacher_model, TeacherCache):
        models["teacher"] = teacher_model
    for role in list(models):
        if isinstance(models[role], str):
            with named("teacher_quantization", "model_quantization"), loaded_whole():
                models[role] = load_model(
                    models[role],
                    dtype=dtypes[role],
                    device=devices[role],
                    trainable_adapter=role == "student",
                    trust_remote_code=trust_remote_code,
                    quantization=teacher_quantization if role == "teacher" else None,
                )
        else:
            check_whole(models[role], "model" if role == "student" else "teacher_model")
            warm_up()
            check_causal(models[role], type(models[role]).__name__)
            if role == "teacher":
                _place(models[role], devices[role], teacher_device, teacher_quantization)
        _check_vocabulary(role, models[role], tokenizers[role])
    if "teacher" in models:
        _check_apart(models["student"], models["teacher"])
        models["teacher"].eval().requires_grad_(False)
    if peft_config is not None:
        set_seed(args.seed)  # an adapter begins with random weights
        models["student"] = _wrap(models["student"], peft_config)
    if args.disable_dropout:
        _disable_dropout(models["student"])
    renderers = make_renderers(tokenizers, args)
    _warn_of_rounding(models["student"], args.learning_rate)
    rows = {role: embedding_rows(one) for role, one in models.items()}
    positions = {role: max_positions(one.config) for role, one in models.items()}
    if isinstance(teacher_model, TeacherCache):
        rows["teacher"] = teacher_model.manifest["embedding_rows"]
        positions["teacher"] = teacher_model.manifest["max_positions"]
        vocab_size = logit_rows(models["student"]) or LARGEST  # a head that is refused later
        if args.ce_weight < 1:
            teacher_model.check_training(
                renderers["teacher"], args.temperature, args.divergence, vocab_size
            )
    limit = max_length(positions, args.max_length)
    return Pair(models, renderers, rows, limit, args.span_weighting)


def _place(teacher: Any, device: str, asked: str, quantization: str | None) -> None:
    """Bring a teacher in memory to its device; one that is spread or rounded stays where it is."""
    fixed = hasattr(teacher, "hf_device_map") or hasattr(teacher, "quantization_method")
    if quantization is not None or asked == BALANCED or (fixed and asked != "auto"):
        name, value = "teacher_device", asked
        if quantization is not None:
            name, value = "teacher_quantization", quantization
        raise ValueError(
            f"{name}: must be left out for a model in memory that is to stay as it is, got "
            f"{value!r}; name the teacher's directory, or load it so"
        )
    if not fixed:
        teacher.to(resolve_device(device))


def make_renderers(
    tokenizers: Mapping[Role, PreTrainedTokenizerBase], args: LeafConfig
) -> dict[Role, Renderer]:
    """Return the renderers of both models; logs how their prompts differ."""
    renderers = {
        role: Renderer(
            tokenizer,
            chat_template=args.chat_template,
            system_prompt=args.system_prompt,
            template_kwargs=json_object(args.chat_template_kwargs, "chat_template_kwargs"),
            train_on=args.train_on,
        )
        for role, tokenizer in tokenizers.items()
    }
    templates = [renderers[role].template for role in ("teacher", "student")]
    for sentence in template_differences(*templates):
        logger.warning("%s", sentence)
    return renderers


def max_length(positions: Mapping[Role, int | None], wanted: int) -> int:
    """Return the tokens that a row may have: as many as wanted, or the positions of a model."""
    for role, most in positions.items():
        if most is not None and most < wanted:
            logger.info("max_length is %d: the %s has no more positions", most, role)
            wanted = most
    return wanted


def _warn_of_rounding(student: nn.Module, learning_rate: float) -> None:
    trained = {one.dtype for one in student.parameters() if one.requires_grad}
    for dtype in (torch.bfloat16, torch.float16):
        if dtype in trained:
            logger.warning(
                "model: has trainable weights in %s, which round away most steps of learning_rate "
                "%g; load it in float32 (bf16 still computes in bfloat16)",
                str(dtype).removeprefix("torch."),
                learning_rate,
            )


def _disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also those that attention takes from an attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def import_peft(argument: str) -> Any:
    """Return the package peft; ValueError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            f"{argument}: must come with the package peft, got none; run: pip install "
            "'leaf-distill[peft]'"
        ) from error
    return peft


def _wrap(model: Any, peft_config: Any) -> Any:
    peft = import_peft("peft_config")
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "lora_r (peft_config): must be left out for a student that is an adapter already, "
            "which then trains on"
        )
    try:
        wrapped = peft.get_peft_model(model, peft_config)
    except ValueError as error:  # such as modules that the model has not
        raise ValueError(f"lora_r (peft_config): {str(error).splitlines()[0]}") from error
    for config in wrapped.peft_config.values():
        base = config.base_model_name_or_path or ""
        if os.path.isdir(base):  # else the adapter would be found from this directory only
            config.base_model_name_or_path = os.path.abspath(base)
    return wrapped


def _own_tokenizer(model: Model, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer beside a model's weights; None for a model in memory without one."""
    if isinstance(model, str):
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    name = str(getattr(model, "name_or_path", "") or "")
    try:
        return load_tokenizer(name, trust_remote_code=trust_remote_code) if name else None
    except ValueError:  # saved without one, or moved since
        return None


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    if set(map(id, student.parameters())) & set(map(id, teacher.parameters())):
        raise ValueError(
            "teacher_model: must have weights of its own, got the student's; load it again"
        )


def _check_vocabulary(role: Role, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that all tokens but added ones have an embedding; a padded vocabulary has more."""
    rows = embedding_rows(model)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    token = max((one for one in vocabulary if one not in added), key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        argument = "model" if role == "student" else "teacher_model"
        raise ValueError(
            f"{argument}: must share the tokenizer's vocabulary, got {rows} embeddings for a "
            f"tokenizer whose token {token!r} has the id {vocabulary[token]}"
        )
