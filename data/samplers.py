"""Which samples each rank sees, in which order."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class TrainSampler(Sampler[tuple[int, int]]):
    """Shuffled (epoch, index) pairs, dealt out to ranks; the same count on each, no sample twice in an epoch.

    The permutation is that of ``DistributedSampler`` under the same seed, but the last samples that ranks cannot share
    evenly are left out instead of repeated.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1, seed: int = 0):
        self.length, self.rank, self.world_size, self.seed = length, rank, world_size, seed
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Shuffle for ``epoch``; the next pass leaves out this rank's first ``start`` samples, seen before a resume."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.length, generator=generator).tolist()
        own = order[self.rank : len(self) * self.world_size : self.world_size]
        return iter([(self.epoch, index) for index in own[self.start :]])


class PartSampler(TrainSampler):
    """Shuffled (epoch, index) pairs of the samples that this rank keeps in memory, the same count on each rank.

    Args:
        own: the rank's samples.
        count: how many of them an epoch has; which ones are left out changes from epoch to epoch.
        rank: ranks shuffle differently, since samples at equal places are neighbours, and often of one class.
    """

    def __init__(self, own: Sequence[int], count: int, rank: int = 0, seed: int = 0):
        super().__init__(count, seed=seed)
        self.own = own
        self.key = rank

    def __iter__(self) -> Iterator[tuple[int, int]]:
        words = np.random.SeedSequence((self.seed, self.epoch, self.key)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0] >> np.uint64(1)))
        order = torch.randperm(len(self.own), generator=generator).tolist()
        return iter([(self.epoch, self.own[place]) for place in order[self.start : self.length]])


class EvalSampler(Sampler[int]):
    """Every sample on exactly one rank; ranks may differ by one in length.

    Args:
        sequential: give each rank a run of neighbouring samples instead of every ``world_size``-th (TEST.SEQUENTIAL).
        shuffle: in an order drawn once from ``seed`` (TEST.SHUFFLE).
    """

    def __init__(
        self,
        length: int,
        rank: int = 0,
        world_size: int = 1,
        sequential: bool = False,
        shuffle: bool = False,
        seed: int = 0,
    ):
        order = list(range(length))
        if shuffle:
            order = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
        if sequential:
            self.indices = order[length * rank // world_size : length * (rank + 1) // world_size]
        else:
            self.indices = order[rank::world_size]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
