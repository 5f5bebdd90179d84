"""WebDataset tar shards as a stream with exact epochs.

Each rank's main process reads its run of the stream from beginning to end and hands the encoded bytes to the loader's
workers inside the sampler's items. Order, epoch length and resuming therefore do not know how many workers there are.
`webdataset` expands the shards' names, runs commands and parses the archives; splitting and shuffling are ours, since
its splitters give ranks unequal numbers of batches and its shuffle cannot be entered in the middle.

A sample is ``<key>.jpg`` (or another image suffix) and ``<key>.cls``, which holds the class number as text. Beside the
shards lies an ``index.json``, see `read_index`.
"""

import glob
import importlib
import json
import logging
import os
import re
import reprlib
import signal
import subprocess
import tarfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from torchvision.datasets.folder import IMG_EXTENSIONS

from .images import Samples

logger = logging.getLogger(__name__)
INDEX = "index.json"
PIPE = "pipe:"
IMAGE_SUFFIXES = frozenset(suffix[1:] for suffix in IMG_EXTENSIONS)
CHUNK = 32  # samples that the reading thread hands over at once, so that the two seldom wake each other
MOST = 1 << 48  # a count or size above it is a mistake
SECONDS_TO_END = 5  # for a command that was told to end, before it is killed

Data = bytes | ValueError  # a sample's encoded image, or what is wrong with the sample
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
    ):
        self.urls = expand(shards)
        indices = _indices(self.urls, index)
        self.counts = np.array(_counts(self.urls, indices, samples), dtype=np.int64)
        self.first = np.cumsum(self.counts) - self.counts  # the number of each shard's first sample
        own = _agreed([(index.classes, index.num_classes) for index in indices if index])
        self.classes, self.num_classes = settle_classes(self.urls[0], *own, classes, num_classes)
        if len(self) == 0:
            raise ValueError(f"{self.urls[0]}: no samples in it, nor in the {len(self.urls) - 1} other shard(s)")

    def __len__(self) -> int:
        return int(self.counts.sum())

    def read(self, shard: int, positions: Sequence[int] | None = None) -> Iterator[tuple[int, str, Data, int]]:
        """(position, name, data, label) of a shard's samples at ascending ``positions``; of all of them if None.

        A sample that is wrong by itself (no image, no label, ...) comes with a ``ValueError`` for its data and -1 for
        its label: the user of the item raises or skips it. Samples before a position are read and dropped: passing
        over them by their headers takes hardly less time.

        Raises ``ValueError`` or ``OSError``, naming the shard, where the archive is damaged, the command fails, or the
        shard has fewer or more samples than `counts` says, as far as it is read.
        """
        url, count = self.urls[shard], int(self.counts[shard])
        wanted = iter(range(count) if positions is None else positions)
        position, found = next(wanted, None), 0
        with closing(_samples(url)) as samples:
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
                    yield position, *_unpack(sample, url, self.num_classes)
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


# Names of shards


