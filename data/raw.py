"""Raw shards: images decoded beforehand, so that reading one costs next to nothing.

A folder holds, for each shard, ``<name>.raw``: the pixels of its images one after the other without gaps, uint8, row by
row, each pixel red, green, blue; and ``<name>.npy``: an array of `RECORD`, one for each image in the same order. Its
``index.json`` is one of format raw as `shard_index.read_index` reads it, with the names, sizes and digests of the
``.raw`` files; ``records_sha256`` is the digest of the ``.npy`` file.
"""

import hashlib
import mmap
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from .shard_index import INDEX, read_index, settle_names
from .sources import UNKNOWN, Faults, Source, settle_faults

# offset: of the first byte; height, width: in pixels; label: the number of the class
RECORD = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i8")])
MOST_MAPS = 256  # files mapped at a time; each holds a file descriptor


class RawSource(Source):
    """The images of a folder of raw shards, numbered in the order of its index.

    Args:
        root: the folder.
        classes: the classes' names, those of the training data; the index's own, if it has any, must be the same.
        num_classes: labels must be below it; their number follows from ``classes`` if given, else from the index.
        skip: raise what is wrong with a shard or a record when its samples are read; see `Source`. Nothing in a file
            of pixels tells where damage ends, so that one of a wrong size is not used at all.

    Raises:
        OSError: where a file is missing.
        ValueError: where index, records and the sizes of the files do not fit each other.
    """

    def __init__(
        self,
        root: str | Path,
        classes: list[str] | None = None,
        num_classes: int | None = None,
        skip: bool = False,
    ):
        self.root = Path(root)
        index = read_index(self.root / INDEX, "raw")
        self.entries = list(index.shards.values())
        self.classes, limit = settle_names(index.path, index.classes, index.num_classes, classes, num_classes)
        self.broken: Faults = {}  # by a shard's position in the index: why none of its images can be used
        parts = [self._records(number, skip) for number in range(len(self.entries))]
        self.first = np.cumsum([0, *map(len, parts)])  # number of each shard's first image, and of all
        if not self.first[-1]:
            raise ValueError(f"{self.root}: no images in its {len(parts)} shard(s)")
        self.records = np.concatenate(parts)
        self.labels = self.records["label"].astype(np.int64)
        self.rule = "labels are not negative" if limit is None else f"there are {limit} classes, from 0"
        self._check_labels(limit, skip)
        self.maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.process = os.getpid()

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{self.root / self.entries[shard]['name']}@/{position}"

    def read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3), uint8: a read-only view of the file, of which only what is used is read."""
        offset, height, width, label = self.records[index].item()
        shard, position = self._place(index)
        if shard in self.broken:
            raise ValueError(f"{self.broken[shard]} (image {position + 1} of {self.entries[shard]['samples']})")
        if self.labels[index] == UNKNOWN:
            raise ValueError(f"{self.name(index)}: the label {label}, but {self.rule}")
        return np.ndarray((height, width, 3), np.uint8, self._map(shard), offset)

    def verify(self) -> None:
        """Read everything and compare the digests. Raises ``ValueError`` naming the first file that differs."""
        for entry in self.entries:
            path = self.root / entry["name"]
            for file, key in ((path, "sha256"), (records_path(path), "records_sha256")):
                if entry.get(key) is not None and digest(file) != entry[key]:
                    raise ValueError(f"{file}: its SHA-256 is not that of {self.root / INDEX}; copy or pack it again")

    def _records(self, shard: int, skip: bool) -> np.ndarray:
        """A shard's records; such without an image, as many as there should be, where it is broken."""
        entry = self.entries[shard]
        try:
            return read_records(self.root, entry)
        except (OSError, ValueError) as err:
            if not skip:
                raise
            self.broken[shard] = str(err)
            records = np.zeros(entry["samples"], RECORD)
            records["label"] = UNKNOWN
            return records

    def _check_labels(self, limit: int | None, skip: bool) -> None:
        """Make labels out of range `UNKNOWN`, or raise ``ValueError`` naming the first."""
        wrong = (self.labels < 0) | (False if limit is None else self.labels >= limit)
        for index in [] if skip else np.flatnonzero(wrong)[:1].tolist():
            shard, position = self._place(index)
            raise ValueError(
                f"{records_path(self.root / self.entries[shard]['name'])}: the label {self.labels[index]} of image "
                f"{position}, but {self.rule}; copy or pack the shard again"
            )
        self.labels[wrong] = UNKNOWN
        settle_faults(self.root, self.broken, len(self.entries), "shards")
        if wrong.all():
            raise ValueError(f"{self.root}: none of {len(self)} images has a label that can be used; {self.rule}")

    def _place(self, index: int) -> tuple[int, int]:
        """The number of the shard that holds an image, and the image's position there."""
        index = range(len(self))[index]  # as for a list: from the end if negative, IndexError
        shard = int(np.searchsorted(self.first, index, side="right")) - 1
        return shard, index - int(self.first[shard])

    def _map(self, shard: int) -> mmap.mmap:
        """A shard's file, mapped when this process first needs it."""
        if self.process != os.getpid():
            self.maps, self.process = OrderedDict(), os.getpid()
        if shard in self.maps:
            self.maps.move_to_end(shard)
        else:
            path, last = self.root / self.entries[shard]["name"], self.records[self.first[shard + 1] - 1]
            with open(path, "rb") as file:
                size = int(last["offset"]) + 3 * int(last["height"]) * int(last["width"])
                if os.fstat(file.fileno()).st_size != size:  # it has changed since this run began
                    raise ValueError(f"{path}: not the {size} bytes of its records any more; copy it again")
                self.maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self.maps) > MOST_MAPS:
                self.maps.popitem(last=False)  # unmapped once no image refers to it
        return self.maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": OrderedDict()}


