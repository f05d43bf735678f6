"""Faults that test_cuda_emulation.py plants in copies of the CUDA sources, as changes of text."""

from __future__ import annotations

from typing import NamedTuple


class Planted(NamedTuple):
    """A fault: `old` becomes `new` in a source; then this op's test must report `report`."""

    file: str
    op: str
    kind: str
    old: str
    new: str
    report: str


RACE = "race: nothing orders"
OVERFLOW = "(heap|stack)-buffer-overflow"
DIFFERS = "the CPU's"
PLANTED = {
    # barriers
    "reduce_reads_early": Planted(
        "block.cuh",
        "detect_spans",
        "race",
        "  __syncthreads();\n  if (lane_index() < warp_count()) value =",
        "  if (lane_index() < warp_count()) value =",
        RACE,
    ),
    "scan_writes_early": Planted(
        "block.cuh",
        "detect_spans",
        "race",
        "  __syncthreads();  // the array may still be read\n  if (lane == kWarp - 1)",
        "  if (lane == kWarp - 1)",
        RACE,
    ),
    "histogram_not_cleared": Planted(
        "detect_spans.cu",
        "detect_spans",
        "race",
        "    shared.histogram[bin] = 0;\n  }\n  __syncthreads();",
        "    shared.histogram[bin] = 0;\n  }",
        RACE,
    ),
    "digit_read_early": Planted(
        "detect_spans.cu",
        "detect_spans",
        "race",
        "    __syncthreads();\n    digits = shared.digits;",
        "    digits = shared.digits;",
        RACE,
    ),
    "gradient_overwrites_logits": Planted(
        "dual_kl_row.cuh", "dual_kl", "race", "if (!kHeld) __syncthreads();", "", RACE
    ),
    "exchange_reads_early": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  cluster_arrive();\n  cluster_wait();\n  const int lane",
        "  const int lane",
        f"{RACE}|not started or has ended",
    ),
    "exchange_announces_only": Planted(
        "dual_kl.cu", "dual_kl", "race", "  cluster_arrive();\n", "  cluster_announce();\n", RACE
    ),
    "block_not_announced": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  if (size > 1) cluster_announce();\n",
        "",
        "waits for its cluster, not arrived",
    ),
    "copies_not_waited_for": Planted(
        "dual_kl_row.cuh",
        "dual_kl",
        "race",
        "    wait_for_copies();\n",
        "",
        "not waited for its copies",
    ),
    "thread_leaves_early": Planted(
        "detect_spans.cu",
        "detect_spans",
        "race",
        "  const Domain domain = read_domain(",
        "  if (static_cast<int>(threadIdx.x) >= sequence.size) return;\n"
        "  const Domain domain = read_domain(",
        "which has exited|deadlock",
    ),
    # lanes and ranks
    "shuffle_without_last_lane": Planted(
        "block.cuh",
        "grad_norm",
        "race",
        "__shfl_sync(kFullMask, word",
        "__shfl_sync(kFullMask >> 1, word",
        "lane 31, which the mask 0x7fffffff lacks",
    ),
    "reduce_of_a_lane_too_many": Planted(
        "block.cuh", "detect_spans", "race", "if (other < lanes)", "if (other <= lanes)", DIFFERS
    ),
    "exchange_to_wrong_slot": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "in_block(&shared.blocks[cluster_rank()],",
        "in_block(&shared.blocks[cluster_rank() / 2],",
        RACE,
    ),
    "exchange_to_next_rank": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "cluster_rank()], static_cast<int>(threadIdx.x))",
        "cluster_rank()], static_cast<int>(threadIdx.x) + 1)",
        "there is no block 2 in a cluster of 2",
    ),
    "first_warp_not_written": Planted(
        "block.cuh",
        "detect_spans",
        "race",
        "if (lane_index() == 0) shared[",
        "if (lane_index() == 0 && warp_index() > 0) shared[",
        DIFFERS,
    ),
    # ends of arrays
    "group_beyond_row": Planted(
        "grad_norm.cu", "grad_norm", "address", "place < width ?", "place <= width ?", OVERFLOW
    ),
    "vector_beyond_row": Planted(
        "grad_norm.cu", "grad_norm", "address", "place < groups ?", "place <= groups ?", OVERFLOW
    ),
    "rest_of_row_forgotten": Planted(
        "grad_norm.cu",
        "grad_norm",
        "address",
        "return groups % kWarp == lane_index() ? groups :",
        "return false ? groups :",
        DIFFERS,
    ),
    "row_beyond_tensor": Planted(
        "grad_norm.cu",
        "grad_norm",
        "address",
        "if (i >= grad.rows)",
        "if (i > grad.rows)",
        OVERFLOW,
    ),
    "token_beyond_sequence": Planted(
        "sequence.cuh",
        "detect_spans",
        "address",
        "token < size &&",
        "token <= size &&",
        OVERFLOW,
    ),
    "score_beyond_sequence": Planted(
        "detect_spans.cu",
        "detect_spans",
        "address",
        "if (token < sequence.size) {",
        "if (token <= sequence.size) {",
        OVERFLOW,
    ),
    "span_beyond_last": Planted(
        "detect_spans.cu",
        "detect_spans",
        "address",
        "i < 2 * p.max_spans;",
        "i <= 2 * p.max_spans;",
        OVERFLOW,
    ),
    "gradient_beyond_row": Planted(
        "logits.cuh", "scale", "address", "if (grouping.has(e)) to[e]", "to[e]", OVERFLOW
    ),
    "slot_beyond_shared": Planted(
        "dual_kl.cu",
        "dual_kl",
        "address",
        "sizeof(Shared<kMeasures>) + static_cast<size_t>(share * bytes)",
        "static_cast<size_t>(share * bytes)",
        "use-after-poison",
    ),
    "slot_of_pad_forgotten": Planted(
        "dual_kl.cu",
        "dual_kl",
        "address",
        "const int64_t pad = 16 / size_of(params.student.dtype) - 1;",
        "const int64_t pad = 0;",
        "use-after-poison",
    ),
    "logit_beyond_row": Planted(
        "logits.cuh",
        "dual_kl",
        "address",
        "static_cast<unsigned>(element) <",
        "static_cast<unsigned>(element) <=",
        OVERFLOW,
    ),
}


# Whose like is among the others.
SLOW_FAULTS = {
    "histogram_not_cleared",
    "digit_read_early",
    "exchange_announces_only",
    "block_not_announced",
    "exchange_to_wrong_slot",
    "vector_beyond_row",
    "rest_of_row_forgotten",
    "row_beyond_tensor",
    "score_beyond_sequence",
    "span_beyond_last",
    "slot_of_pad_forgotten",
    "logit_beyond_row",
}
