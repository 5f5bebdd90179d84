"""Samples as images: read, decode, transform, each with random draws of its own; and what is wrong with them."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from . import fast
from .sources import Source

Item = int | tuple[int, int]  # a sample's number, or (epoch, number) where transforms draw at random


@dataclass(frozen=True)
class Skipped:
    """In the place of a sample that cannot be read or decoded: ``reason`` names it."""

    reason: str


@dataclass(frozen=True)
class Skips:
    """Beside a batch: what was skipped of it."""

    reasons: tuple[str, ...]

    def pin_memory(self) -> "Skips":
        return self


class Samples(Dataset):
    """(image, label) of samples.

    Random transforms are seeded by (seed, epoch, sample), so that a sample of an epoch looks the same whatever the
    number of workers or ranks, and wherever training is resumed.

    Args:
        decode: called with a sample's bytes or pixels and its name; raises ``ValueError`` naming it where it cannot be
            decoded.
        transform: called with what ``decode`` gives, while the three global generators are seeded; if it has
            ``takes_generator``, with the sample's own generator besides (`fast.FastTrain`).
        skip: give `Skipped` for samples that cannot be read or decoded, instead of raising (``DATA.ON_ERROR``).
    """

    def __init__(self, decode: Callable[[Any, str], Any], transform: Callable, seed: int = 0, skip: bool = False):
        self.decode, self.transform, self.seed, self.skip = decode, transform, seed, skip

    def __getitems__(self, items: Sequence[Any]) -> list[Any]:
        """The samples of a batch, as loaders ask for them."""
        with undisturbed():
            return [self[item] for item in items]

    def make(self, epoch: int | None, number: int, name: str, read: Callable[[], Any], label: int) -> Any:
        """(image, label) of a sample; without an epoch nothing is drawn, as for evaluation."""
        try:
            image = self.decode(read(), name)
            try:
                return self._transformed(image, epoch, number), label
            except (OSError, ValueError) as err:
                raise ValueError(f"{name}: {err}") from err
        except (OSError, ValueError) as err:
            if not self.skip:
                raise
            return Skipped(_shown(err))

    def _transformed(self, image: Any, epoch: int | None, number: int) -> Any:
        if epoch is None:
            return self.transform(image)
        if getattr(self.transform, "takes_generator", False):
            return self.transform(image, fast.sample_generator(self.seed, epoch, number))
        with seeded(self.seed, epoch, number):
            return self.transform(image)


class Images(Samples):
    """The samples of a source. Items are numbers, or (epoch, number) where transforms draw, as from `TrainSampler`."""

    def __init__(
        self, source: Source, decode: Callable[[Any, str], Any], transform: Callable, seed: int = 0, skip: bool = False
    ):
        super().__init__(decode, transform, seed, skip)
        self.source = source

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: Item) -> Any:
        epoch, number = item if isinstance(item, tuple) else (None, item)
        source = self.source
        return self.make(epoch, number, source.name(number), lambda: source.read(number), int(source.labels[number]))


def _shown(err: Exception) -> str:
    """Its message on one line that can be written anywhere: bytes of a file's name need not be UTF-8."""
    line = " ".join(str(err).split())
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def stack(samples: Sequence[tuple[Any, int]]) -> tuple:
    """A batch: images, labels, and for the fast pipeline what the device needs."""
    image = samples[0][0]
    uint8 = isinstance(image, tuple) or image.dtype == torch.uint8
    return fast.collate(samples) if uint8 else tuple(default_collate(list(samples)))


def collate(samples: Sequence[Any], fill: bool, make_batch: Callable[[Sequence[Any]], tuple] = stack) -> tuple:
    """A batch as ``make_batch`` makes it, and `Skips` if anything was skipped.

    Args:
        fill: put other samples of the batch, in turn, in the places of skipped ones, so that every rank has full
            batches; else leave these places out.

    Images and labels are None where all of the batch was skipped.
    """
    reasons = tuple(sample.reason for sample in samples if isinstance(sample, Skipped))
    good = [sample for sample in samples if not isinstance(sample, Skipped)]
    if not reasons:
        return make_batch(good)
    if not good:
        return None, None, Skips(reasons)
    if fill:
        spare = iter(good * len(reasons))
        good = [next(spare) if isinstance(sample, Skipped) else sample for sample in samples]
    return *make_batch(good), Skips(reasons)


_kept = False  # whether somebody puts the global generators back later


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put Python's, NumPy's and torch's generators back in the end. In a loader's worker nobody else draws.

    It takes ten times as long as seeding them, hence once for a batch.
    """
    global _kept
    if _kept or get_worker_info() is not None:
        yield
        return
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _kept = True
    try:
        yield
    finally:
        _kept = False
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run with Python's, NumPy's and torch's generators seeded from ``key``, then put them back."""
    with undisturbed():
        words = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(words[1])
        torch.default_generator.manual_seed(int(words[2]))
        yield
