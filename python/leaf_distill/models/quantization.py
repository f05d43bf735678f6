"""Weights in 8 or 4 bits: which package makes them, and what they change."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from leaf_distill.models.memory import EXACT

if TYPE_CHECKING:
    from leaf_distill.models.source import ModelSource


@dataclass(frozen=True)
class Method:
    """A way to quantize the linear layers of a model; its head and embedding stay as they are.

    Attributes:
        package: what transformers needs for it.
        itemsize: bytes of a weight, its share of the scales included.
        exact: whether a row's values do not depend on the rows beside it. LLM.int8 multiplies in
            16 bits the columns in which any row of the batch has an outlier.
    """

    package: str
    itemsize: float
    exact: bool = True


METHODS: Final = {
    "int8": Method("torchao", 1.0),
    "bnb8": Method("bitsandbytes", 1.0, exact=False),
    "nf4": Method("bitsandbytes", 0.5 + 4 / 64),
}


_PACKS: Final = "support_avx512bf16_for_cpu"


def check_quantization(
    quantization: str, source: ModelSource, config: Any, argument: str, *, weights: bool = True
) -> None:
    """Check that a model can be quantized, before its weights are read.

    Args:
        quantization: a name of METHODS.
        source: the model.
        config: its configuration.
        argument: how messages call the model, such as "teacher".
        weights: whether they will be read, for which the package is needed.

    Raises:
        ValueError: the method is unknown, its package is missing, or the model is an adapter, a
            GGUF file or quantized already.
    """
    name = f"{argument}_quantization"
    if quantization not in METHODS:
        raise ValueError(f"{name}: must be one of {', '.join(METHODS)}, got {quantization!r}")
    kinds = (
        ("an adapter, which would be merged into rounded weights", source.base is not None),
        ("a GGUF file", source.gguf_file is not None),
        ("quantized already", getattr(config, "quantization_config", None) is not None),
    )
    for kind, found in kinds:
        if found:
            raise ValueError(
                f"{name}: must be left out for a model that is {kind}, got {quantization!r} for "
                f"{source.name!r}; leave it out, or name a model with its full weights"
            )
    package = METHODS[quantization].package
    if weights and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{name}: must be left out if the package {package} is missing, got {quantization!r}; "
            "run: pip install 'leaf-distill[quantize]'"
        )


def quantization_config(quantization: str, dtype: str) -> Any:
    """Return the setting of `from_pretrained` for a method.

    Args:
        quantization: a name of METHODS.
        dtype: of the weights that are not quantized, and of the products.
    """
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantization == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    make: Any = BitsAndBytesConfig  # untyped
    if quantization == "nf4":
        compute = getattr(torch, dtype)
        return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    # It warns of its 16-bit products at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return make(load_in_8bit=True)


def light_backward(model: Any) -> AbstractContextManager[Any]:
    """Let a forward pass keep rounded weights for the backward pass, and not their float form.

    torchao's linear layers keep the whole model in its own dtype otherwise, which takes more memory
    than a model that is not rounded. bitsandbytes needs no help.
    """
    rounded = any(hasattr(weight, "__tensor_flatten__") for weight in model.parameters())
    return _LightLinear() if rounded else nullcontext()


class _LightLinear(TorchFunctionMode):
    """Replaces the product with a rounded weight by `_RoundedProduct`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and len(args) > 1 and hasattr(args[1], "__tensor_flatten__"):
            product: Any = _RoundedProduct  # apply is untyped
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            return product.apply(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


class _RoundedProduct(torch.autograd.Function):
    """A linear layer with frozen weights, which are made floats again in the backward pass."""

    @staticmethod
    def forward(
        context: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        context.save_for_backward(weight)
        return linear(states, weight, bias)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = context.saved_tensors
        return gradients[0] @ weight.dequantize().to(gradients[0].dtype), None, None


def stay_differentiable(model: Any) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a product that has no gradient.

    On CPUs with bfloat16 products it does so in the first pass that asks for none, and a later
    backward pass would silently leave these layers out.
    """
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


def check_differentiable(model: Any) -> None:
    """Raise ValueError for a model whose 4-bit weights are packed for answers on a CPU."""
    states = (getattr(weight, "quant_state", None) for weight in model.parameters())
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):
        raise ValueError(
            f"model: must have weights with a gradient, got {type(model).__name__}, whose 4-bit "
            "weights bitsandbytes has packed for answers on this CPU; load the model anew"
        )


def is_exact(dtype: str, quantization: str | None) -> bool:
    """Whether a row's values do not depend on its batch beyond rounding in float32."""
    return dtype in EXACT and (quantization is None or METHODS[quantization].exact)


def rounding(model: Any) -> float:
    """Return the relative rounding error of a loaded model's products, as a dtype's eps."""
    dtype = torch.float16 if getattr(model, "is_loaded_in_8bit", False) else model.dtype
    return max(torch.finfo(dtype).eps, torch.finfo(model.dtype).eps)


def weight_itemsize(dtype: str, quantization: str | None) -> float:
    """Return the bytes of a weight of a linear layer."""
    if quantization is None:
        return float(getattr(torch, dtype).itemsize)
    return METHODS[quantization].itemsize
