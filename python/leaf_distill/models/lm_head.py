"""The way to a model's LM head: its input at chosen positions, taken inside its own forward.

`linear_dual_kl` needs the hidden states that the head would see and the head's weight. Both are
taken by hooks while the model (DDP, FSDP or DeepSpeed around it) runs its own forward, and what is
computed from them is returned as the forward's output. Calling the decoder and the head apart from
the wrapper would skip its gradient reduction, and read a sharded weight; asking for
`output_hidden_states` would keep every layer's output and still leave the head outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

# How models of transformers name what they do to the head's output (scale first, then softcap).
_FACTORS: Final = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS: Final = ("logits_scaling",)
_SOFTCAPS: Final = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

AtHead = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""From the head's input at the chosen positions [N, H], weight [V, H] and bias [V] to a result."""


class HeadPath:
    """Runs a causal language model up to its head and computes something else there.

    Args:
        model: a transformers model, or a PeftModel around one; not yet wrapped for training.
        role: how error messages call it, "student" or "teacher".

    Raises:
        ValueError: the model has no plain linear head.
    """

    def __init__(self, model: Any, role: str) -> None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
            kind = type(head).__name__
            raise ValueError(
                f"{role}: needs a causal language model with a plain linear head, came "
                f"{type(model).__name__} with the head {kind}; an adapter or quantization on the "
                "head must be merged or left away"
            )
        self.model, self.head, self.role = model, head, role
        self.scale, self.softcap = logit_transform(model.config)
        self._positions: Tensor | None = None
        self._at_head: AtHead | None = None
        self._hidden: Tensor | None = None
        self._result: Tensor | None = None
        head.register_forward_pre_hook(self._enter)
        head.register_forward_hook(self._compute)
        model.register_forward_hook(self._leave)

    def run(
        self, module: nn.Module, ids: Tensor, attention_mask: Tensor, at: Tensor, then: AtHead
    ) -> Tensor:
        """Run `module` (the model, or its wrapper) and return `then` of the head's input `at`.

        Args:
            ids, attention_mask: int64 [B, T].
            at: bool [B, T], the N positions whose hidden states are wanted, in row-major order.
        """
        self._positions, self._at_head = at, then
        try:
            result: Tensor = module(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        finally:
            self._positions = self._at_head = self._hidden = self._result = None
        return result

    def check(self, ids: Tensor, attention_mask: Tensor, at: Tensor) -> None:
        """Compare this path with the model's own logits on one row.

        Where neither is finite nothing can be said: training skips such a row of the teacher's and
        names one of the student's.

        Raises:
            ValueError: the head is not finite, or the two differ by more than rounding, so that
                training would optimize something else than what the model computes.
        """
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            own = self.model(input_ids=ids, attention_mask=attention_mask).logits[at]
            path = self.run(self.model, ids, attention_mask, at, self._logits)
        self.model.train(training)
        unknown = ~(own.isfinite() | path.isfinite())
        own, path = own.masked_fill(unknown, 0), path.masked_fill(unknown, 0)
        eps = max(torch.finfo(one.dtype).eps for one in (own, path))
        tolerance = 32 * eps * max(1.0, float(own.abs().max()))
        difference = float((own - path).abs().max())
        # What one logit may be off by hides a factor in bfloat16. Over all logits rounding, at most
        # eps / 2 of each and of either sign, averages out, and a factor does not.
        square = float(path.float().square().sum())
        excess = float((own.float() * path.float()).sum()) - square
        if not (difference <= tolerance and abs(excess) <= max(1e-3, eps / 4) * square):
            raise ValueError(
                f"{self.role}: the model's own logits differ from its head's by {difference:.3g} "
                f"(allowed {tolerance:.3g}) and are {1 + excess / (square or 1):.4g} times as "
                f"large; {type(self.model).__name__} does something to them that its config does "
                f"not tell (read: scale {self.scale}, softcap {self.softcap})"
            )

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for part in (weight, bias):
            # The extremes are finite when all is, and need no mask of the size of the head.
            if part is not None and not torch.stack(torch.aminmax(part)).isfinite().all():
                raise ValueError(
                    f"{self.role}: the weights of the head of {type(self.model).__name__} are not "
                    "finite, so that none of its outputs is; give a model that is whole"
                )
        logits = nn.functional.linear(hidden, weight, bias) * self.scale
        if self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def _enter(self, head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        if self._positions is None:
            return None
        hidden = args[0]
        self._hidden = hidden[self._positions.to(hidden.device)]
        return (hidden[:1, :1],)  # the ordinary product, of which nothing is used, costs one row

    def _compute(self, head: nn.Linear, args: Any, output: Tensor) -> None:
        if self._at_head is not None and self._hidden is not None:
            self._result = self._at_head(self._hidden, head.weight, head.bias)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self._at_head is None:
            return None
        if self._result is None:
            raise ValueError(f"{self.role}: {type(model).__name__} never called its head")
        return self._result


def logit_transform(config: Any) -> tuple[float, float | None]:
    """The factor and the softcap that a model puts on its logits, from its config."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = 1.0
    for name in _FACTORS:
        scale *= _number(config, name) or 1.0
    for name in _DIVISORS:
        value = _number(config, name) or 1.0
        # One family multiplies by what all others divide by.
        scale *= value if str(config.model_type).startswith("hyperclovax") else 1.0 / value
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(config, name))), None)
    return scale, softcap


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None
