"""Choosing classes: a file that lists them, and the part of a source that belongs to them."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from config import nearest

from .lists import show
from .sources import UNKNOWN, Source

COMMENT = re.compile(r"(^|\s)#.*")
NAMED = 5  # unknown classes that an error names


def read_class_list(path: str | Path) -> list[str]:
    """The classes of a text file, one a line; their order is that of their numbers.

    What follows a ``#`` at a line's beginning or after a space is a comment. Lines without a class are passed over.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming file and line, where a class comes twice; where there is none, or the file is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a class list has one class per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as err:
        raise ValueError(f"{path}: byte {err.start} is not UTF-8; a class list is a text file") from err
    first: dict[str, int] = {}  # the line of each class
    for number, line in enumerate(lines, 1):
        name = COMMENT.sub("", line).strip()
        if name in first:
            raise ValueError(f"{path}, line {number}: {show(name)} is in line {first[name]} already; list it once")
        if name:
            first[name] = number
    if not first:
        raise ValueError(f"{path}: no class in its {len(lines)} line(s); a class list has one class per line")
    return list(first)


class SelectedClasses(Source):
    """The samples of some of a source's classes, in the source's order, numbered anew by the order of ``classes``.

    Args:
        source: one whose classes have names.
        classes: the names to keep. A class without samples keeps its number.
        where: what gave the names, for errors: the list's file.

    Raises:
        ValueError: where the source does not have one of the classes, or no sample of any, or its classes no names.
    """

    def __init__(self, source: Source, classes: Sequence[str], where: str | Path = "the class list"):
        if source.classes is None:
            raise ValueError(f"{where}: {source.name(0)} and the other samples have class numbers, but no class names")
        if len(set(classes)) < len(classes):
            raise ValueError(f"{where}: a class is listed twice; list it once")
        numbers = {name: number for number, name in enumerate(source.classes)}
        if unknown := [name for name in classes if name not in numbers]:
            named = ", ".join(map(show, unknown[:NAMED]))
            raise ValueError(
                f"{where}: the data lacks {len(unknown)} of the {len(classes)} classes ({named})"
                f"{nearest(unknown[0], source.classes)}"
            )
        renumbered = np.full(len(source.classes), -1)
        renumbered[[numbers[name] for name in classes]] = np.arange(len(classes))
        unknown = source.labels == UNKNOWN  # they are kept, so that they are reported
        labels = np.where(unknown, UNKNOWN, renumbered[source.labels])
        self.source, self.classes = source, list(classes)
        self.kept = np.flatnonzero((labels >= 0) | unknown)  # their numbers in the source
        self.labels = labels[self.kept]
        if not np.any(labels >= 0):
            raise ValueError(f"{where}: none of the {len(source)} samples belongs to its {len(classes)} classes")

    def name(self, index: int) -> str:
        return self.source.name(int(self.kept[index]))

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(int(self.kept[index]))
