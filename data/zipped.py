"""The official zip layout: ``train.zip`` beside ``train_map.txt``, read by offset, cached once per machine if asked.

Nobody shares a position in a file, so that any number of threads and processes, forked or spawned, may read at once.
"""

import errno
import logging
import os
import re
import secrets
import struct
import tempfile
import weakref
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .lists import Pair, Paths, choose, collect, show
from .sources import Faults, Source, settle_faults

ARCHIVES = {"train": "train.zip", "val": "val.zip"}
MAPS = {"train": "train_map.txt", "val": "val_map.txt"}
CACHE_MODES = ("no", "part", "full")
LABEL = re.compile(r"\s*-?[0-9]{1,18}\s*", re.ASCII)
LARGEST = 2**30  # bytes of a member; one that claims more is damaged or made to fill the memory

HEADER = 30  # bytes of a member's own header, before its name and extra fields
HEADER_PARTS = struct.Struct("<6xH6xI8xHH")  # flags, CRC, the lengths of name and extra fields
SLACK = 64  # for the header's extra fields, whose length the directory does not tell
NOWHERE = (-1, 0, 0, 0, 0)  # what the table of members has in the place of one that cannot be read
ENCRYPTED, CRC_FOLLOWS = 1, 8  # flags

# Filling a cache: members that lie this close are read in one go of at most so many bytes.
GAP = 2**16
WINDOW = 2**24
STEPS = 10  # processes meet between them, well within the time limit of a collective
THREADS = 4
LARGE = 10**9  # bytes of a cache whose parts each get a line in the log

logger = logging.getLogger(__name__)


