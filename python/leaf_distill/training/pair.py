"""The two models of a training and their tokenizers, by name or in memory, and their checks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from leaf_distill.config import json_object
from leaf_distill.data.example import ROLES, Role
from leaf_distill.data.prompt import Renderer
from leaf_distill.models.checks import check_causal, embedding_rows, max_positions, warm_up
from leaf_distill.models.loading import check_same_tokenizer, load_model, load_tokenizer
from leaf_distill.training.config import LeafConfig

logger = logging.getLogger(__name__)

Model = str | nn.Module


@dataclass(frozen=True)
class Pair:
    """Student and teacher as LeafTrainer needs them."""

    models: dict[Role, Any]
    tokenizers: dict[Role, PreTrainedTokenizerBase]

    def renderers(self, args: LeafConfig) -> dict[Role, Renderer]:
        """Make the renderer of each model."""
        return {role: make_renderer(one, args) for role, one in self.tokenizers.items()}

    @property
    def embedding_rows(self) -> dict[Role, int]:
        """How many token ids each model's embedding has."""
        return {role: embedding_rows(model) for role, model in self.models.items()}

    def max_length(self, wanted: int) -> int:
        """The tokens that a row may have: `wanted`, or a model's positions where these are less."""
        for role, model in self.models.items():
            positions = max_positions(model.config)
            if positions is not None and positions < wanted:
                logger.info("max_length is %d: the %s has no more positions", positions, role)
                wanted = positions
        return wanted


def make_renderer(tokenizer: PreTrainedTokenizerBase, args: LeafConfig) -> Renderer:
    """The renderer of a model, as the settings have it."""
    return Renderer(
        tokenizer,
        chat_template=args.chat_template,
        system_prompt=args.system_prompt,
        template_kwargs=json_object(args.chat_template_kwargs, "chat_template_kwargs"),
    )


def make_pair(
    args: LeafConfig,
    model: Model,
    teacher_model: Model,
    tokenizer: PreTrainedTokenizerBase | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    teacher_dtype: str = "auto",
    trust_remote_code: bool = False,
    peft_config: Any = None,
) -> Pair:
    """Load what is given by name, wrap the student in an adapter, and check that both fit.

    A student that is loaded here is float32: steps of 1e-5 vanish in bfloat16 weights. Of an
    adapter's directory the adapter is what trains. A teacher is bfloat16 where `args.bf16` is on,
    else float32. A tokenizer that is not given is loaded from the model's name; the teacher's is
    the student's where its model has no name.

    Raises:
        ValueError: a model or tokenizer cannot be read, the student has no tokenizer, or the two
            models do not share one vocabulary or do share weights.
    """
    tokenizer = tokenizer or _own_tokenizer(model, trust_remote_code)
    if tokenizer is None:
        raise ValueError("processing_class: must be the student's tokenizer, got None")
    theirs = teacher_tokenizer or _own_tokenizer(teacher_model, trust_remote_code) or tokenizer
    if theirs is not tokenizer:
        check_same_tokenizer(theirs, tokenizer)
    if teacher_dtype == "auto":
        teacher_dtype = "bfloat16" if args.bf16 else "float32"
    dtypes = {"student": "float32", "teacher": teacher_dtype}
    tokenizers: dict[Role, PreTrainedTokenizerBase] = {"student": tokenizer, "teacher": theirs}
    models: dict[Role, Any] = {"student": model, "teacher": teacher_model}
    for role in ROLES:
        if isinstance(models[role], str):
            models[role] = load_model(
                models[role],
                dtype=dtypes[role],
                device=str(args.device),
                trainable_adapter=role == "student",
                trust_remote_code=trust_remote_code,
            )
        else:
            warm_up()
            check_causal(models[role], type(models[role]).__name__)
        _check_vocabulary(role, models[role], tokenizers[role])
    own = {id(parameter) for parameter in models["student"].parameters()}
    if own & {id(parameter) for parameter in models["teacher"].parameters()}:
        raise ValueError("teacher_model: must be a model of its own, got the student's weights")
    if peft_config is not None:
        set_seed(args.seed)  # an adapter begins with random weights
        models["student"] = _wrap(models["student"], peft_config)
    return Pair(models, tokenizers)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of a model to 0, also those that attention takes from an attribute."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _wrap(model: Any, peft_config: Any) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("peft_config: needs the package peft: pip install peft") from error
    if isinstance(model, peft.PeftModel):
        raise ValueError(
            "peft_config: must be left out (lora_r on the command line), since the student is an "
            "adapter already"
        )
    try:
        return peft.get_peft_model(model, peft_config)
    except ValueError as error:  # such as modules that the model has not
        raise ValueError(f"peft_config: {str(error).splitlines()[0]}") from error


def _own_tokenizer(model: Model, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model's weights; None for a model in memory without one."""
    if isinstance(model, str):
        return load_tokenizer(model, trust_remote_code=trust_remote_code)
    name = str(getattr(model, "name_or_path", "") or "")
    try:
        return load_tokenizer(name, trust_remote_code=trust_remote_code) if name else None
    except ValueError:  # saved without one, or moved since
        return None


def _check_vocabulary(role: Role, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token but an added one must have an embedding; a padded vocabulary has more."""
    rows = embedding_rows(model)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    token = max((one for one in vocabulary if one not in added), key=vocabulary.__getitem__)
    if vocabulary[token] >= rows:
        argument = "model" if role == "student" else "teacher_model"
        raise ValueError(
            f"{argument}: must share the tokenizer's vocabulary, got {rows} embeddings for a "
            f"tokenizer whose token {token!r} has the id {vocabulary[token]}"
        )
