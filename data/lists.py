"""Lists of labelled paths: ImageNet-22K's JSON annotation as a source, and the checks that maps of archives share."""

import json
import os
import re
import reprlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .sources import UNKNOWN, Faults, Source, settle_faults

# Official names. Paths in them are relative to the folder they lie in.
LISTS = {"train": "ILSVRC2011fall_whole_map_train.txt", "val": "ILSVRC2011fall_whole_map_val.txt"}
MOST_CLASSES = 2**31  # a label above it is a mistake, whatever the data
SPACE = re.compile(r"[ \t\r\n]*")
NEXT = re.compile(r"[ \t\r\n]*([,\]])[ \t\r\n]*")
BREAK = re.compile(r"[\0\r\n]")
Pair = tuple[Any, Any] | ValueError  # (path, label), or why an entry is none
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 200


class ListSource(Source):
    """Images that a JSON list ``[[path, label], …]`` names (official ``data/imagenet22k_dataset.py``).

    14 million entries take about 0.7 GB, which forked workers share: there is no Python object per entry. Whether the
    images exist is seen when they are read, or by `absent`.

    Args:
        root: folder of the list and of its paths.
        split: ``train`` or ``val``.
        classes: the classes' names, those of the training data; from this list's own folders if None.
        num_classes: labels must be below it; their number follows from ``classes`` if given.
        file: the list's name in ``root``; the official one if None.
        skip: raise what is wrong with an entry when its sample is read; see `Source`. Without a comma or bracket that
            ends an entry nobody knows how many follow, so malformed JSON is raised at once.

    Raises:
        FileNotFoundError: where there is no such list.
        ValueError: naming list and entry, where it is malformed, a path leaves ``root`` or a label is out of range.
    """

    def __init__(
        self,
        root: Path,
        split: str,
        classes: Sequence[str] | None = None,
        num_classes: int | None = None,
        file: str | None = None,
        skip: bool = False,
    ):
        self.root = Path(root)
        self.file = self.root / (file or choose(LISTS, split))
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: no such list; tools/make_22k_list.py writes one for a folder")
        entries = collect(self.file, "entry", json_entries(self.file), classes, num_classes, skip)
        self.paths, self.labels, self.classes, self.faults = entries
        settle_faults(self.file, self.faults, len(self))

    def name(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}"

    def read(self, index: int) -> bytes:
        if index in self.faults:
            raise ValueError(self.faults[index])
        name = self.name(index)
        try:
            return Path(name).read_bytes()
        except FileNotFoundError as err:
            raise FileNotFoundError(f"{name}: no such file, but {self.file}, entry {index + 1}, names it") from err

    def absent(self) -> list[int]:
        """The samples whose file is missing. It looks for each file, which takes minutes for millions."""
        return [index for index in range(len(self)) if not os.path.isfile(self.name(index))]


