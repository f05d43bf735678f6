"""The one table of ops: schema, dtypes, error budget and bytes moved.

Every namespace has the same schemas, which are defined here in a loop. A backend implements them;
`leaf_ext/ops` registers fake kernels and autograd for all backends at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

NAMESPACES = ("leaf_ext", "leaf_ext_reference", "leaf_ext_triton")
REFERENCE = "leaf_ext_reference"
TRITON = "leaf_ext_triton"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REFERENCE_DTYPES = (*DTYPES, torch.float64)

# On the logarithmic scale of `detect_spans` a norm counts as at least this share of the sequence's
# largest one, so that a token whose norm is zero does not set the range of all others.
LOG_FLOOR = 1e-4

Sizes = Mapping[str, int]


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of accumulation and of results for inputs of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def hidden_grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which `linear_dual_kl` keeps the gradient of hidden states.

    It is float32 for float16 inputs. Most entries (about 1/N) would become 0 if they were rounded
    to float16 before the backward multiplies them.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient_rows(logits: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the view [N, V] of the logits' memory to which `dual_kl_` writes the gradient.

    `dtype` is no wider than the logits' dtype. Each row starts where the row of logits starts.
    """
    if dtype is None or dtype == logits.dtype:
        return logits
    return logits.view(dtype)[:, : logits.shape[1]]


@dataclass(frozen=True)
class Budget:
    """The largest allowed error against the float64 reference.

    The error is the maximum over the tensor. It may be `factor` times the error of torch on inputs
    upcast to float32, plus `roundings` times half a unit in the last place of the output's dtype at
    the tensor's largest magnitude.
    """

    factor: float = 2.0
    roundings: float = 1.0


@dataclass(frozen=True)
class Op:
    """One row of the table: `arguments` and `returns` as in a torch schema string."""

    name: str
    arguments: str
    returns: str
    bytes_moved: Callable[[Sizes], int]
    budget: Budget = field(default_factory=Budget)

    @property
    def schema(self) -> str:
        return f"{self.name}({self.arguments}) -> {self.returns}"

    @property
    def argument_names(self) -> tuple[str, ...]:
        words = (argument.split("=")[0].split() for argument in self.arguments.split(","))
        return tuple(word[-1] for word in words)


class LogitScalars(NamedTuple):
    """The scalars of softcap * tanh(scale * z / softcap) / temperature, and of the divergence.

    A softcap of 0 means none. `beta` is 0 for KL(teacher, student), 1 for KL(student, teacher), and
    between them that of the generalized Jensen-Shannon divergence.
    """

    temperature: float
    student_scale: float
    teacher_scale: float
    student_softcap: float
    teacher_softcap: float
    beta: float


def slope_bound(beta: float) -> float:
    """Return a bound of the gradient of a row's divergence with respect to the student's logits x.

    It scales float16 gradients. The reverse KL's p_s (log(p_s / p_t) - KL), with a logarithm of at
    most 1000, is below 1000 / 4 + 6; all others are at most 1.
    """
    return 256.0 if beta == 1 else 1.0


class StudentScalars(NamedTuple):
    """The scalars of the student's logits alone, as in `LogitScalars`."""

    temperature: float
    scale: float
    softcap: float


_LOGIT_SCALARS = ", ".join(f"float {name}" for name in LogitScalars._fields)
_LOGITS = f"Tensor teacher, Tensor row_weight, {_LOGIT_SCALARS}, bool need_grad, bool need_rows"

_STUDENT_SCALARS = ", ".join(f"float {name}" for name in StudentScalars._fields)
_TOPK = "Tensor teacher_ids, Tensor teacher_logprobs, Tensor teacher_tail, Tensor row_weight"
_TOPK_LOGITS = f"{_TOPK}, {_STUDENT_SCALARS}, bool need_grad, bool need_rows"
_LINEAR_NEEDS = (
    "bool need_hidden_grad, ScalarType? head_grad_dtype, bool need_bias_grad, bool need_rows, "
    "int chunk_size"
)


def _grad_norm_bytes(s: Sizes) -> int:
    return s["rows"] * (s["H"] * s["itemsize"] + 4)


