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
from .sources import Source

# offset: of the first byte; height, width: in pixels; label: the number of the class
RECORD = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i8")])
MOST_MAPS = 256  # files mapped at a time; each holds a file descriptor


class RawSource(Source):
    """The images of a folder of raw shards, numbered in the order of its index.

    Args:
        root: the folder.
        classes: the classes' names, those of the training data; the index's own, if it has any, must be the same.
        num_classes: labels must be below it; their number follows from ``classes`` if given, else from the index.

    Raises:
        OSError: where a file is missing.
        ValueError: where index, records and the sizes of the files do not fit each other.
    """

    def __init__(self, root: str | Path, classes: list[str] | None = None, num_classes: int | None = None):
        self.root = Path(root)
        index = read_index(self.root / INDEX, "raw")
        self.entries = list(index.shards.values())
        self.classes, limit = settle_names(index.path, index.classes, index.num_classes, classes, num_classes)
        parts = [read_records(self.root, entry, limit) for entry in self.entries]
        self.first = np.cumsum([0, *map(len, parts)])  # number of each shard's first image, and of all
        if not self.first[-1]:
            raise ValueError(f"{self.root}: no images in its {len(parts)} shard(s)")
        self.records = np.concatenate(parts)
        self.labels = self.records["label"].astype(np.int64)
        self.maps: OrderedDict[int, mmap.mmap] = OrderedDict()
        self.process = os.getpid()

    def name(self, index: int) -> str:
        shard, position = self._place(index)
        return f"{self.root / self.entries[shard]['name']}@/{position}"

    def read(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3), uint8: a read-only view of the file, of which only what is used is read."""
        offset, height, width, _ = self.records[index].item()
        shard, _ = self._place(index)
        return np.ndarray((height, width, 3), np.uint8, self._map(shard), offset)

    def verify(self) -> None:
        """Read everything and compare the digests. Raises ``ValueError`` naming the first file that differs."""
        for entry in self.entries:
            path = self.root / entry["name"]
            for file, key in ((path, "sha256"), (records_path(path), "records_sha256")):
                if entry.get(key) is not None and digest(file) != entry[key]:
                    raise ValueError(f"{file}: its SHA-256 is not that of {self.root / INDEX}; copy or pack it again")

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
            with open(self.root / self.entries[shard]["name"], "rb") as file:
                self.maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self.maps) > MOST_MAPS:
                self.maps.popitem(last=False)  # unmapped once no image refers to it
        return self.maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": OrderedDict()}


def records_path(path: Path) -> Path:
    """The file of records beside a ``.raw`` file."""
    return path.with_suffix(".npy")


def read_records(root: Path, entry: dict[str, Any], num_classes: int | None) -> np.ndarray:
    """The records of a shard, (images,), `RECORD`; checked against the index's entry and the size of the pixels' file.

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
    problem = _problem(records, path.stat().st_size, entry, num_classes)
    if problem:
        raise ValueError(f"{file}: {problem}; copy or pack the shard again")
    return records


def _problem(records: np.ndarray, size: int, entry: dict[str, Any], num_classes: int | None) -> str:
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
    low, high = (int(records["label"].min()), int(records["label"].max())) if len(records) else (0, 0)
    if low < 0 or (num_classes is not None and high >= num_classes):
        return f"labels from {low} to {high}, but there are {num_classes} classes, from 0"
    return ""


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
