"""The rows of each batch: originals once an epoch, counterfactuals spread evenly over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainingArguments

from leaf_distill.data.collator import FILLER
from leaf_distill.data.example import Example


class StepSampler(Sampler[list[int]]):
    """Yields one rank's batches of an epoch: `batch_size` originals and their counterfactuals.

    The originals are shuffled and cut into optimizer steps of `batch_size * accumulation *
    world_size`. Of O originals and C counterfactuals, the batch that holds the originals [a, b) of
    the shuffled order also holds the counterfactuals [C a // O, C b // O): every step has its share
    to within one row, and the rows of a step do not depend on how ranks and accumulation steps
    divide it. Every rank has the same number of batches; one that runs dry gets `FILLER`.

    Args:
        originals, counterfactuals: indices of the rows.
        batch_size: originals in a batch of one rank.
        accumulation: batches of a rank in an optimizer step.
        world_size, rank: how many ranks there are, and which one this is.
        seed: of the order, together with the epoch.
        shuffle: whether the rows are shuffled at all.
        drop_last: whether originals that do not fill a step are left out.

    Raises:
        ValueError: there are no originals, or fewer than a step and `drop_last`.
    """

    def __init__(
        self,
        originals: Sequence[int],
        counterfactuals: Sequence[int] = (),
        *,
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
        for turn in range(len(self)):
            start = (turn * self._world_size + self._rank) * self._batch_size
            start, stop = min(start, self._used), min(start + self._batch_size, self._used)
            share = counterfactuals[extra * start // total : extra * stop // total]
            yield [*originals[start:stop].tolist(), *share.tolist()] or [FILLER]


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
