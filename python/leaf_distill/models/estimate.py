"""Estimates memory, arithmetic and time of a model's passes, without its weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from leaf_distill.models.label_logits import logits_a_sum
from leaf_distill.models.quantization import weight_itemsize
from leaf_distill.models.recompute import LeanProducts

_TIMED: Final = 0.3
"""Seconds for which the machine's arithmetic is timed."""
_EFFICIENCY: Final = {"cpu": 0.75, "cuda": 0.45}
"""The share of a matrix product's speed that a whole pass reaches."""
_LAYER_SECONDS: Final = {"cpu": 0.3e-3, "cuda": 1e-3}
"""On a GPU with the launches, which the other values do not hide."""


@dataclass(frozen=True)
class PassCost:
    """The cost of one pass.

    Attributes:
        weights: bytes of the weights.
        kept: bytes that the pass keeps beside them at its peak.
        flops: floating-point operations.
    """

    weights: int
    kept: int
    flops: int


@dataclass(frozen=True)
class Speed:
    """The speed of this machine, by the second.

    Attributes:
        flops: operations of a whole pass.
        bytes: bytes that are read.
        weight_bytes: bytes of weights that are read and multiplied by a few rows.
        layer_seconds: seconds that Python takes for a layer in one step of an answer.
    """

    flops: float
    bytes: float
    weight_bytes: float
    layer_seconds: float


def saliency_cost(
    config: Any,
    dtype: str,
    rows: int,
    tokens: int,
    labels: int,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> PassCost:
    """Return the cost of a saliency pass over `rows` of `tokens` each, with `labels` in all.

    The model runs with tensors that have shapes and no content, so that any architecture is
    counted as it computes, within seconds and without memory. `device` is the type of the device
    that the pass would run on.

    Raises:
        Exception: the architecture looks at the content of its tensors, as many mixtures of
            experts do; whatever torch raises. `rough_cost` takes any.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    kept: dict[int, int] = {}
    with FakeTensorMode():
        library: Any = AutoModelForCausalLM  # its functions are untyped
        model: Any = library.from_config(
            config, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        )
        model.eval().requires_grad_(False)
        stored = [*model.parameters(), *model.buffers()]
        own = {one.untyped_storage()._cdata for one in stored}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        def at_labels(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0].flatten(0, 1)[:labels][None], *args[1:])

        head = model.get_output_embeddings()
        if head is not None:
            head.register_forward_pre_hook(at_labels)
        width = model.get_input_embeddings().weight.shape[-1]
        states = torch.zeros(rows, tokens, width, dtype=model.dtype, requires_grad=True)
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            LeanProducts(),
        ):
            logits = model(inputs_embeds=states, use_cache=False).logits
            logits.float().sum().backward()
        made = logits.numel()
    size = sum(one.numel() * one.element_size() for one in stored)
    if quantization is not None:
        layers = {
            module.weight
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        }
        less = torch.finfo(model.dtype).bits / 8 - weight_itemsize(dtype, quantization)
        size -= int(less * sum(weight.numel() for weight in layers))
    kept_bytes = sum(kept.values()) + logit_bytes(made, dtype, device)
    return PassCost(size, kept_bytes, int(counter.get_total_flops()))


def rough_cost(
    config: Any,
    dtype: str,
    rows: int,
    tokens: int,
    labels: int,
    *,
    device: str = "cpu",
    quantization: str | None = None,
) -> PassCost:
    """Return the cost of a saliency pass from the sizes in a configuration."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 1024)
    layers = int(getattr(text, "num_hidden_layers", 0) or 24)
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    vocabulary, itemsize = int(text.vocab_size), int(getattr(torch, dtype).itemsize)
    body = layers * (4 * hidden * hidden + 3 * hidden * inner)
    tied = 1 if getattr(text, "tie_word_embeddings", False) else 2
    kept = rows * tokens * layers * (6 * hidden + 3 * inner) * itemsize
    kept += logit_bytes(labels * vocabulary, dtype, device)
    flops = 4 * (rows * tokens * body + labels * hidden * vocabulary)
    weights = body * weight_itemsize(dtype, quantization) + tied * vocabulary * hidden * itemsize
    return PassCost(int(weights), kept, flops)


def logit_bytes(logits: int, dtype: str, device: str) -> int:
    """Return the bytes of so many logits in a saliency on a type of device.

    Their gradient takes the place of the float32 ones; in 16 bits there is a copy beside them. A
    sum of powers takes its logits twice.
    """
    return logits * (4 if dtype == "float32" else 6) + 8 * min(logits, logits_a_sum(device))


def answer_bytes(config: Any, dtype: str, tokens: int) -> int:
    """Return the bytes of the keys and values of `tokens`, and of their copy as they grow."""
    return 2 * tokens * _token_bytes(config, dtype)


def answer_seconds(
    config: Any, dtype: str, weights: int, rows: int, prompt: int, steps: int, speed: Speed
) -> float:
    """Return the seconds in which a batch of prompts is read and answered.

    Args:
        config, dtype: of the model.
        weights: its bytes.
        rows: how many prompts.
        prompt: tokens of the longest.
        steps: tokens of the longest answer. Each step reads the weights, and the keys and values
            so far three times: to attend to them, and to write them anew with one token more.
        speed: of the machine.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    itemsize = int(getattr(torch, dtype).itemsize)
    reading = 2 * weights / itemsize * rows * prompt / speed.flops
    cached = rows * (prompt + steps / 2) * _token_bytes(config, dtype)
    step = weights / speed.weight_bytes + 3 * cached / speed.bytes + layers * speed.layer_seconds
    return reading + steps * step


def _token_bytes(config: Any, dtype: str) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    text = config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    heads = int(getattr(text, "num_attention_heads", 0) or 1)
    shared = int(getattr(text, "num_key_value_heads", 0) or heads)
    width = int(getattr(text, "head_dim", 0) or hidden // heads)
    return 2 * layers * shared * width * int(getattr(torch, dtype).itemsize)


def measure_speed(
    config: Any, dtype: str, device: torch.device, *, tokens: int, rows: int
) -> Speed:
    """Time a product of the model's shape with `tokens`, and of a large matrix with `rows`."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 0) or 1024)
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    options = {"dtype": getattr(torch, dtype), "device": device}
    kind = "cpu" if device.type == "cpu" else "cuda"
    states, weight = torch.ones(tokens, hidden, **options), torch.ones(inner, hidden, **options)
    # Larger than the caches, as the weights of a model are; odd sizes take slow kernels on a GPU.
    rows_of_large = (1 << 27) // (hidden * weight.element_size()) // 256 * 256
    large = torch.ones(max(256, rows_of_large), hidden, **options)
    size = large.numel() * large.element_size()

    def seconds(states: torch.Tensor, weight: torch.Tensor) -> float:
        return _seconds(lambda: torch.nn.functional.linear(states, weight), device)

    return Speed(
        flops=_EFFICIENCY[kind] * 2 * tokens * hidden * inner / seconds(states, weight),
        bytes=size / seconds(states[:1], large),
        weight_bytes=size / seconds(torch.ones(rows, hidden, **options), large),
        layer_seconds=_LAYER_SECONDS[kind],
    )


def _seconds(work: Any, device: torch.device) -> float:
    """Return the mean seconds of one call, over `_TIMED` seconds."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    finish()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < _TIMED:
        work()
        finish()
        calls += 1
    return (time.perf_counter() - start) / calls