def json_entries(file: Path) -> Iterator[Pair]:
    """The pairs of a JSON list, one by one: as Python objects all at once they would take several GB.

    Raises ``ValueError`` naming the entry where it is not a JSON list.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as err:
        raise ValueError(f"{file}: not a JSON list: byte {err.start} is not UTF-8") from err
    position = SPACE.match(text).end()
    if text[position : position + 1] != "[":
        raise ValueError(f"{file}: not a JSON list [[path, label], …]: it begins with {show(text[:20])}")
    position = SPACE.match(text, position + 1).end()
    decoder, number, more = json.JSONDecoder(), 0, text[position : position + 1] != "]"
    while more:
        number += 1
        try:
            entry, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as err:
            raise ValueError(f"{file}, entry {number}: malformed JSON: {err}") from err
        whole = isinstance(entry, list) and len(entry) == 2
        yield tuple(entry) if whole else ValueError(f"{show(entry)} is not [path, label]")
        found = NEXT.match(text, position)
        if not found:
            raise ValueError(f"{file}, entry {number}: malformed JSON: neither , nor ] follows it; truncated?")
        position, more = found.end(), found[1] == ","
    if number and position < len(text):
        raise ValueError(f"{file}: {show(text[position:])} follows the end of the list, entry {number}")


class Paths:
    """Strings in one piece of memory. A list's millions of objects would be copied, one by one, into each worker that
    counts a reference to them.
    """

    def __init__(self, encoded: Iterable[bytes] = ()):
        blob, ends = bytearray(), array("q", [0])
        for path in encoded:
            blob += path
            ends.append(len(blob))
        self.blob, self.ends = bytes(blob), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"{index} is not one of {len(self)} paths")
        return os.fsdecode(self.blob[self.ends[index] : self.ends[index + 1]])


class Entries(NamedTuple):
    """Labelled paths: labels (entries,), int64, the classes' names where they are known, and what is wrong.

    An entry with a fault has an empty path and the label `UNKNOWN`.
    """

    paths: Paths
    labels: np.ndarray
    classes: list[str] | None
    faults: Faults


def collect(
    where: Path,
    unit: str,
    pairs: Iterable[Pair],
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    skip: bool = False,
) -> Entries:
    """Check (path, label) pairs and pack them.

    Where each path lies in a folder, and each folder has one label of its own, the folders name the classes.

    Args:
        where: the file that holds the pairs; ``unit`` is what it calls one of them, counted from 1.
        classes: the classes' known names; they must agree with the folders'.
        skip: note what is wrong with a pair among the faults, instead of raising it.

    Raises:
        ValueError: naming file and unit, where a pair is not a path inside the root with a label in range.
    """
    limit = len(classes) if classes is not None else num_classes or MOST_CLASSES
    labels, folders, faults = array("q"), Folders(), {}

    def encoded() -> Iterator[bytes]:
        for number, pair in enumerate(pairs):
            try:
                path, label = checked(pair, limit)
                data = os.fsencode(path)
                folders.add(path, label)
            except ValueError as err:
                reason = f"{where}, {unit} {number + 1}: {err}"
                if not skip:
                    raise ValueError(reason) from err
                data, label, faults[number] = b"", UNKNOWN, reason
            labels.append(label)
            yield data

    paths = Paths(encoded())
    if not labels:
        raise ValueError(f"{where}: no {unit} in it")
    return Entries(paths, np.array(labels), folders.classes(where, classes), faults)


def checked(pair: Pair, limit: int) -> tuple[str, int]:
    """A pair, its label as a number. Raises ``ValueError`` where it is none, or `check` finds a fault."""
    if isinstance(pair, ValueError):
        raise pair
    path, label = pair
    label = int(label) if isinstance(label, str) and label.isdecimal() else label
    check(path, label, limit)
    return path, label


def check(path: Any, label: Any, limit: int) -> None:
    """Raise ``ValueError`` unless ``path`` stays inside the root and ``label`` is an integer of 0, …, ``limit - 1``."""
    if not isinstance(path, str) or not path or BREAK.search(path):
        raise ValueError(f"{show(path)} is not a path")
    if path.startswith("/") or (".." in path and ".." in path.split("/")):
        raise ValueError(f"the path {show(path)} leaves the data's root; paths are relative to it, without ..")
    if type(label) is not int:  # True is an int, too
        raise ValueError(f"the label {show(label)} of {show(path)} is not an integer")
    if not 0 <= label < limit:
        raise ValueError(f"the label {show(label)} of {show(path)} is out of range; labels go from 0 to {limit - 1}")


class Folders:
    """Finds out whether folders of paths, the outermost or the innermost, stand for their labels one to one."""

    def __init__(self):
        self.tables: dict[int, dict[str, int]] = {0: {}, -2: {}}  # position in the path: the label of each folder

    def add(self, path: str, label: int) -> None:
        if not self.tables:
            return
        parts = path.split("/")
        for position, labels in list(self.tables.items()):
            if len(parts) < 2 or labels.setdefault(parts[position], label) != label:
                del self.tables[position]

    def classes(self, where: Path, known: Sequence[str] | None) -> list[str] | None:
        """The folders in the order of their labels, if they name every label from 0 on; ``known`` if given.

        Raises ``ValueError`` where a folder has another label than in ``known``.
        """
        names: dict[int, str] = {}
        for labels in self.tables.values():
            if not names and len(set(labels.values())) == len(labels):
                names = {label: folder for folder, label in labels.items()}
        if known is None:
            return [names[label] for label in range(len(names))] if names and max(names) == len(names) - 1 else None
        familiar = set(known)
        for label, folder in sorted(names.items()):
            if folder in familiar and known[label] != folder:
                raise ValueError(
                    f"{where}: the folder {show(folder)} has label {label}, which is {show(known[label])} in the "
                    f"training data"
                )
        return list(known)


def choose(table: dict[str, str], split: str) -> str:
    """The name of a split's file. Raises ``ValueError`` for another split."""
    if split not in table:
        raise ValueError(f"split={split!r}; choose from {sorted(table)}")
    return table[split]


def show(value: Any) -> str:
    """A value for an error's line: on one line, printable and not too long."""
    return SHORT.repr(value)
