"""The rows of each batch: originals once an epoch, counterfactuals spread evenly over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from leaf_distill.data.collator import FILLER
from leaf_distill.data.example import Example

Indices = NDArray[np.int64]


def check_failed(failed: Sequence[object]) -> None:
    """Raise ValueError where no row is said to be one that the student fails."""
    if not failed:
        raise ValueError(
            "failed_share: must come with rows that the student fails, got none; give the dataset "
            "of `leaf detect --select student_wrong`, whose column student_verdict says which"
        )


class StepSampler(Sampler[list[int]]):
    """Yields one rank's batches of an epoch: `batch_size` originals and their counterfactuals.

    The originals are shuffled and cut into optimizer steps of `batch_size * accumulation *
    world_size`. Of O originals and C counterfactuals, the batch that holds the originals [a, b) of
    the shuffled order also holds the counterfactuals [C a // O, C b // O): every step has its share
    to within one row, and the rows of a step do not depend on how ranks and accumulation steps
    divide it. Every rank has the same number of batches; one that runs dry gets `FILLER`.

    With `failed_share` f an epoch has as many originals, but the first b of its order hold
    floor(f b) rows that the student fails: every step has its share to within one row. Either kind
    is drawn in turns: all its rows in a shuffled order, then all again in another one. The turns go
    on from epoch to epoch, and depend on seed and epoch alone.

    Args:
        originals, counterfactuals: indices of the rows.
        failed: the originals that the student fails, needed for `failed_share`.
        failed_share: their share of the originals in each step; None: every original once an epoch.
        batch_size: originals in a batch of one rank.
        accumulation: batches of a rank in an optimizer step.
        world_size, rank: how many ranks there are, and which one this is.
        seed: of the order, together with the epoch.
        shuffle: whether the rows are shuffled at all.
        drop_last: whether originals that do not fill a step are left out.

    Raises:
        ValueError: there are no originals, or fewer than a step and `drop_last`; or none of them
            is a failed one and `failed_share` is given.
    """

    def __init__(
        self,
        originals: Sequence[int],
        counterfactuals: Sequence[int] = (),
        *,
        failed: Sequence[int] = (),
        failed_share: float | None = None,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self._originals = np.asarray(originals, dtype=np.int64)
        self._counterfactuals = np.asarray(counterfactuals, dtype=np.int64)
        self._batch_size, self._accumulation = batch_size, accumulation
        self._world_size, self._rank = world_size, rank
        self._seed, self._shuffle = seed, shuffle
        self._epoch = 0
        step = batch_size * accumulation * world_size
        count = len(self._originals)
        self._used = count - count % step if drop_last else count
        if not self._used:
            needed = f"at least {step} (drop_last)" if drop_last else "at least one"
            raise ValueError(f"dataset: must have {needed} original rows, got {count}; give more")
        self._failed_share = failed_share
        if failed_share is not None:
            check_failed(failed)
            is_failed = np.isin(self._originals, np.asarray(failed, dtype=np.int64))
            self._failed, self._others = self._originals[is_failed], self._originals[~is_failed]
            self._failed_share = failed_share if len(self._others) else 1.0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self._epoch = epoch

    def __len__(self) -> int:
        # A whole step is whole turns of all ranks, so one division counts the last step as well.
        return -(-self._used // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[list[int]]:
        originals, counterfactuals = self._originals, self._counterfactuals
        if self._shuffle:
            random = np.random.default_rng((self._seed, self._epoch))
            originals = random.permutation(originals)
            counterfactuals = random.permutation(counterfactuals)
        total, extra = len(originals), len(counterfactuals)
        if self._failed_share is not None:
            originals = self._drawn(self._failed_share)
        for turn in range(len(self)):
            start = (turn * self._world_size + self._rank) * self._batch_size
            start, stop = min(start, self._used), min(start + self._batch_size, self._used)
            share = counterfactuals[extra * start // total : extra * stop // total]
            yield [*originals[start:stop].tolist(), *share.tolist()] or [FILLER]

    def _drawn(self, share: float) -> Indices:
        """Return the epoch's originals in order, a share of which are failed ones."""
        counts = np.floor(share * np.arange(self._used + 1)).astype(np.int64)
        at_failed = np.diff(counts) > 0
        drawn = np.empty(self._used, dtype=np.int64)
        kinds = ((at_failed, self._failed), (~at_failed, self._others))
        for kind, (places, rows) in enumerate(kinds):
            if count := int(places.sum()):
                drawn[places] = self._turns(rows, kind, self._epoch * count, count)
        return drawn

    def _turns(self, rows: Indices, kind: int, start: int, count: int) -> Indices:
        """Return the entries [start, start + count) of endless turns of the rows."""
        first, last = start // len(rows), -(-(start + count) // len(rows))
        turns = []
        for turn in range(first, last):
            random = np.random.default_rng((self._seed, kind, turn))
            turns.append(random.permutation(rows) if self._shuffle else rows)
        start -= first * len(rows)
        return np.concatenate(turns)[start : start + count]


class StepLoader(DataLoader[Example]):
    """Loads the batches of a StepSampler, to which it hands the epoch on.

    Args:
        dataset: rows by index.
        sampler: the indices of each batch.
        args: the settings of workers and memory.
        collate: makes a batch of Examples.
    """

    def __init__(
        self,
        dataset: Dataset[Example],
        sampler: StepSampler,
        args: TrainingArguments,
        collate: Callable[[Any], Any],
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )
        self.set_epoch = sampler.set_epoch
