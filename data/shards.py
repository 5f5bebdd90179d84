"""WebDataset tar shards as a stream with exact epochs.

Each rank's main process reads its run of the stream from beginning to end and hands the encoded bytes to the loader's
workers inside the sampler's items. Order, epoch length and resuming therefore do not know how many workers there are.
`webdataset` expands the shards' names, runs commands and parses the archives; splitting and shuffling are ours, since
its splitters give ranks unequal numbers of batches and its shuffle cannot be entered in the middle.

`tar` reads a shard; `shard_index` knows which shards there are and how many samples each has.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .images import Samples
from .shard_index import INDEX, agreed_classes, count_all, expand, find_faults, find_indices, settle_names
from .sources import UNKNOWN, settle_faults
from .tar import Data, read_samples, unpack

CHUNK = 32  # samples that the reading thread hands over at once, so that the two seldom wake each other

Item = tuple[int | None, int, str, Data, int]  # epoch (None: evaluation), number, name, data, label


class ShardSet:
    """Shards with their exact sample counts.

    A sample's number is its position in all shards, in the order in which they are given here.

    Args:
        shards: a folder (its ``*.tar`` by name), a file, a glob, a brace pattern (``shard-{000000..000099}.tar``), a
            command (``pipe:...``, with braces too) that writes a shard to its standard output, or a list of such.
        index: an ``index.json`` for shards that do not have it beside them, such as those of commands.
        samples: for shards without an index, the counts of all shards; or their sum, where all shards but the last
            have the same count.
        classes: the classes' names, those of the training data; an index's own, if it has any, must be the same.
        num_classes: labels must be below it; their number follows from ``classes`` if given, else from the index. If
            none of them says, any label is taken.
        skip: give what is wrong with a shard for each sample that it lacks, as for a sample that is wrong by itself,
            instead of raising it (``DATA.ON_ERROR skip``). A shard's count must be known, then: ranks whose machines
            have other copies of a damaged one would count differently.
        labelled: whether samples need labels; if not, 0 stands for one that is missing.

    Attributes:
        urls: the shards, as paths or commands.
        counts: (shards,), int64, the samples of each.
        classes: the classes' names, or None where they are not known.
        num_classes: their number, or None.

    Raises:
        OSError: for a missing folder or shard, or where nothing is found.
        ValueError: for damaged shards or indices, or where counts are unknown or contradict each other.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str | Path],
        index: str | Path | None = None,
        samples: int | Sequence[int] | None = None,
        classes: list[str] | None = None,
        num_classes: int | None = None,
        skip: bool = False,
        labelled: bool = True,
    ):
        self.urls, self.skip, self.labelled = expand(shards, skip), skip, labelled
        indices = find_indices(self.urls, index)
        self.faults = find_faults(self.urls, indices)
        if self.faults and not skip:
            raise ValueError(self.faults[min(self.faults)])
        self.counts = np.array(count_all(self.urls, indices, samples), dtype=np.int64)
        self.first = np.cumsum(self.counts) - self.counts  # the number of each shard's first sample
        own = agreed_classes([(index.classes, index.num_classes) for index in indices if index])
        self.classes, self.num_classes = settle_names(self.urls[0], *own, classes, num_classes)
        if len(self) == 0:
            raise ValueError(f"{self.urls[0]}: no samples in it, nor in the {len(self.urls) - 1} other shard(s)")
        if self.faults:
            settle_faults(indices[min(self.faults)].path, self.faults, len(self.urls), "shards")

    def __len__(self) -> int:
        return int(self.counts.sum())

    def read(self, shard: int, positions: Sequence[int] | None = None) -> Iterator[tuple[int, str, Data, int]]:
        """(position, name, data, label) of a shard's samples at ascending ``positions``; of all of them if None.

        A sample that is wrong by itself (no image, no label, ...) comes with a ``ValueError`` for its data and
        `UNKNOWN` for its label: the user of the item raises or skips it. Samples before a position are read and
        dropped: passing over them by their headers takes hardly less time.

        Raises ``ValueError`` or ``OSError``, naming the shard, where the archive is damaged, the command fails, or the
        shard has fewer or more samples than `counts` says, as far as it is read. With ``skip`` all samples from there
        on come with that error.
        """
        url, count, done = self.urls[shard], int(self.counts[shard]), 0
        positions = range(count) if positions is None else positions
        try:
            if shard in self.faults:
                raise ValueError(self.faults[shard])
            for sample in self._read(shard, positions):
                yield sample
                done += 1
        except (ValueError, OSError) as err:
            if not self.skip:
                raise
            for position in positions[done:]:
                reason = f"{err} (sample {position + 1} of {count})"
                yield position, f"{url}@/{position}", ValueError(reason), UNKNOWN

    def _read(self, shard: int, positions: Sequence[int]) -> Iterator[tuple[int, str, Data, int]]:
        url, count = self.urls[shard], int(self.counts[shard])
        wanted = iter(positions)
        position, found = next(wanted, None), 0
        with closing(read_samples(url)) as samples:
            while position is not None:
                sample = next(samples, None)
                if sample is None:
                    raise ValueError(_wrong_count(url, count, found))
                found += 1
                if found == count:  # look on before giving the last one away: ranks must not differ in what they see
                    found += sum(1 for _ in samples)
                    if found > count:
                        raise ValueError(_wrong_count(url, count, found))
                if found - 1 == position:
                    yield position, *unpack(sample, url, self.num_classes, self.labelled)
                    position = next(wanted, None)