def expand(shards: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths and commands of all shards that `ShardSet` takes; each local one exists.

    Raises ``OSError`` naming what is missing, ``ValueError`` where a pattern is wrong or a shard comes twice.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    urls = [url for spec in given for url in _expand(str(spec))]
    if not urls:
        raise ValueError(
            "no shards given; give a folder, a pattern such as shard-{000000..000099}.tar, or pipe:COMMAND"
        )
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ValueError(f"{url}: this shard is given twice, so its samples would count twice; give it once")
        seen.add(url)
    return urls


def _expand(spec: str) -> list[str]:
    path = Path(spec)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():  # also one whose name looks like a pattern
        return [spec]
    return [url for pattern in _braces(spec) for url in _matches(pattern)]


def _in_folder(folder: Path) -> list[str]:
    """The folder's shards by name; exactly those of its index, where it has one."""
    found = sorted(path.name for path in folder.glob("*.tar"))
    if (folder / INDEX).is_file():
        listed = read_index(folder / INDEX, "tar").shards
        for name in sorted(set(listed) ^ set(found)):
            if name in listed:
                raise FileNotFoundError(f"{folder / name}: no such shard, but {folder / INDEX} lists it; copy it there")
            raise ValueError(f"{folder / name}: {INDEX} beside it does not list it; move the shard away")
    if not found:
        raise FileNotFoundError(f"{folder}: no .tar shards in this folder")
    return [str(folder / name) for name in found]


def _braces(spec: str) -> list[str]:
    from_library = _webdataset("shardlists").expand_urls
    try:
        return from_library(spec)
    except (AssertionError, ValueError) as err:  # an environment variable that is not set, unbalanced braces
        raise ValueError(f"{spec}: not a pattern of shards: {' '.join(str(err).split())}") from err


def _matches(pattern: str) -> list[str]:
    if pattern.startswith(PIPE):
        return [pattern]
    if "://" in pattern:
        raise ValueError(f"{pattern}: addresses are read by commands only; write for instance pipe:curl -sfL {pattern}")
    if glob.has_magic(pattern) and not Path(pattern).is_file():
        found = sorted(glob.glob(pattern))
        if not found:
            raise FileNotFoundError(f"{pattern}: no shard matches")
        return found
    if not Path(pattern).is_file():
        raise FileNotFoundError(f"{pattern}: no such shard")
    return [pattern]


# Counts and classes


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says: shards by file name, the classes' names (or None) and their number (or None)."""

    path: Path
    shards: dict[str, dict[str, Any]]
    classes: list[str] | None
    num_classes: int | None


def read_index(path: Path, kind: str) -> Index:
    """Read ``{"format": kind, "shards": [{"name", "samples", "bytes", "sha256"}], "classes", "num_classes"}``.

    The format is tar or raw. ``bytes``, ``sha256``, ``classes`` and ``num_classes`` may be missing or null.

    Raises ``ValueError`` or ``OSError``, naming the file and what is wrong in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path}: no such index; tools/make_shards.py writes it beside its shards") from err
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: not a JSON file: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{path}: not an index that tools/make_shards.py wrote; move it away to do without")
    if content.get("format") != kind:
        raise ValueError(f"{path}: shards of format {content.get('format')!r} where {kind!r} ones are expected")
    shards = {}
    for number, entry in enumerate(content["shards"]):
        _check_entry(path, number, entry)
        if entry["name"] in shards:
            raise ValueError(f"{path}: shard {entry['name']!r} is listed twice")
        shards[entry["name"]] = entry
    return Index(path, shards, *_classes_of(path, content))


def _check_entry(path: Path, number: int, entry: Any) -> None:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name.isprintable() or not name or Path(name).name != name:
        raise ValueError(
            f"{path}: shard {number} has the name {reprlib.repr(name)}; expected that of a file beside the index"
        )
    for key in ("samples", "bytes"):
        value = entry.get(key)
        if (value is not None or key == "samples") and (type(value) is not int or not 0 <= value < MOST):
            raise ValueError(f"{path}: shard {name!r} has {key!r}: {reprlib.repr(value)}; expected a whole number")


def _classes_of(path: Path, content: dict[str, Any]) -> tuple[list[str] | None, int | None]:
    classes, count = content.get("classes"), content.get("num_classes")
    names = [] if classes is None else classes
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError(f"{path}: 'classes' is neither null nor a list of printable names")
    if count is None:
        return classes, None if classes is None else len(classes)
    if type(count) is not int or not 0 < count < MOST or (classes is not None and len(classes) != count):
        raise ValueError(f"{path}: 'num_classes' is {reprlib.repr(count)} with {len(names)} names of classes")
    return classes, count


def _indices(urls: list[str], given: str | Path | None) -> list[Index | None]:
    """For each shard the given index, or the one beside it, if any."""
    read: dict[Path, Index | None] = {}

    def beside(url: str) -> Index | None:
        if given is None and url.startswith(PIPE):
            return None
        path = Path(url).parent / INDEX if given is None else Path(given)
        if path not in read:
            read[path] = read_index(path, "tar") if given is not None or path.is_file() else None
        return read[path]

    return [beside(url) for url in urls]


def _agreed(classes: list[tuple[list[str] | None, int | None]]) -> tuple[list[str] | None, int | None]:
    """The classes' names and number that all indices give."""
    if any(pair != classes[0] for pair in classes):
        raise ValueError(f"the shards' {INDEX} files name different classes; shards of one set have the same")
    return classes[0] if classes else (None, None)


def settle_classes(
    where: str | Path,
    own: list[str] | None,
    own_count: int | None,
    classes: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[list[str] | None, int | None]:
    """The names of the classes and the number that labels must be below, from an index's own and the known ones.

    Raises ``ValueError`` where the names differ.
    """
    if own is not None and classes is not None and list(classes) != own:
        strange = sorted(set(classes) ^ set(own))[:5]
        raise ValueError(
            f"{where}: packed with {len(own)} classes, the training data has {len(classes)}; they differ in "
            f"{', '.join(strange) or 'their order'}"
        )
    names = own if classes is None else list(classes)
    return names, num_classes or (own_count if names is None else len(names))


def _counts(urls: list[str], indices: list[Index | None], samples: int | Sequence[int] | None) -> list[int]:
    counts = [None if index is None else _listed(url, index) for url, index in zip(urls, indices, strict=True)]
    if None in counts and samples is not None:
        return _spread(urls, samples)
    unknown = [url for url, count in zip(urls, counts, strict=True) if count is None]
    for url in unknown:
        if url.startswith(PIPE):
            raise ValueError(
                f"{url}: how many samples it has is not known; give the {INDEX} that tools/make_shards.py wrote, or "
                f"the number of samples of the {len(urls)} shard(s)"
            )
    counts = [count_samples(Path(url)) if count is None else count for url, count in zip(urls, counts, strict=True)]
    if unknown:
        logger.info(f"{unknown[0]} and {len(unknown) - 1} more shard(s) without {INDEX}: counted {sum(counts)} samples")
    if samples is not None and samples != (sum(counts) if isinstance(samples, int) else type(samples)(counts)):
        raise ValueError(f"{urls[0]}: {sum(counts)} samples in {len(urls)} shard(s) by the {INDEX}, not {samples}")
    return counts


def _listed(url: str, index: Index) -> int:
    """The count in the index of a local shard, or of one that a command's words name."""
    words = re.split(r"[\s'\"/\\=:?&;|<>()]+", url) if url.startswith(PIPE) else [Path(url).name]
    names = {word for word in words if word in index.shards}
    if len(names) != 1:
        raise ValueError(
            f"{url}: {index.path} lists {'no' if not names else 'more than one'} shard of this name; its "
            f"{len(index.shards)} shard(s) begin with {', '.join(list(index.shards)[:2])}"
        )
    entry = index.shards[names.pop()]
    size = None if url.startswith(PIPE) else Path(url).stat().st_size
    if size is not None and entry.get("bytes") not in (None, size):
        raise ValueError(f"{url}: {size} bytes, but {entry['bytes']} by {index.path}; copy it again")
    return entry["samples"]


def _spread(urls: list[str], samples: int | Sequence[int]) -> list[int]:
    """The shards' counts as given, or from their sum."""
    if isinstance(samples, int):
        each = -(-samples // len(urls))
        counts = [each] * (len(urls) - 1) + [samples - each * (len(urls) - 1)]
    else:
        counts = [int(count) for count in samples]
    if len(counts) != len(urls) or min(counts) < 0:
        raise ValueError(f"{urls[0]}: samples={samples} does not fit {len(urls)} shard(s); give the count of each")
    return counts


def count_samples(path: Path) -> int:
    """The samples of a local shard, by the members' headers.

    Raises ``ValueError`` naming the shard and the last good member where it is damaged.
    """
    member, key, samples = "", None, 0
    wds = _webdataset("tariterators")
    with open(path, "rb") as file, _named(str(path), lambda: member), tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := archive.next()) is not None:
            if archive.offset < info.offset_data:  # a negative size would be read for ever
                raise ValueError("a size below 0")
            member, archive.members = info.name, []
            prefix = wds.base_plus_ext(info.name)[0]
            if info.isreg() and prefix is not None and not _is_meta(info.name):
                samples += prefix != key
                key = prefix
        # tarfile takes a damaged header for the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise ValueError("a damaged header, or no end of the archive")
    return samples


def _is_meta(name: str) -> bool:
    """Whether `webdataset` passes over a member."""
    return bool(re.match(r"__[^/]*__($|/)", name)) or (
        "/" not in name and name.startswith("__") and name.endswith("__")
    )


# Reading


def _samples(url: str) -> Iterator[dict[str, Any]]:
    """`webdataset`'s samples of a shard: ``__key__`` and, by suffix, the members' bytes."""
    wds = _webdataset("tariterators")
    member = ""

    def note(name: str) -> bool:
        nonlocal member
        member = name
        return True

    with _opened(url) as stream:
        files = wds.tar_file_expander([{"url": url, "stream": _Ending(stream)}], select_files=note)
        with _named(url, lambda: member):
            yield from wds.group_by_keys(files)


class _Ending:
    """A stream that may be read a few times after its end. tarfile would go on for as long as a damaged size says."""

    def __init__(self, stream: Any):
        self.stream, self.left = stream, 16

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= not data
        if self.left < 0:
            raise EOFError("unexpected end of data")
        return data


@contextmanager
def _named(url: str, member: Callable[[], str]) -> Iterator[None]:
    """Turn what reading an archive raises into ``ValueError`` or ``OSError`` with the shard and the member."""
    try:
        yield
    except Exception as err:  # nothing narrower: tarfile raises whatever a damaged header leads to
        text = err if isinstance(err, OSError) or not err.args else err.args[0]  # webdataset adds to the arguments
        reason = " ".join(str(text).split(" @ ")[0].split()) or type(err).__name__
        where = f"at or after member {printable(member())}" if member() else "from the beginning"
        kind = OSError if isinstance(err, OSError) else ValueError
        raise kind(f"{url}: damaged {where}: {reason}; copy or pack the shard again") from err


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A stream of the shard's bytes. Raises ``OSError`` where the command of a pipe fails."""
    if not url.startswith(PIPE):
        with open(url, "rb", buffering=1 << 20) as file:
            yield file
        return
    # In a session of its own: Ctrl-C is for the main process, which may want some more batches before it saves.
    pipe = _webdataset("gopen").Pipe(
        url[len(PIPE) :], mode="rb", shell=True, stdin=subprocess.DEVNULL, start_new_session=True, ignore_errors=True
    )
    owner = os.getpid()
    try:
        yield pipe
        for _ in range(64):  # the archive's padding, without which the command cannot end
            if not pipe.read(1 << 16):
                break
        _check_exit(url, pipe.proc)
    except (ValueError, OSError) as err:
        _check_exit(url, pipe.proc, err)
        raise
    finally:
        if os.getpid() == owner:  # a forked worker must not end the command of the main process
            _end(pipe)


def _check_exit(url: str, command: subprocess.Popen, cause: Exception | None = None) -> None:
    """Raise ``OSError`` where the command has failed; one that still runs is taken for sound."""
    try:
        code = command.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return
    if code:
        raise OSError(f"{url}: the command ended with exit code {code}; try it by hand") from cause


def _end(pipe: Any) -> None:
    """End a command and what it has started, whether or not it has written everything."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if pipe.proc.poll() is None:
            os.killpg(pipe.proc.pid, number)
            with suppress(subprocess.TimeoutExpired):
                pipe.proc.wait(timeout=SECONDS_TO_END)
    pipe.close()


def _unpack(sample: dict[str, Any], url: str, num_classes: int | None) -> tuple[str, Data, int]:
    """(name, data, label) of a sample; a ``ValueError`` and -1 where it is no labelled image."""
    name = f"{url}@/{printable(sample['__key__'])}"
    images = sorted(IMAGE_SUFFIXES.intersection(sample))
    if len(images) != 1:
        members = ", ".join(printable(suffix) for suffix in sample if not suffix.startswith("__"))
        return name, ValueError(f"{name}: {len(images)} images among its members ({members}); expected 1"), -1
    name, data, text = f"{name}.{images[0]}", sample[images[0]], sample.get("cls")
    if text is None:
        return name, ValueError(f"{name}: no label; expected a member .cls with the number of its class"), -1
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        return name, ValueError(f"{name}: its .cls is {text[:20]!r}; expected the number of its class"), -1
    label = int(text)
    if num_classes is not None and label >= num_classes:
        return name, ValueError(f"{name}: label {label}, but there are {num_classes} classes, from 0"), -1
    if not data:
        return name, ValueError(f"{name}: 0 bytes; pack the shard again without it"), -1
    return name, data, label


def printable(name: str) -> str:
    """A member's name on one line, whatever bytes it is made of."""
    return repr(name)[1:-1]


def _webdataset(module: str) -> Any:
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ImportError as err:
        raise ValueError("tar shards need webdataset, not installed; run: python -m pip install webdataset") from err
