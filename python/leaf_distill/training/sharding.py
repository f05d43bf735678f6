"""A student that FSDP or DeepSpeed shares among the ranks, beside whole teachers and files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers.integrations import deepspeed

_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Let each rank read whole models, as a teacher has to be; the trainer then shards the student.

    transformers would read shards where ZeRO-3 is configured, and on all ranks but one no weights
    where FSDP is to load them efficiently.
    """
    efficient, config = os.environ.get(_EFFICIENT), deepspeed._hf_deepspeed_config_weak_ref
    os.environ[_EFFICIENT] = "false"
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config
        if efficient is None:
            del os.environ[_EFFICIENT]
        else:
            os.environ[_EFFICIENT] = efficient


def check_whole(model: torch.nn.Module, argument: str) -> None:
    """Raise ValueError for a model in memory that DeepSpeed has partitioned as it was made."""
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        raise ValueError(
            f"{argument}: must be a whole model, got weights that DeepSpeed has partitioned; load "
            "it before the LeafConfig is made, or give its name"
        )


def is_sharded(model: object) -> bool:
    """Return whether FSDP2 has taken over a model."""
    from torch.distributed.fsdp import FSDPModule  # a build of torch may lack it

    return isinstance(model, FSDPModule)


def keep_float32(accelerator: Any) -> None:
    """Let FSDP2 sum gradients in float32 and return the loss as it is, as DDP does.

    accelerate would round both to the dtype of mixed precision.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and policy is not None and plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=None
        )


@contextmanager
def saved_whole(accelerator: Any) -> Iterator[None]:
    """Let FSDP save whole weights, also where checkpoints are in shards.

    transformers would write no weights in that case.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)
