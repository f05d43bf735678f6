"""Teacher and student of one run: tokenizers and templates at once, weights one model at a time."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from leaf_distill.config import DetectConfig
from leaf_distill.data.dataset import Message
from leaf_distill.data.prompt import Renderer
from leaf_distill.io import Stage
from leaf_distill.models.loading import (
    check_same_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
)

ROLES: Final = ("student", "teacher")
ROWS_A_BATCH: Final = 256
"""Rows of one batch where no model is involved."""


@dataclass(frozen=True)
class Side:
    """One model of the pair, all but its weights.

    model, rendering: fingerprints of the weights and of all that decides a rendering, taken once;
    positions: the longest sequence that the model takes, if it has a limit.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    model: str
    rendering: str
    positions: int | None


class Pair:
    """Teacher and student, of which at most one has its weights in memory.

    Raises ValueError for a model that cannot be read, or for two different tokenizers.
    """

    def __init__(self, config: DetectConfig, root: Path) -> None:
        self.config = config
        self.root = root
        self.sides = {role: self._side(getattr(config, role)) for role in ROLES}
        check_same_tokenizer(self.sides["teacher"].tokenizer, self.sides["student"].tokenizer)
        known = [side.positions for side in self.sides.values() if side.positions]
        self.max_length = min([config.max_length, *known])
        self._loaded: tuple[str, PreTrainedModel] | None = None

    def _side(self, name: str) -> Side:
        tokenizer = load_tokenizer(name)
        renderer = Renderer(
            tokenizer,
            chat_template=self.config.chat_template,
            system_prompt=self.config.system_prompt,
        )
        return Side(
            name=name,
            tokenizer=tokenizer,
            renderer=renderer,
            model=model_fingerprint(name),
            rendering=renderer.fingerprint,
            positions=_positions(name),
        )

    def model(self, role: str) -> PreTrainedModel:
        """Return the role's model, loaded at the first need and after the other one is gone."""
        if self._loaded is None or self._loaded[0] != role:
            self.release()
            model = load_model(
                self.sides[role].name, dtype=self.config.dtype, device=self.config.device
            )
            self._loaded = (role, model)
        return self._loaded[1]

    def release(self) -> None:
        """Let the weights go."""
        if self._loaded is not None:
            self._loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def stage(self, name: str, schema: pa.Schema, settings: Mapping[str, object]) -> Stage:
        """Return the stage of this name in the run directory."""
        return Stage(self.root / "stages", name, dict(settings), schema)

    def model_settings(self, role: str) -> dict[str, object]:
        """Return what every result of this role's model depends on.

        The size of a batch is not part of it: it changes results by no more than rounding, and who
        has to lower it must not lose the stages that are done.
        """
        side = self.sides[role]
        return {
            "model": side.model,
            "rendering": side.rendering,
            "dtype": self.config.dtype,
        }

    def prompt_lengths(self, messages: Sequence[Message]) -> dict[str, int]:
        """Return a prompt's tokens for each role; ValueError where a template refuses it."""
        return {
            role: len(side.renderer.prompt(messages).input_ids) for role, side in self.sides.items()
        }


def chunks(ids: Sequence[int], size: int = ROWS_A_BATCH) -> list[list[int]]:
    """Return ids in consecutive lists of at most size."""
    return [list(ids[start : start + size]) for start in range(0, len(ids), size)]


def _positions(name: str) -> int | None:
    path = Path(name).expanduser()
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(path) if path.exists() else name}
    if path.is_file():
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**place).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {name!r} has no readable configuration: {error}") from error
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