def _detect_spans_bytes(s: Sizes) -> int:
    read = s["tokens"] * (4 + 4 + 1)
    written = s["tokens"] * (4 + 1) + s["B"] * (16 + 8 * 2 * ((s["T"] + 1) // 2))
    return read + written


def _dual_kl_bytes(s: Sizes) -> int:
    """Count both logits once and the gradient once."""
    return s["N"] * (s["V_s"] * 2 + s["V_t"]) * s["itemsize"] + s["N"] * 4


def _linear_dual_kl_bytes(s: Sizes) -> int:
    """Count heads, hidden states and gradients once; the op is compute-bound."""
    student = s["V_s"] * s["H_s"] + s["N"] * s["H_s"]
    teacher = s["V_t"] * s["H_t"] + s["N"] * s["H_t"]
    return (2 * student + teacher) * s["itemsize"]


def _topk_kl_bytes(s: Sizes) -> int:
    """Count the logits once, the gradient once and the stored teacher once."""
    return s["N"] * (s["V_s"] * 2 * s["itemsize"] + s["k"] * (8 + 4) + 4 + 4)


def _linear_topk_kl_bytes(s: Sizes) -> int:
    """Count the head, hidden states and gradients once; the op is compute-bound."""
    return 2 * (s["V_s"] + s["N"]) * s["H_s"] * s["itemsize"] + s["N"] * s["k"] * (8 + 4)


def _scale_bytes(s: Sizes) -> int:
    return 2 * s["N"] * s["V_s"] * s["itemsize"]


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op("grad_norm", "Tensor grad", "Tensor", _grad_norm_bytes),
        Op(
            "detect_spans",
            "Tensor teacher, Tensor student, Tensor domain, Tensor? prunable, bool log_scale, "
            "float student_weight, float threshold, bool quantile, float cap, float teacher_max, "
            "int join_gap, int min_length, Tensor? cu_seqlens, SymInt max_seqlen",
            "(Tensor span, Tensor count, Tensor score, Tensor confounder, Tensor status)",
            _detect_spans_bytes,
        ),
        Op(
            "dual_kl",
            f"Tensor student, {_LOGITS}",
            "(Tensor loss, Tensor grad, Tensor grad_scale, Tensor rows)",
            _dual_kl_bytes,
        ),
        Op(
            "dual_kl_",
            f"Tensor(a!) student, {_LOGITS}, ScalarType? grad_dtype=None",
            "(Tensor loss, Tensor grad_scale, Tensor rows)",
            _dual_kl_bytes,
        ),
        Op(
            "linear_dual_kl",
            "Tensor student_hidden, Tensor student_head, Tensor teacher_hidden, "
            "Tensor teacher_head, Tensor row_weight, Tensor? student_bias, Tensor? teacher_bias, "
            "Tensor? labels, Tensor? label_weight, "
            f"{_LOGIT_SCALARS}, {_LINEAR_NEEDS}",
            "(Tensor loss, Tensor hidden_grad, Tensor head_grad, Tensor bias_grad, Tensor rows)",
            _linear_dual_kl_bytes,
        ),
        Op(
            "topk_kl",
            f"Tensor student, {_TOPK_LOGITS}",
            "(Tensor loss, Tensor grad, Tensor grad_scale, Tensor rows)",
            _topk_kl_bytes,
        ),
        Op(
            "topk_kl_",
            f"Tensor(a!) student, {_TOPK_LOGITS}, ScalarType? grad_dtype=None",
            "(Tensor loss, Tensor grad_scale, Tensor rows)",
            _topk_kl_bytes,
        ),
        Op(
            "linear_topk_kl",
            f"Tensor student_hidden, Tensor student_head, {_TOPK}, Tensor? student_bias, "
            f"{_STUDENT_SCALARS}, {_LINEAR_NEEDS}",
            "(Tensor loss, Tensor hidden_grad, Tensor head_grad, Tensor bias_grad, Tensor rows)",
            _linear_topk_kl_bytes,
        ),
        # The backward passes of the losses multiply by the gradient of the loss, on the device.
        Op("scaled", "Tensor grad, Tensor factor, ScalarType dtype", "Tensor", _scale_bytes),
        Op("scale_", "Tensor(a!) grad, Tensor factor", "()", _scale_bytes),
    )
}


def _define() -> dict[str, torch.library.Library]:
    libraries = {}
    for namespace in NAMESPACES:
        library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        for op in OPS.values():
            library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        libraries[namespace] = library
    return libraries


# Kept for the process, because the ops of a library are removed when it is collected.
LIBRARIES = _define()
