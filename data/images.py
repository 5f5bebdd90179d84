"""Samples of a source as images: read, decode, transform, each with random draws of its own."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from .sources import Source

Item = int | tuple[int, int]  # a sample's number, or (epoch, number) where transforms draw at random


class Images(Dataset):
    """(image, label) of a source's samples.

    Random transforms are seeded by (seed, epoch, sample), so that a sample of an epoch looks the same whatever the
    number of workers or ranks, and wherever training is resumed. Items are (epoch, number), as `TrainSampler` gives
    them; a plain number, as `EvalSampler` gives it, is transformed without draws.

    Args:
        decode: called with what `Source.read` gives and the sample's name; raises ``ValueError`` naming it where it
            cannot be decoded.
        transform: called with what ``decode`` gives.
    """

    def __init__(self, source: Source, decode: Callable[[Any, str], Any], transform: Callable, seed: int = 0):
        self.source, self.decode, self.transform, self.seed = source, decode, transform, seed

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: Item) -> tuple[Any, int]:
        epoch, index = item if isinstance(item, tuple) else (None, item)
        image = self.decode(self.source.read(index), self.source.name(index))
        label = int(self.source.labels[index])
        if epoch is None:
            return self.transform(image), label
        with seeded(self.seed, epoch, index):
            return self.transform(image), label


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run with Python's, NumPy's and torch's generators seeded from ``key``, then put them back."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
