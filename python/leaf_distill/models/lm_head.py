"""Captures the LM head's input during the model's forward.

`linear_dual_kl` needs the head's input and its weight. Hooks take both while the model runs its
forward (within DDP, FSDP or DeepSpeed), and a function of them becomes the forward's output. A call
of the decoder and the head outside the wrapper would skip its gradient reduction and read a sharded
weight. `output_hidden_states` would keep every layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from leaf_distill.models.checks import eval_mode, without_mask_advice
from leaf_distill.models.packing import attention_of_rows, can_pack, packed, padded

# Settings in transformers' configurations that act on the logits: a factor first, then the softcap.
_FACTORS: Final = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS: Final = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

AtHead = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""A function of the head's input at the chosen positions [N, H], its weight [V, H] and bias [V]."""


class LMHeadHook:
    """Captures the LM head's input during the model's forward and computes a result from it.

    Args:
        model: a transformers model, or a PeftModel around one; not yet wrapped for training.
        role: the name of the model in error messages, "student" or "teacher".

    Attributes:
        scale, softcap: the factor and the softcap that the model applies to its logits.
        vocab_size: the rows of the head that make logits; a padded head may have more.
        packs: whether `run` runs the rows of a batch as one sequence, without padding.

    Raises:
        ValueError: the model has no plain linear head.
    """

    def __init__(self, model: Any, role: str) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            raise ValueError(
                f"{role}: must be a causal language model with a plain linear head, got "
                f"{type(model).__name__} with the head {type(head).__name__}; merge or leave away "
                "an adapter or quantization on the head"
            )
        self.model, self.head, self.role = model, head, role
        self.scale, self.softcap = logit_transform(model.config)
        self.vocab_size = logit_count(model.config, head)
        self.packs = False
        self._autocasts = False
        self._positions: Tensor | None = None
        self._at_head: AtHead | None = None
        self._hidden: Tensor | None = None
        self._output: Tensor | None = None
        self._result: Tensor | None = None
        # torch.compile leaves the hooks as they are: a trace of them would hold for one batch only.
        untraced: Any = torch.compiler.disable
        head.register_forward_pre_hook(untraced(self._enter))
        head.register_forward_hook(untraced(self._compute))
        self._taking = untraced(self._take)
        self._last = head.register_forward_hook(self._taking)
        model.register_forward_hook(untraced(self._leave))

    def run(
        self, module: nn.Module, ids: Tensor, attention_mask: Tensor, at: Tensor, then: AtHead
    ) -> Tensor:
        """Run the forward of `module` and return `then` of the head's input at some positions.

        Args:
            module: the model, or its wrapper.
            ids, attention_mask: int64 [B, T].
            at: bool [B, T], the N positions whose hidden states are wanted, in row-major order.
            then: takes the hidden states [N, H], the head's weight [V, H] and its bias [V] or None.

        Returns:
            The result of `then`.

        Raises:
            ValueError: the model does not call its head, or not with one state per position.
        """
        self._positions = at[attention_mask.bool()][None] if self.packs else at
        self._at_head = then
        if next(reversed(self.head._forward_hooks)) != self._last.id:  # behind those of a wrapper
            self._last.remove()
            self._last = self.head.register_forward_hook(self._taking)
        pack = packed if self.packs else padded
        try:
            with pack(ids, attention_mask) as arguments, without_mask_advice():
                result: Tensor = module(**arguments, use_cache=False)
        finally:
            self._positions = self._at_head = self._hidden = None
            self._output = self._result = None
        return result

    @contextmanager
    def packing(self) -> Iterator[None]:
        """Let `run` pack rows, where the model keeps them apart; it must outlast the backward."""
        if self.packs or not can_pack(self.model, self.role):
            yield
            return
        with attention_of_rows(self.model):
            self.packs = True
            try:
                yield
            finally:
                self.packs = False

    def check(self, ids: Tensor, attention_mask: Tensor, at: Tensor) -> None:
        """Compare the logits computed from the head's input with the model's on one row.

        Positions where neither is finite are left out: training skips such a row of the teacher's
        and names one of the student's.

        Args:
            ids, attention_mask, at: as for `run`.

        Raises:
            ValueError: the head is not finite, or the two differ by more than rounding: training
                would optimize other logits than the model's.
        """
        with eval_mode(self.model), torch.no_grad():
            output = self.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            expected = output.logits[at]
            made = self.run(self.model, ids, attention_mask, at, self._logits)
        if expected.shape != made.shape:
            raise ValueError(
                f"{self.role}: must make one logit for each of the {made.shape[-1]} rows of its "
                f"head, got {expected.shape[-1]} logits from {type(self.model).__name__}; choose a "
                "model without padding in its head"
            )
        unknown = ~(expected.isfinite() | made.isfinite())
        expected, made = expected.masked_fill(unknown, 0), made.masked_fill(unknown, 0)
        eps = max(torch.finfo(one.dtype).eps for one in (expected, made))
        tolerance = 32 * eps * max(1.0, float(expected.abs().max()))
        difference = float((expected - made).abs().max())
        # The tolerance of single logits would hide a factor in bfloat16. Rounding errors, at most
        # eps / 2 of a logit and of either sign, average out over all logits; a factor does not.
        square = float(made.float().square().sum())
        excess = float((expected.float() * made.float()).sum()) - square
        if not (difference <= tolerance and abs(excess) <= max(1e-3, eps / 4) * square):
            raise ValueError(
                f"{self.role}: must make the logits that its head and config describe (scale "
                f"{self.scale}, softcap {self.softcap}), got logits of {type(self.model).__name__} "
                f"that differ by {difference:.3g} (allowed {tolerance:.3g}) and are "
                f"{1 + excess / (square or 1):.4g} times as large; choose another model"
            )

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for part in (weight, bias):
            # The extremes are finite when all is, and need no mask of the size of the head.
            if part is not None and not torch.stack(torch.aminmax(part)).isfinite().all():
                raise ValueError(
                    f"{self.role}: must have finite weights, got NaN or infinity in the head of "
                    f"{type(self.model).__name__}; choose another checkpoint"
                )
        logits = nn.functional.linear(hidden, weight, bias)
        return finish_logits(logits, self.scale, self.softcap)

    def _enter(self, head: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self._positions is None:
            return None
        hidden = args[0]
        if hidden.dim() != 3 or hidden.shape[:2] != self._positions.shape:
            raise ValueError(
                f"{self.role}: must give its head one hidden state for each token, got "
                f"{type(self.model).__name__}, which gives it {tuple(hidden.shape)} for "
                f"{tuple(self._positions.shape)} tokens; choose another architecture"
            )
        self._hidden = hidden[self._positions.to(hidden.device)]
        nothing = hidden[:1, :0]  # the ordinary product is not used: a row takes long in bfloat16
        self._autocasts = torch.is_autocast_enabled(hidden.device.type)
        if self._autocasts:  # it would cast the whole weight; `_compute` lets it go on
            torch.set_autocast_enabled(hidden.device.type, False)
            nothing = nothing.to(head.weight.dtype)
        return (nothing,)

    def _compute(self, head: nn.Linear, args: Any, output: Tensor) -> Tensor | None:
        """Return the result as the head's output, until `_take`.

        A wrapper's hooks see it between the two. ZeRO-3 then gathers the weight in the backward,
        where its gradient arrives; it gathers for the outputs of a module only.
        """
        if self._at_head is None or self._hidden is None:
            return None
        if self._autocasts:
            device = self._hidden.device.type
            torch.set_autocast_enabled(device, True)
            output = output.to(torch.get_autocast_dtype(device))
        self._output = output
        # accelerate has taken an offloaded weight away again: it is fetched once more.
        with align_module_device(head):
            weight: Tensor = head.weight
            bias: Tensor | None = head.bias
            if self.vocab_size < len(weight):
                weight = weight[: self.vocab_size]
                bias = None if bias is None else bias[: self.vocab_size]
            return self._at_head(self._hidden, weight, bias)

    def _take(self, head: nn.Linear, args: Any, output: Tensor) -> Tensor | None:
        """Keep the result, and give the model the ordinary output, with which it goes on."""
        if self._output is None:
            return None
        self._result = output
        return self._output

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self._at_head is None:
            return None
        if self._result is None:
            raise ValueError(
                f"{self.role}: must call its head in its forward pass, got {type(model).__name__}, "
                "which does not; choose another architecture"
            )
        return self._result


def logit_transform(config: Any) -> tuple[float, float | None]:
    """Return the factor and the softcap that a model applies to its logits, from its config."""
    text = config.get_text_config()
    scale = math.prod(_number(text, name) or 1.0 for name in _FACTORS)
    divisor, family = _number(text, "logits_scaling") or 1.0, str(text.model_type)
    if family.startswith("hyperclovax"):
        scale *= divisor  # one family multiplies by it
    elif not family.startswith("minicpm3"):  # which divides the hidden states, before the head
        scale *= 1.0 / divisor
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(text, name))), None)
    return scale, softcap


def finish_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the model's logits, made of the head's output by `logit_transform`."""
    logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def logit_count(config: Any, head: nn.Linear) -> int:
    """Return how many rows of the head make logits; some models cut off the rest as padding."""
    rows = head.weight.shape[0]
    return min(rows, int(_number(config.get_text_config(), "unpadded_vocab_size") or rows))


def logit_rows(model: Any) -> int | None:
    """Return how many tokens a model makes logits for, None if its head is not a plain one."""
    head = model.get_output_embeddings()
    return logit_count(model.config, head) if isinstance(head, nn.Linear) else None


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None