def _wrong_count(url: str, expected: int, found: int) -> str:
    return f"{url}: expected {expected} samples, found {found}; copy it again, or correct its {INDEX}"


class ShardSampler(Sampler[Item]):
    """A rank's items (epoch, number, name, data, label) of a `ShardSet`, each with its encoded bytes.

    Training: the shards are shuffled by (seed, epoch); the stream of all samples is cut into ``world_size`` runs of
    equal length, and the rest of at most ``world_size`` - 1 samples is left out, another one in each epoch. Evaluation:
    nothing is shuffled, each sample is on exactly one rank, and ranks may differ by one in length; epoch is None.

    Args:
        buffer: a training sample comes up to this many samples later than in the stream; so many are held at most.
        ahead: samples that a thread reads in advance; 0 for no thread.

    Raises ``ValueError`` for a training set with fewer samples than ranks.
    """

    def __init__(
        self,
        shards: ShardSet,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        train: bool = True,
        buffer: int = 2000,
        ahead: int = 1024,
    ):
        if train and len(shards) < world_size:
            raise ValueError(
                f"{shards.urls[0]}: {len(shards)} training sample(s) in {len(shards.urls)} shard(s) for {world_size} "
                f"processes; use at most {len(shards)}"
            )
        self.shards, self.rank, self.world_size, self.seed = shards, rank, world_size, seed
        self.train, self.buffer, self.ahead = train, buffer, ahead
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Shuffle for ``epoch``; the next pass leaves out this rank's first ``start`` samples, seen before a resume."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        begin, end = self._run()
        return end - begin

    def __iter__(self) -> Iterator[Item]:
        order = self._order()[self.start :]
        source = self._read(np.sort(order))
        held: dict[int, Item] = {}
        with closing(read_ahead(source, self.ahead) if self.ahead else source) as items:
            for position in order.tolist():
                while position not in held:
                    earlier, item = next(items)
                    held[earlier] = item
                yield held.pop(position)

    def _run(self) -> tuple[int, int]:
        """Begin and end of this rank's part of the stream."""
        total, rank, world_size = len(self.shards), self.rank, self.world_size
        if self.train:
            return total // world_size * rank, total // world_size * (rank + 1)
        return total * rank // world_size, total * (rank + 1) // world_size

    def _order(self) -> np.ndarray:
        """Positions in the run, in the order in which they are given away.

        Each position is delayed by a draw from [0, buffer) and the sums are sorted. When a sample's turn comes, the
        samples already read but not yet given away are later than its sum, yet lie before it: at most ``buffer``. The
        whole order is known without reading anything, so an epoch can be entered anywhere.
        """
        positions = np.arange(len(self))
        if not self.train:
            return positions
        delays = self.buffer * draws(len(self), self.seed, self.epoch, self.rank + 1)
        return np.argsort(positions + delays, kind="stable")

    def _stream(self) -> list[tuple[int, int, int]]:
        """The stream of all samples as (shard, first position, end), the shards in this epoch's order.

        Training enters its first shard somewhere in the middle, and comes back to its beginning at the end. So the
        rest that is left out is another one in each epoch, however few the shards are.
        """
        counts = self.shards.counts
        if not self.train:
            return [(shard, 0, count) for shard, count in enumerate(counts.tolist())]
        *keys, entry = draws(len(counts) + 1, self.seed, self.epoch)
        order = np.argsort(keys, kind="stable").tolist()
        middle = int(entry * counts[order[0]])
        whole = [(shard, 0, int(counts[shard])) for shard in order[1:]]
        return [(order[0], middle, int(counts[order[0]])), *whole, (order[0], 0, middle)]

    def _read(self, wanted: np.ndarray) -> Iterator[tuple[int, Item]]:
        """(position, item) for ascending positions in the run. Shards without a wanted sample are not opened."""
        epoch = self.epoch if self.train else None
        end = -self._run()[0]
        for shard, low, high in self._stream():
            begin, end = end, end + high - low
            some = wanted[slice(*np.searchsorted(wanted, [begin, end]))] - begin + low
            number = int(self.shards.first[shard])
            for position, *sample in self.shards.read(shard, some.tolist()):
                yield begin + position - low, (epoch, number + position, *sample)