class ZipSource(Source):
    """Members of ``root/<split>.zip`` that ``root/<split>_map.txt`` lists (official ``data/cached_image_folder.py``).

    A line of the map is ``path in the archive<TAB>label``; what may follow a second tab is ignored. A line may occur
    again, and is a sample again. Stored members are read as they are, deflated ones are inflated; either's CRC is
    checked each time (40 µs for 110 KB, where decoding takes more than 1 ms).

    With a cache the bytes of samples are read once, at the start, into memory that processes share:

    - ``full``: all samples, once per machine. Local rank 0 reads them while the others wait.
    - ``part``: in each process, those whose number leaves the remainder ``rank`` when divided by ``world_size``; see
      `own_indices`. Other samples are read from the archive.

    Args:
        root: folder of the archive and the map.
        split: ``train`` or ``val``.
        cache: ``no``, ``part`` or ``full`` (``DATA.CACHE_MODE``).
        classes: the classes' names, those of the training data; from the folders in the archive if None.
        num_classes: labels must be below it; their number follows from ``classes`` if given.
        rank, world_size: of this process.
        local_rank: of this process on its machine.
        barrier: waits for all ranks; `distributed.barrier`. Only ``full`` calls it and ``broadcast``.
        broadcast: gives rank 0's value to all ranks; `distributed.broadcast_object`.
        skip: raise what is wrong with a line or a member when its sample is read; see `Source`.

    Raises:
        FileNotFoundError: where the archive or the map is missing.
        OSError: where the cache does not fit.
        ValueError: naming file, line or member, where the archive or the map is damaged, or they do not agree.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        cache: str = "no",
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
        barrier: Callable[[], Any] = lambda: None,
        broadcast: Callable[[Any], Any] = lambda value: value,
        skip: bool = False,
    ):
        if cache not in CACHE_MODES:
            raise ValueError(f"DATA.CACHE_MODE={cache!r}; choose from {list(CACHE_MODES)}")
        self.file, self.map = Path(root) / choose(ARCHIVES, split), Path(root) / choose(MAPS, split)
        for file in (self.file, self.map):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file; zip data is {self.file.name} beside {self.map.name}, which "
                    f"tools/make_zip.py writes"
                )
        lines = collect(self.map, "line", map_lines(self.map), classes, num_classes, skip)
        self.paths, self.labels, self.classes, self.faults = lines
        self.archive = Archive(self.file, self.paths, self.map, self.faults if skip else None)
        self._check_repeats(skip)
        settle_faults(self.map, self.faults, len(self))
        self.own = range(rank, len(self), world_size) if cache == "part" else range(len(self))
        self.cache = None if cache == "no" else Cache(self.archive, self.own, skip)
        if cache == "part":
            share(self.cache, "no")
        elif cache == "full":
            share(self.cache, "part or no", local_rank, barrier, broadcast)

    def name(self, index: int) -> str:
        return f"{self.file}@/{self.paths[index]}"

    def read(self, index: int) -> bytes:
        if index in self.faults:
            raise ValueError(self.faults[index])
        held = self.cache.read(index) if self.cache else None
        return self.archive.read(index) if held is None else held

    def own_indices(self) -> range:
        """The samples that this process should read: with ``part`` those in its cache, else all."""
        return self.own

    def _check_repeats(self, skip: bool) -> None:
        first = self.archive.first[self.archive.slots]
        for late in np.flatnonzero(self.labels != self.labels[first]).tolist():
            if late not in self.faults and self.paths[late] == self.paths[first[late]]:
                reason = (
                    f"{self.map}, line {late + 1}: {show(self.paths[late])} has label {self.labels[late]}, but "
                    f"{self.labels[first[late]]} in line {first[late] + 1}"
                )
                blame(late, reason, self.faults if skip else None)


def blame(number: int, reason: str, faults: Faults | None) -> None:
    """Note the reason why a sample cannot be used, or raise it as ``ValueError`` where nobody keeps them."""
    if faults is None:
        raise ValueError(reason)
    faults[number] = reason


def map_lines(file: Path) -> Iterator[Pair]:
    """(path, label) of each line, or what is wrong with it; a label that is no number stays text."""
    with open(file, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            path, *rest = line.rstrip("\n").split("\t")
            if rest:
                yield path, int(rest[0]) if LABEL.fullmatch(rest[0]) else rest[0]
            else:
                yield ValueError(f"no tab in {show(path)}; a line is path<TAB>label")


class Archive:
    """Some members of a zip file, by number. Safe under threads, fork and spawn.

    Args:
        names: the members' names in the archive.
        source: the file that lists them, one a line, for errors.
        faults: passed over are the numbers in it; what is wrong with members is noted there. Else it is raised.
    """

    def __init__(self, path: Path, names: Paths, source: Path, faults: Faults | None = None):
        self.path, self.names = path, names
        found = directory(path)
        size = path.stat().st_size
        rows = array("q")
        for number in range(len(names)):
            passed = faults is not None and number in faults
            member = None if passed else found.get(names[number])
            fault = unreadable(member, size) if member else ""
            if fault:
                blame(number, f"{self.name(number)} {fault}", faults)
            elif not member and not passed:
                reason = f"{source}, line {number + 1}: {path} has no member {show(names[number])}"
                blame(number, reason, faults)
            rows.extend(place_of(member) if member and not fault else NOWHERE)
        table = np.array(rows).reshape(-1, 5).T.copy()
        self.starts, self.packed, self.sizes, self.crcs, self.methods = table
        # Members are listed again by chance or on purpose: place in the order of the archive, and who is there first.
        _, self.first, self.slots = np.unique(self.starts, return_index=True, return_inverse=True)
        for number in np.flatnonzero((table != table[:, self.first[self.slots]]).any(0)).tolist():
            other = names[self.first[self.slots[number]]]
            reason = f"{self.name(number)} is damaged: it begins where {show(other)} does; copy the archive again"
            blame(number, reason, faults)
            self.starts[number] = NOWHERE[0]
        self.file = File(path)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, number: int) -> str:
        return f"{self.path}@/{self.names[number]}"

    def ends(self, numbers: int | np.ndarray) -> int | np.ndarray:
        """Where members end in the file, or a little later."""
        lengths = self.names.ends[numbers + 1] - self.names.ends[numbers]
        return self.starts[numbers] + HEADER + lengths + SLACK + self.packed[numbers]

    def read(self, number: int, pread: Callable[[int, int], bytes] | None = None) -> bytes:
        """A member's bytes. Raises ``ValueError`` naming the member where it is damaged.

        Args:
            pread: gives (size, offset) of the archive; from the file if None.
        """
        pread = pread or self.file.pread
        start, packed = int(self.starts[number]), int(self.packed[number])
        # One read for header and data: a second one costs more than what is read too much.
        data = pread(int(self.ends(number)) - start, start)
        if len(data) < HEADER or data[:4] != b"PK\3\4":
            raise ValueError(f"{self.name(number)}: damaged: no member begins at byte {start}; copy the archive again")
        flags, crc, name_length, extra_length = HEADER_PARTS.unpack_from(data)
        if crc != self.crcs[number] and not flags & CRC_FOLLOWS:
            raise ValueError(f"{self.name(number)}: damaged: its header is not the archive's; copy the archive again")
        begin = HEADER + name_length + extra_length
        body = data[begin : begin + packed]
        if len(body) < packed:
            body = pread(packed, start + begin)
        if self.methods[number] == zipfile.ZIP_DEFLATED:
            body = self._inflate(number, body)
        if len(body) != self.sizes[number] or zlib.crc32(body) != self.crcs[number]:
            raise ValueError(f"{self.name(number)}: damaged: its CRC is not the archive's; copy the archive again")
        return body

    def _inflate(self, number: int, body: bytes) -> bytes:
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(body, int(self.sizes[number]) + 1)
        except zlib.error as err:
            raise ValueError(f"{self.name(number)}: damaged: {err}; copy the archive again") from err


def directory(path: Path) -> dict[str, zipfile.ZipInfo]:
    """A zip file's members by name. Raises ``ValueError`` naming the file where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.filename: member for member in archive.infolist()}
    except OSError as err:
        raise OSError(f"{path}: cannot be read as a zip archive: {err}") from err
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, EOFError) as err:
        raise ValueError(f"{path}: truncated or not a zip archive: {err}; copy it again") from err


