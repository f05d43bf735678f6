"""Which rows a rank sees in a pass: originals once an epoch, counterfactuals spread evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import DataLoader, Sampler

from leaf_distill.data.collator import FILLER
from leaf_distill.data.example import Example


class StepSampler(Sampler[list[int]]):
    """One rank's batches of an epoch, `batch_size` originals each with their counterfactuals.

    The originals are shuffled and cut into optimizer steps of `batch_size * accumulation *
    world_size`. Of O originals and C counterfactuals, the batch that holds the originals [a, b) of
    the shuffled order also holds the counterfactuals [C a // O, C b // O): every step has its share
    to within one row, and the rows of a step do not depend on how ranks and accumulation steps
    divide it. Every rank has the same number of batches; one that runs dry gets `FILLER`.

    Raises ValueError when there are no originals, or fewer than a step and `drop_last`.
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
            raise ValueError(f"dataset: must have {needed} original rows, got {count}")

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


class EpochLoader(DataLoader[Example]):
    """A DataLoader that hands the epoch on, as the training loop asks, to its StepSampler."""

    def set_epoch(self, epoch: int) -> None:
        if isinstance(sampler := self.batch_sampler, StepSampler):
            sampler.set_epoch(epoch)
