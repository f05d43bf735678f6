"""Telling a whole checkpoint from half of one.

transformers writes a checkpoint's files straight into place, one after the other and
`trainer_state.json` last; a run that is killed while saving leaves half of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from leaf_distill.io import StoreError

logger = logging.getLogger(__name__)

# The last one is how torch.save puts it, which hides the reason.
_FULL = (
    *(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    "unexpected pos",
)


def checkpoint_fault(checkpoint: Path, *, world_size: int = 1) -> str | None:
    """Why a run cannot go on from a checkpoint, or None when it can."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return f"{state.name} is missing"
    # Rank 0 writes the state after its own files; those of the other ranks are not waited for.
    ranks = [f"rng_state_{rank}.pth" for rank in range(world_size)]
    needed = ["scheduler.pt", *(ranks if world_size > 1 else ["rng_state.pth"])]
    for name in needed:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    # FSDP and DeepSpeed keep weights and optimizer in folders of their own.
    files = {path.name for path in checkpoint.iterdir()}
    if not any(path.is_dir() for path in checkpoint.iterdir()):
        if "optimizer.pt" not in files:
            return "optimizer.pt is missing"
        if not any(name.endswith(".safetensors") for name in files):
            return "the weights (.safetensors) are missing"
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not _whole(path):
            return f"{path.relative_to(checkpoint)} is damaged"
    return None


def find_checkpoint(wanted: str | bool, directory: Path, *, world_size: int = 1) -> str | None:
    """The wanted checkpoint, or (True) the newest whole one of a directory, None if it has none.

    False means none.

    Raises:
        ValueError: the checkpoint that was asked for by name is not whole.
    """
    if isinstance(wanted, str):
        if fault := checkpoint_fault(Path(wanted), world_size=world_size):
            raise ValueError(
                f"resume_from_checkpoint: {wanted} is not a whole checkpoint ({fault}); give an "
                "older one, or True for the newest whole one"
            )
        return wanted
    checkpoint = newest_checkpoint(directory, world_size=world_size) if wanted else None
    if checkpoint is not None:
        logger.warning("going on from %s", checkpoint)
    return checkpoint


def newest_checkpoint(directory: Path, *, world_size: int = 1) -> str | None:
    """The newest whole checkpoint of a directory; the log names newer ones that are not whole."""
    for checkpoint in reversed(sort_checkpoints(str(directory))):
        fault = checkpoint_fault(Path(checkpoint), world_size=world_size)
        if fault is None:
            return checkpoint
        logger.warning("%s is not whole (%s): passed over", checkpoint, fault)
    return None


def is_at_the_end(checkpoint: str) -> bool:
    """Whether a whole checkpoint is of a run's last step, and holds plain weights."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_bytes())
    last = bool(state["global_step"] >= state["max_steps"])
    return last and any(Path(checkpoint).glob("*.safetensors"))


@contextlib.contextmanager
def stopped(directory: Path, *, world_size: int = 1) -> Iterator[None]:
    """Around a training: say what an interrupted one goes on from, and name a full disk.

    Raises:
        StoreError: the disk is full.
    """
    try:
        yield
    except KeyboardInterrupt:
        newest = newest_checkpoint(directory, world_size=world_size)
        if newest is None:
            logger.warning("interrupted before the first checkpoint: nothing to go on from yet")
        else:
            logger.warning("interrupted: the same command goes on from %s", newest)
        raise
    except Exception as error:
        # Writers of weights wrap the system's error, or hide it behind one of their own.
        seen: BaseException | None = error
        while seen is not None and not any(reason in str(seen) for reason in _FULL):
            seen = seen.__cause__ or seen.__context__
        if seen is None:
            raise
        raise StoreError(
            f"The disk is full: the student could not be saved in {directory}. What was done "
            "stays: free some space and run the same command again."
        ) from error


def _whole(path: Path) -> bool:
    """Whether a file's own structure says that it reaches its end."""
    if path.suffix == ".safetensors":
        return _whole_safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(path)  # torch.save writes the directory of the archive last
    if path.suffix == ".json":
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return False
    return True


def _whole_safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            return False
        (length,) = struct.unpack("<Q", prefix)
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + int(length) + max(ends, default=0) == size
