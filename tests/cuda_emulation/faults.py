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
    "bitmap_not_cleared": Planted(
        "topk_kl.cu",
        "topk_kl",
        "race",
        "shared_.bitmap[i] = 0;\n    }\n    __syncthreads();",
        "shared_.bitmap[i] = 0;\n    }",
        RACE,
    ),
    "bitmap_read_early": Planted(
        "topk_kl.cu",
        "topk_kl",
        "race",
        "1u << (bit % 32));\n    }\n    __syncthreads();",
        "1u << (bit % 32));\n    }",
        RACE,
    ),
    "narrow_gradient_overwrites_logits": Planted(
        "topk_kl.cu",
        "topk_kl",
        "race",
        "if constexpr (kNarrower) __syncthreads();",
        "static_cast<void>(kNarrower);",
        RACE,
    ),
    "ids_written_early": Planted(
        "topk_kl.cu",
        "topk_kl",
        "race",
        "if (params.grad != nullptr) {\n    __syncthreads();",
        "if (params.grad != nullptr) {",
        RACE,
    ),
    "id_beyond_row": Planted(
        "topk_kl.cu",
        "topk_kl",
        "address",
        "id >= 0 && id < p_.student.vocab;",
        "id >= 0;",
        "SEGV|" + OVERFLOW,
    ),
    "gradient_overwrites_logits": Planted(
        "dual_kl_row.cuh",
        "dual_kl",
        "race",
        "      __syncthreads();\n      if (!mine) continue;",
        "      if (!mine) continue;",
        RACE,
    ),
    "gradient_overwrites_overflow": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "!narrows || 2 * resident",
        "!narrows || 64 * resident",
        RACE,
    ),
    "row_starts_early": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  __syncthreads();\n  wait_for_copies(shared.copies);",
        "  wait_for_copies(shared.copies);",
        "the call of expect",
    ),
    "parts_merged_early": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  if (size > 1) cluster_wait();\n  __syncthreads();",
        "  if (size > 1) cluster_wait();",
        RACE,
    ),
    "softmax_read_early": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "merge_parts(shared, row.exponent());\n  __syncthreads();",
        "merge_parts(shared, row.exponent());",
        RACE,
    ),
    "outcomes_added_early": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  __syncthreads();\n  if (threadIdx.x == 0) finish_row(",
        "  if (threadIdx.x == 0) finish_row(",
        RACE,
    ),
    "parts_not_waited_for": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "    wait(shared.parts);\n",
        "",
        f"{RACE}|a block ends",
    ),
    "outcomes_not_waited_for": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "    wait(shared.outcomes);\n",
        "",
        f"{RACE}|a block ends",
    ),
    "means_not_waited_for": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "      wait(shared.mean_arrivals);\n",
        "",
        f"{RACE}|a block ends",
    ),
    "mean_read_early": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "  __syncthreads();\n  return shared.mean;",
        "  return shared.mean;",
        RACE,
    ),
    "copies_not_waited_for": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  wait_for_copies(shared.copies);\n",
        "",
        f"{RACE}|a block ends",
    ),
    "block_not_announced": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "    cluster_announce();\n",
        "",
        "waits for its cluster, not arrived",
    ),
    "cluster_not_waited_for": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "  if (size > 1) cluster_wait();\n",
        "",
        "not started|not waiting after it arrived|the call of expect",
    ),
    "fewer_bytes_expected": Planted(
        "dual_kl.cu",
        "dual_kl",
        "race",
        "expect(shared.parts, size * sizeof(RowPart<Kind::kExact>));",
        "expect(shared.parts, size * sizeof(RowPart<Kind::kExact>) - 16);",
        "more bytes are on their way than are expected",
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
    "part_to_wrong_slot": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "send_all(&shared.blocks[cluster_rank()],",
        "send_all(&shared.blocks[cluster_rank() / 2],",
        RACE,
    ),
    "part_to_next_rank": Planted(
        "dual_kl_merge.cuh",
        "dual_kl",
        "race",
        "part, shared.parts, lane);",
        "part, shared.parts, lane + 1);",
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
        "logits.cuh",
        "scale",
        "address",
        "if (grouping.has(first + i)) data[first + i] =",
        "data[first + i] =",
        OVERFLOW,
    ),
    "slot_beyond_shared": Planted(
        "dual_kl.cu",
        "dual_kl",
        "address",
        "static_cast<size_t>(own + 2 * 16 * slots)",
        "static_cast<size_t>(2 * 16 * slots)",
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


# Similar to one of the others.
SLOW_FAULTS = {
    "histogram_not_cleared",
    "digit_read_early",
    "softmax_read_early",
    "outcomes_not_waited_for",
    "mean_read_early",
    "block_not_announced",
    "part_to_wrong_slot",
    "vector_beyond_row",
    "rest_of_row_forgotten",
    "row_beyond_tensor",
    "score_beyond_sequence",
    "span_beyond_last",
    "logit_beyond_row",
}
