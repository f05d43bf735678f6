"""Plain PyTorch versions of the ops: the baseline of the error budget and of the benchmarks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from leaf_ext.ops.logit_options import Divergence

# Replaces a logit of -inf: its probability is 0 in float32, and 0 * log 0 stays 0.
_ABSENT = -1e5


def eager_grad_norm(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32)
    return norm


def eager_divergence_rows(
    student: Tensor,
    teacher: Tensor,
    divergence: Divergence = "kl",
    temperature: float = 1.0,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
) -> Tensor:
    """Return the divergence of each row over the common vocabulary, in float32."""
    vocabulary = min(student.shape[1], teacher.shape[1])
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    caps = logit_softcap if isinstance(logit_softcap, tuple) else (logit_softcap, logit_softcap)
    log_p = []
    for logits, scale, cap in zip((student, teacher), scales, caps, strict=True):
        x = logits[:, :vocabulary].float() * scale
        if cap is not None:
            x = cap * torch.tanh(x / cap)
        log_p.append(functional.log_softmax(x.clamp(min=_ABSENT) / temperature, -1))
    log_s, log_t = log_p
    if divergence == "kl":
        return _eager_kl(log_t, log_s)
    if divergence == "reverse_kl":
        return _eager_kl(log_s, log_t)
    beta = 0.5 if isinstance(divergence, str) else divergence
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return beta * _eager_kl(log_t, log_m) + (1 - beta) * _eager_kl(log_s, log_m)


def _eager_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def eager_topk_rows(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Return the KL of each row over the k ids and all others together, in float32."""
    x = student.float() * logit_scale
    if logit_softcap is not None:
        x = logit_softcap * torch.tanh(x / logit_softcap)
    log_s = functional.log_softmax(x.clamp(min=_ABSENT) / temperature, -1)
    if tail is None:
        tail = torch.log1p(-logprobs.exp().sum(-1).clamp(max=1.0))
        tail = torch.full_like(tail, _ABSENT) if ids.shape[1] == student.shape[1] else tail
    others = log_s.scatter(1, ids, _ABSENT).logsumexp(-1, keepdim=True)
    outcomes = torch.cat((log_s.gather(1, ids), others), 1)
    target = torch.cat((logprobs, tail[:, None]), 1).clamp(min=_ABSENT)
    target = functional.log_softmax(target, -1)
    return functional.kl_div(outcomes, target, log_target=True, reduction="none").sum(-1)


def eager_topk_kl(student: Tensor, ids: Tensor, logprobs: Tensor, row_weight: Tensor) -> Tensor:
    """Compute the loss in the shortest and fastest way."""
    log_s = functional.log_softmax(student, -1, dtype=torch.float32)
    chosen, p = log_s.gather(1, ids), logprobs.exp()
    t, u = 1 - p.sum(-1), 1 - chosen.exp().sum(-1)
    kl = (p * (logprobs - chosen)).sum(-1) + t * (t.log() - u.log())
    return (row_weight * kl).sum()


def eager_dual_kl(
    student: Tensor, teacher: Tensor, row_weight: Tensor, divergence: Divergence = "kl"
) -> Tensor:
    """Compute the loss in the shortest and fastest way."""
    if divergence != "kl":
        return (row_weight * eager_divergence_rows(student, teacher, divergence)).sum()
    log_s = functional.log_softmax(student, -1, dtype=torch.float32)
    log_t = functional.log_softmax(teacher, -1, dtype=torch.float32)
    kl = functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
    return (row_weight * kl).sum()


def eager_linear_dual_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    row_weight: Tensor,
) -> Tensor:
    student = functional.linear(student_hidden, student_head)
    teacher = functional.linear(teacher_hidden, teacher_head)
    return eager_dual_kl(student, teacher, row_weight)


def eager_scores(teacher: Tensor, student: Tensor, domain: Tensor) -> Tensor:
    """Return the score of each token of a padded batch of norms."""

    def normalized(values: Tensor) -> Tensor:
        low = values.masked_fill(~domain, torch.inf).amin(1, keepdim=True)
        high = values.masked_fill(~domain, -torch.inf).amax(1, keepdim=True)
        return (values - low) / (high - low)

    return normalized(normalized(teacher) - normalized(student))


def eager_spans(
    teacher: Tensor, student: Tensor, domain: Tensor, threshold: float = 0.10
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, spans [B, ceil(T/2), 2] (unused -1) and counts, without a Python loop."""
    score = eager_scores(teacher, student, domain)
    confounder = domain & (score <= threshold)
    edge = functional.pad(confounder, (1, 1)).to(torch.int8).diff(dim=1)
    batch, length = domain.shape
    span = domain.new_full((batch, (length + 1) // 2, 2), -1, dtype=torch.int64)
    for side, step in enumerate((1, -1)):  # starts, stops
        found = edge == step
        rank = found.cumsum(1) - 1
        sequence, position = found.nonzero(as_tuple=True)
        span[sequence, rank[sequence, position], side] = position
    return score.masked_fill(~domain, torch.nan), span, (edge == 1).sum(1)