def place_of(member: zipfile.ZipInfo) -> tuple[int, ...]:
    return member.header_offset, member.compress_size, member.file_size, member.CRC, member.compress_type


def unreadable(member: zipfile.ZipInfo, archive_size: int) -> str:
    """What keeps a member from being read; empty if nothing does."""
    if member.flag_bits & ENCRYPTED:
        return "is encrypted; pack the archive without a password"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {member.compress_type}; pack the archive without compression (zip -0)"
    if member.file_size > LARGEST:
        return f"claims {member.file_size} bytes, more than {LARGEST}; this is no image"
    if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
        return f"is damaged: stored as {member.compress_size} bytes, but {member.file_size} long"
    if member.header_offset < 0 or member.header_offset + HEADER + member.compress_size > archive_size:
        return f"is damaged: it would end beyond the archive's {archive_size} bytes; copy the archive again"
    return ""


class File:
    """Bytes of a file by offset. No position is shared: threads may read at once, and forks by the same descriptor.

    A pickle holds the path; the file is opened again where it is loaded.
    """

    def __init__(self, path: str | Path, flags: int = os.O_RDONLY):
        self.path = path
        self.descriptor = os.open(path, flags, 0o600)
        weakref.finalize(self, os.close, self.descriptor)

    def __reduce__(self) -> tuple:
        return File, (self.path,)

    def pread(self, size: int, offset: int) -> bytes:
        """Up to ``size`` bytes; fewer only at the end of the file."""
        try:
            data = os.pread(self.descriptor, size, offset)
            # Network file systems, and Linux beyond 2 GB, may give less than asked for.
            while 0 < len(data) < size and (more := os.pread(self.descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as err:
            raise OSError(err.errno, err.strerror, str(self.path)) from err
        return data


class SharedFile(File):
    """Memory that processes of a machine share: a file in RAM that loses its name early, and goes with its last holder.

    It is read by offset rather than mapped: that is as fast, and the page tables of a map of ImageNet would take
    0.3 GB in each process. A pickle holds the descriptor's path below ``/proc``, good for as long as the process that
    pickled it lives, as a loader's does for its spawned workers. Afterwards, loading it gives None.
    """

    @classmethod
    def create(cls, path: Path) -> "SharedFile":
        return cls(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def __reduce__(self) -> tuple:
        state = os.fstat(self.descriptor)
        return _reopen, (f"/proc/{os.getpid()}/fd/{self.descriptor}", (state.st_dev, state.st_ino))

    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def resize(self, size: int) -> None:
        os.ftruncate(self.descriptor, size)

    def pwrite(self, data: bytes | memoryview, offset: int) -> None:
        while len(data):
            written = os.pwrite(self.descriptor, data, offset)
            data, offset = data[written:], offset + written


def _reopen(path: str, identity: tuple[int, int]) -> SharedFile | None:
    try:
        file = SharedFile(path)
        state = os.fstat(file.descriptor)
        if (state.st_dev, state.st_ino) == identity:
            return file
    except OSError:
        pass
    logger.warning("a zip cache is out of this process's reach; it reads from the archive instead")
    return None


class Cache:
    """Samples of an archive in shared memory, each member once, in the archive's order. `share` fills it.

    After the members' bytes the memory has one byte for each of them: 1 if it could not be read.

    Args:
        samples: the numbers of the samples to hold.
        skip: leave out members that cannot be read. Who reads them turns to the archive then, and hears the reason.
    """

    def __init__(self, archive: Archive, samples: range, skip: bool = False):
        held = np.asarray(samples)
        held = held[archive.starts[held] != NOWHERE[0]]
        _, first, slot = np.unique(archive.slots[held], return_index=True, return_inverse=True)
        self.members = held[first]
        self.sizes = archive.sizes
        ends = np.cumsum(archive.sizes[self.members])
        self.size = int(ends[-1]) if len(ends) else 0
        self.offsets = np.full(len(archive), -1)
        self.offsets[held] = (ends - archive.sizes[self.members])[slot]
        self.archive, self.samples, self.skip = archive, samples, skip
        self.file: SharedFile | None = None

    def read(self, index: int) -> bytes | None:
        """A sample's bytes, or None if it is not held."""
        if self.file is None or self.offsets[index] < 0:
            return None
        return self.file.pread(int(self.sizes[index]), int(self.offsets[index]))

    def create(self, path: Path) -> None:
        self.file = SharedFile.create(path)

    def open(self, path: Path) -> None:
        self.file = SharedFile(path)

    def reserve(self, instead: str) -> None:
        """Raise ``OSError`` where it does not fit; ``instead`` are the cache modes that take less."""
        if self.size > (free := free_memory()):
            raise OSError(self._too_large(f"but {shared_folder()} has {free / 1e9:.2f} GB free", instead))
        self.file.resize(self.file_size())

    def file_size(self) -> int:
        return self.size + len(self.members)

    def fill(self, step: int, instead: str) -> None:
        """Copy the ``step``-th of `STEPS` parts from the archive."""
        part = np.array_split(np.arange(len(self.members)), STEPS)[step]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for _ in pool.map(lambda run: self._copy(part[run]), runs(self.archive, self.members[part])):
                    pass
        except OSError as err:
            if err.errno != errno.ENOSPC:
                raise
            raise OSError(self._too_large(f"and {shared_folder()} is full", instead)) from err
        if step + 1 == STEPS:
            logger.info(f"{self.archive.path}: cached {len(self.samples)} samples, {self.size / 1e6:.1f} MB")
        elif self.size > LARGE:
            logger.info(f"{self.archive.path}: cached {step + 1} of {STEPS} parts")

    def _copy(self, places: np.ndarray) -> None:
        """Members that lie close to each other, by one read; ``places``: theirs in `members`."""
        archive, members = self.archive, self.members[places]
        start = int(archive.starts[members[0]])
        try:
            window = memoryview(archive.file.pread(int(archive.ends(members[-1])) - start, start))
        except OSError:
            if not self.skip:
                raise
            window = memoryview(b"")  # each by itself, then

        def pread(size: int, offset: int) -> bytes | memoryview:
            inside = window[offset - start : offset - start + size]
            return inside if len(inside) == size else archive.file.pread(size, offset)

        for place, member in zip(places.tolist(), members.tolist(), strict=True):
            try:
                data = archive.read(member, pread)
            except (OSError, ValueError):
                if not self.skip:
                    raise
                self.file.pwrite(b"\1", self.size + place)
            else:
                self.file.pwrite(data, int(self.offsets[member]))

    def leave_out(self) -> None:
        """Forget the members that could not be read, in the process that filled the memory and in all others."""
        unread = np.frombuffer(self.file.pread(len(self.members), self.size), np.uint8) == 1
        if unread.any():
            self.offsets[np.isin(self.archive.slots, self.archive.slots[self.members[unread]])] = -1
            logger.warning(f"{self.archive.path}: {unread.sum()} member(s) cannot be read, and are not cached")

    def _too_large(self, why: str, instead: str) -> str:
        return (
            f"{self.archive.path}: a cache of {len(self.samples)} samples takes {self.size / 1e9:.2f} GB, {why}; use "
            f"--cache-mode {instead}, or allow more shared memory (docker run --shm-size)"
        )


def share(
    cache: Cache,
    instead: str,
    local_rank: int = 0,
    barrier: Callable[[], Any] = lambda: None,
    broadcast: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Fill a cache for all processes of this machine: local rank 0 reads, the others wait and open the same memory.

    The memory loses its name before it is filled, so that nothing stays behind, whenever a process dies. A failure
    empties it, by which the other processes see it: every one meets all barriers, and then raises.

    Raises:
        OSError, ValueError: where it does not fit, or the archive is damaged.
    """
    path = shared_folder() / broadcast(f"swin-{secrets.token_hex(8)}")
    first = local_rank == 0
    work = [
        partial(cache.create, path) if first else None,
        None if first else partial(cache.open, path),
        path.unlink if first else None,
        partial(cache.reserve, instead) if first else None,
        *(partial(cache.fill, step, instead) if first else None for step in range(STEPS)),
    ]
    fault = None
    for action in work:
        try:
            if action and not fault:
                action()
        except (OSError, ValueError) as err:
            fault = err
            if first and cache.file:
                path.unlink(missing_ok=True)
                cache.file.resize(0)
        barrier()
    if not fault and cache.file.size() != cache.file_size():
        fault = OSError(f"{cache.archive.path}: the first process of this machine could not cache it; see its error")
    if fault:
        raise fault
    cache.leave_out()


def runs(archive: Archive, members: np.ndarray) -> Iterator[slice]:
    """Slices of ``members`` that lie close to each other in the archive."""
    starts, ends, first = archive.starts[members].tolist(), archive.ends(members).tolist(), 0
    for i in range(1, len(starts) + 1):
        if i == len(starts) or starts[i] > ends[i - 1] + GAP or ends[i] > starts[first] + WINDOW:
            yield slice(first, i)
            first = i


def shared_folder() -> Path:
    """Where files lie in memory, if there is such a folder."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def free_memory() -> int:
    """Bytes that may be written to `shared_folder` before it, or the machine's memory, is full."""
    state = os.statvfs(shared_folder())
    free = [state.f_bavail * state.f_frsize]
    if os.path.exists("/proc/meminfo"):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return min(free)