def records_path(path: Path) -> Path:
    """The file of records beside a ``.raw`` file."""
    return path.with_suffix(".npy")


def read_records(root: Path, entry: dict[str, Any]) -> np.ndarray:
    """The records of a shard, (images,), `RECORD`; checked against the index's entry and the size of the pixels' file.
    The labels are not.

    Raises ``OSError`` for a missing file, ``ValueError`` naming the file and what is wrong.
    """
    path = root / entry["name"]
    file = records_path(path)
    if path.suffix != ".raw":
        raise ValueError(f"{path}: {INDEX} lists it, but raw shards end in .raw")
    for each in (path, file):
        if not each.is_file():
            raise FileNotFoundError(f"{each}: no such file, but {root / INDEX} needs it; copy it there")
    try:
        records = np.array(np.load(file, mmap_mode="r"))  # mapped, so that a damaged header cannot ask for memory
    except Exception as err:  # NumPy evaluates the header as Python text
        raise ValueError(
            f"{file}: not an array of records: {' '.join(str(err).split())}; copy or pack it again"
        ) from err
    problem = _problem(records, path.stat().st_size, entry)
    if problem:
        raise ValueError(f"{file}: {problem}; copy or pack the shard again")
    return records


def _problem(records: np.ndarray, size: int, entry: dict[str, Any]) -> str:
    """What is wrong with a shard's records, or nothing. ``size``: of the pixels' file in bytes."""
    if records.dtype != RECORD or records.ndim != 1:
        return f"an array {records.shape} of {records.dtype}; expected one row of {RECORD}"
    if len(records) != entry["samples"]:
        return f"expected {entry['samples']} images, found {len(records)}"
    height, width = (records[side].astype(np.int64) for side in ("height", "width"))
    if np.any((height < 1) | (width < 1) | (height >= 1 << 20) | (width >= 1 << 20)):
        return "an image without height or width"
    ends = np.cumsum(height * width * 3)
    if np.any(records["offset"] != ends - height * width * 3):
        return "an image does not begin where the one before it ends"
    expected = int(ends[-1]) if len(ends) else 0
    if size != expected or entry.get("bytes", size) not in (None, size):
        return f"{entry['name']} has {size} bytes, {expected} by the records and {entry.get('bytes')} by {INDEX}"
    return ""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