class StreamImages(Samples):
    """(image, label) of the items of a `ShardSampler`; what `images.Images` gives for the same bytes and numbers."""

    def __init__(
        self,
        shards: ShardSet,
        decode: Callable[[Any, str], Any],
        transform: Callable,
        seed: int = 0,
        skip: bool = False,
    ):
        super().__init__(decode, transform, seed, skip)
        self.classes, self.length = shards.classes, len(shards)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: Item) -> Any:
        epoch, number, name, data, label = item

        def read() -> bytes:
            if isinstance(data, ValueError):
                raise data
            return data

        return self.make(epoch, number, name, read, label)


def draws(count: int, *key: int) -> np.ndarray:
    """Uniform draws from [0, 1) that depend on ``key`` alone; a 0 at its end changes nothing."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key))).random(count)


def read_ahead(source: Generator, depth: int) -> Iterator[Any]:
    """The elements of ``source``, which a thread reads about ``depth`` elements in advance, and closes in the end.

    What ``source`` raises is raised here in its turn. Dropping this iterator stops the thread.
    """
    chunks: deque[list] = deque()
    ready, room = threading.Semaphore(0), threading.Semaphore(-(-depth // CHUNK))
    stopped, failures, process = threading.Event(), [], os.getpid()

    def hand_over(chunk: list) -> None:
        room.acquire()
        chunks.append(chunk)
        ready.release()

    def fill() -> None:
        chunk = []
        try:
            with closing(source):
                for element in source:
                    chunk.append(element)
                    if len(chunk) == CHUNK:
                        hand_over(chunk)
                        chunk = []
                    if stopped.is_set():
                        return
        except BaseException as err:
            failures.append(err)
        finally:
            if chunk:
                hand_over(chunk)
            hand_over([])  # the end

    # A daemon: a command that never answers must not keep the process from ending.
    threading.Thread(target=fill, name="read_ahead", daemon=True).start()
    try:
        while True:
            ready.acquire()
            chunk = chunks.popleft()
            room.release()
            if not chunk:
                break
            yield from chunk
        if failures:
            raise failures[0]
    finally:
        if os.getpid() == process:  # in a forked worker these locks belong to nobody
            stopped.set()
            room.release(3)  # whatever it still hands over
