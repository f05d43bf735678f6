"""Checks of a model at its loading, of token ids, and the warm-up before the first batch."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from leaf_distill.models.quantization import rounding
from leaf_distill.ranks import processes

if TYPE_CHECKING:  # seconds to import
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

_hides_advice: Final[ContextVar[bool]] = ContextVar("hides_advice", default=False)
_pads: Final[weakref.WeakKeyDictionary[Any, bool]] = weakref.WeakKeyDictionary()


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put every module in eval mode, and restore each module's mode afterwards.

    Attention leaves cuDNN out meanwhile. It plans anew for each shape, which takes longer than a
    step of an answer does, and nearly every step and batch has another shape.
    """
    modes = [(module, module.training) for module in model.modules()]
    planning = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    try:
        model.eval()
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(planning)
        for module, training in modes:
            module.training = training


@contextmanager
def without_mask_advice() -> Iterator[None]:
    """Hide the advice to pass a mask where a row ends with the pad token.

    Some architectures, GPT-2 among them, give it; the last label, the end token, may be their pad
    token, and padding behind a row needs no mask. Other threads' advice stays.
    """
    logging.getLogger("transformers.modeling_utils").addFilter(_is_wanted)  # once, for all threads
    token = _hides_advice.set(True)
    try:
        yield
    finally:
        _hides_advice.reset(token)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not (_hides_advice.get() and "passing in an `attention_mask`" in record.getMessage())


def input_device(model: Any) -> torch.device:
    """Return the device where token ids go: of the input embedding, or where it is brought."""
    embedding = model.get_input_embeddings()
    device: torch.device = next(embedding.parameters()).device
    if device.type == "meta":  # offloaded by accelerate, whose hook fetches it for each pass
        device = torch.device(embedding._hf_hook.execution_device)
    return device


