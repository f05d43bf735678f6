"""Hashes checkpoints when they are written, and finds the newest one that is whole.

transformers writes a checkpoint's files straight into place, one after the other; a run that is
killed while saving leaves half of them. The manifest is written last, so that a checkpoint without
one is not whole.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.trainer_utils import sort_checkpoints

from leaf_distill.io import StoreError, disk_error, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"

# The last one is the message of torch.save, which hides the reason.
_FULL = (
    *(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    "unexpected pos",
)


class NoCheckpoint(ValueError):
    """Raised for a directory without a whole checkpoint."""


def write_manifest(checkpoint: Path) -> None:
    """Write the sha256 of each file of a checkpoint into its `manifest.json`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(checkpoint)): hash_file(path) for path in files}
    hashes.pop(MANIFEST, None)
    write_json(checkpoint / MANIFEST, {"sha256": hashes})


def checkpoint_fault(checkpoint: Path) -> str | None:
    """Return why a run cannot go on from a checkpoint, or None when it can."""
    try:
        hashes: dict[str, str] = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
        for name, expected in hashes.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if hash_file(checkpoint / name) != expected:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    if "trainer_state.json" not in hashes:
        return "trainer_state.json is missing"
    # FSDP writes optimizer.bin or, in shards as DeepSpeed does, a folder.
    whole = {"optimizer.pt", "optimizer.bin"} & hashes.keys()
    if not whole and not any("/" in name for name in hashes):
        return "optimizer.pt is missing"
    for path in checkpoint.glob("*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            if not all_finite(file.get_tensor(name) for name in file.keys()):  # noqa: SIM118
                return f"{path.name} has values that are not finite"
    return None


def has_all_files(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written to its end, and not deleted in part since."""
    try:
        names = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
        return all((checkpoint / name).is_file() for name in names)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no tensor has a NaN or an infinity; needs no memory of a tensor's size."""
    return all(
        bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())
        for tensor in tensors
        if tensor.is_floating_point() and tensor.numel()
    )


def find_checkpoint(wanted: str | bool, directory: Path) -> str:
    """Return the checkpoint to go on from.

    Args:
        wanted: a checkpoint, or True for the newest whole one of the directory.
        directory: the output directory of the run.

    Raises:
        ValueError: the named checkpoint is not whole.
        NoCheckpoint: the directory has no whole one.
    """
    if isinstance(wanted, str):
        if fault := checkpoint_fault(Path(wanted)):
            raise ValueError(
                f"resume_from_checkpoint: must be a whole checkpoint, got {wanted} ({fault}); give "
                "an older one, or True for the newest whole one"
            )
        return wanted
    for checkpoint in reversed(sort_checkpoints(str(directory))):
        fault = checkpoint_fault(Path(checkpoint))
        if fault is None:
            logger.warning("going on from %s", checkpoint)
            return str(checkpoint)
        logger.warning("%s is not whole (%s): passed over", checkpoint, fault)
    raise NoCheckpoint(
        f"resume_from_checkpoint: must find a whole checkpoint, got none in {directory}"
    )


@contextlib.contextmanager
def stopped(directory: Path) -> Iterator[None]:
    """Log what an interrupted training goes on from, and give a full disk its sentence.

    Raises:
        StoreError: the disk is full, or something lies in the way of a file.
    """
    try:
        yield
    except KeyboardInterrupt:
        checkpoints = sort_checkpoints(str(directory), use_mtime=False)
        whole = [one for one in checkpoints if (Path(one) / MANIFEST).is_file()]
        if whole:
            logger.warning("interrupted: the same command goes on from %s", whole[-1])
        else:
            logger.warning("interrupted before the first checkpoint: nothing to go on from yet")
        raise
    except Exception as error:
        # Writers of weights wrap the system's error, or hide it behind one of their own.
        seen: BaseException | None = error
        while seen is not None and not any(reason in str(seen) for reason in _FULL):
            seen = seen.__cause__ or seen.__context__
        if seen is None:
            if not isinstance(error, OSError | SafetensorError):
                raise
            raise StoreError(
                f"{directory}: must be a place to save the student in, got {error}; remove what is "
                "in the way, and run the same command again"
            ) from error
        raise disk_error(OSError(errno.ENOSPC, "disk full"), directory) from error


def hash_weights(directory: Path) -> dict[str, str]:
    """Return the sha256 of each file of weights in a directory."""
    return {
        path.name: hash_file(path)
        for path in sorted(directory.iterdir())
        if path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin"
    }


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
