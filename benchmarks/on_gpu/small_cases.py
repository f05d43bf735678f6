"""Every CUDA kernel on small cases, for compute-sanitizer; nothing is compared.

    compute-sanitizer --tool memcheck python -m on_gpu.small_cases

Inputs are made on the CPU, so that the tool looks at few kernels beside ours.
"""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

import torch

import leaf_ext
from leaf_ext.testing import cases, inputs

from . import FINISHED, STARTED

# Beside what is small anyway: a case for each way to divide a row among blocks.
_WIDE = ("three_blocks-fp32", "v50257-bf16", "v128256-bf16", "v151936_152064-fp32")
_FEW = 2**13


def moved(given: Any, device: torch.device) -> Any:
    """The same inputs on the device."""
    values = {field.name: getattr(given, field.name) for field in fields(given)}
    tensors = {k: v.to(device) for k, v in values.items() if isinstance(v, torch.Tensor)}
    return replace(given, **tensors)


def call_grad_norm(case: cases.NormCase, device: torch.device, backend: str) -> None:
    leaf_ext.grad_norm(inputs.norm_inputs(case).to(device), backend=backend)


def call_detect_spans(case: cases.SpansCase, device: torch.device, backend: str) -> None:
    given = moved(inputs.spans_inputs(case), device)
    leaf_ext.detect_spans(
        *(given.teacher, given.student, given.domain),
        prunable=given.prunable,
        cu_seqlens=given.cu_seqlens,
        max_seqlen=given.max_seqlen,
        backend=backend,
        **case.options,
    )


def call_dual_kl(case: cases.KLCase, device: torch.device, backend: str) -> None:
    for inplace in (False, True):
        given = moved(inputs.kl_inputs(case), device)
        loss, _ = leaf_ext.dual_kl(
            *(given.student.requires_grad_(), given.teacher, given.row_weight),
            inplace_grad=inplace,
            return_rows=True,
            backend=backend,
            **case.options,
        )
        loss.backward()


def call_linear_dual_kl(case: cases.LinearCase, device: torch.device, backend: str) -> None:
    given = moved(inputs.linear_inputs(case), device)
    loss = leaf_ext.linear_dual_kl(
        given.student_hidden.requires_grad_(),
        given.student_head.requires_grad_(),
        *(given.teacher_hidden, given.teacher_head, given.row_weight),
        student_bias=given.student_bias,
        teacher_bias=given.teacher_bias,
        chunk_size=case.chunk_size,
        backend=backend,
        **case.logits.options,
    )
    loss.backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", type=torch.device, default="cuda")
    arguments = parser.parse_args()
    where = (arguments.device, arguments.backend)
    assert torch.ones(3, device=where[0]).sum().item() == 3
    print(STARTED, flush=True)
    tables: list[tuple[Any, list[Any]]] = [
        (call_grad_norm, cases.NORM_CASES),
        (call_dual_kl, [c for c in cases.KL_CASES if c.rows * c.student_vocabulary <= _FEW]),
        (call_detect_spans, [c for c in cases.SPANS_CASES if not c.slow_to_interpret]),
        (call_linear_dual_kl, cases.LINEAR_CASES[3:6]),
        (call_dual_kl, [c for c in cases.KL_CASES if str(c) in _WIDE]),
        (call_detect_spans, [c for c in cases.SPANS_CASES if c.slow_to_interpret]),
    ]
    for call, table in tables:
        for case in table:
            print(call.__name__, case, flush=True)
            call(case, *where)
            if where[0].type == "cuda":
                torch.cuda.synchronize()
    print(FINISHED, flush=True)


if __name__ == "__main__":
    main()