def max_positions(config: Any) -> int | None:
    """Return the most tokens that a model takes, None if its configuration names no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


@torch.inference_mode()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Check that the logits of earlier tokens do not depend on later tokens or padding.

    An encoder, or a model that reads its prompt in both directions, loads as a causal model too,
    but its likelihoods mean nothing. The check takes a few forward passes of at most 8 tokens. It
    leaves padding out in float16 and bfloat16.

    Args:
        model: a model of transformers, on any device.
        name: its name in messages.

    Raises:
        ValueError: the model is not causal, depends on padding, or cannot run on token ids alone.
    """
    rows = embedding_rows(model)
    length = min(8, max_positions(model.config) or 8)
    if rows < 2 or length < 2:
        return
    late = torch.arange(length) >= length // 2
    first = torch.arange(1, length + 1) * rows // (length + 2)
    other = torch.where(late, (first + max(1, rows // 2)) % rows, first)
    # Likelihoods are computed without a mask, training and answers with one.
    changed = _probe(model, name, torch.stack([first, other]))[:, ~late].double()
    eps = rounding(model)
    pairs = [(changed[0], changed[1], max(2e-5, eps), "the tokens after it")]
    # Rows of one batch are computed alike. Another shape of the batch rounds differently, which in
    # 16 bits can choose other experts.
    if eps < 1e-5:
        masked = _probe(model, name, first[None], (~late).long()[None])[0, ~late].double()
        alone = _probe(model, name, first[None, ~late])[0].double()
        pairs += [(one, alone, 1e-4, "the padding after it") for one in (changed[0], masked)]
    for one, other_one, tolerance, reason in pairs:
        finite = one.isfinite() & other_one.isfinite()
        if not finite.any():
            continue
        difference = float((one - other_one)[finite].abs().max())
        if difference > tolerance * float(one[finite].abs().max()):
            raise ValueError(
                f"model: must be a causal language model, got {name!r} ({type(model).__name__}), "
                f"whose logits for a token depend on {reason}; choose a decoder (one that was "
                "trained with is_decoder needs it in its config.json)"
            )


@torch.inference_mode()
def pads_in_front(model: Any) -> bool:
    """Return whether padding in front of a prompt leaves the logits of its answer alone.

    Padding changes them in models that count positions from the start of the row, or that carry a
    state through it. The check takes two short answers and a forward pass, once for a model.

    Raises:
        ValueError: the model answers otherwise than its forward pass says, so that its losses and
            its answers do not belong together.
    """
    if model not in _pads:
        # In 16 bits another length of the row rounds differently, which can choose other experts.
        tolerance = 1e-4 if rounding(model) < 1e-5 else 0.05
        rows, length = embedding_rows(model), min(8, (max_positions(model.config) or 8) - 2)
        if rows < 2 or length < 2:
            return False
        ids = torch.arange(1, length + 1) * rows // (length + 2)
        ids[: length // 2] = ids[length // 2]
        kept = torch.arange(length) >= length // 2
        padded, _ = _answer(model, ids, kept)
        alone, answered = _answer(model, ids[kept], kept[kept])
        forward = model(input_ids=answered[None, :-1], use_cache=False).logits[0, -2:].double()
        if rounding(model) < 1e-5 and not logits_agree(alone, forward, 1e-3):
            raise ValueError(
                "model: must answer with the logits of its forward pass, got "
                f"{type(model).__name__}, which numbers or masks its tokens otherwise when it "
                "generates; choose another architecture"
            )
        _pads[model] = logits_agree(padded, alone, tolerance)
    return _pads[model]


def logits_agree(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Return whether the finite logits of both differ by rounding at most."""
    finite = one.isfinite() & other.isfinite()
    if not finite.any():
        return True
    difference = (one - other)[finite].abs().max()
    return bool(difference <= tolerance * other[finite].abs().max())


def _answer(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [2, V] with which `generate` chooses two tokens, and the row with them."""
    from transformers import GenerationConfig

    output = model.generate(
        input_ids=ids[None].to(input_device(model)),
        attention_mask=mask[None].long().to(input_device(model)),
        generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=2,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    return torch.cat(output.logits).double(), output.sequences[0]


def _probe(
    model: PreTrainedModel, name: str, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    device = input_device(model)
    masked = {} if mask is None else {"attention_mask": mask.to(device)}
    try:
        with eval_mode(model):
            output = model(input_ids=ids.to(device), use_cache=False, **masked)
        logits: torch.Tensor = output.logits
        if logits.shape[:2] != ids.shape:
            raise ValueError(f"it makes logits of the shape {tuple(logits.shape)}")
        return logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture raises whatever its forward raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model: must be a causal language model, got {name!r} ({type(model).__name__}), which "
            f"cannot run on a prompt alone: {reason}; choose another model"
        ) from error


@functools.cache
def warm_up() -> None:
    """Call the vector math functions of the CPU once, in one thread.

    Their library chooses its code at the first call. If several threads make that call at once,
    they may compute with different code, which changed results of the first batch by 2e-5.
    """
    small = torch.linspace(0.1, 1.0, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = small.to(dtype)
        for function in (
            *(torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.rsqrt),
            *(torch.sin, torch.cos, torch.tanh, torch.erf, torch.sigmoid),
            *(torch.nn.functional.silu, torch.nn.functional.gelu, torch.nn.functional.softplus),
        ):
            function(values)
        for reduction in (torch.softmax, torch.log_softmax, torch.logsumexp):
            reduction(values, 0)
        torch.pow(values, 2.5)
        torch.nn.functional.gelu(values, approximate="tanh")
        torch.nn.functional.linear(values[None], values[None])
    warn_of_spinning()


def warn_of_spinning() -> None:
    """Say so where torch's waiting threads may keep cores from other work, and wait for it.

    Measured beside a busy process on 2 cores: 8 steps of a tiny training took 47 s instead of 3.
    The variable is read when torch is loaded, which is too late here.
    """
    alone = torch.get_num_threads() == 1 or torch.cuda.is_available()
    if alone or "OMP_WAIT_POLICY" in os.environ or processes() > 1:
        return
    with suppress(OSError):
        cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
        if load > cores / 2:
            logger.warning(
                "the load of this machine was %.1f on %d cores: where that is other work, torch's "
                "waiting threads slow both down, and OMP_WAIT_POLICY=passive, set before torch is "
                "imported, mends it",
                load,
                cores,
            )


def embedding_rows(model: Any) -> int:
    """Return the number of token ids that a model's input embedding takes."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows if rows is not None else next(embedding.parameters()).shape[0])


def check_ids(model: Any, sequences: Sequence[Any], argument: str) -> None:
    """Raise ValueError for the first sequence with a token id outside the model's embedding."""
    rows = embedding_rows(model)
    for index, ids in enumerate(sequences):
        check_below(ids, rows, f"{argument}[{index}]", "the rows of the model's embedding")


def check_below(ids: Any, limit: int, argument: str, meaning: str) -> None:
    """Raise ValueError for the first token id outside [0, limit); `meaning` names the limit."""
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= limit)]
    if outside.size:
        raise ValueError(
            f"{argument}: must hold token ids below {limit}, {meaning}, got {int(outside[0])}; use "
            "the tokenizer of this model, or resize the model to the tokenizer"
        )
