"""Tiny-ImageNet in its own layout: class folders with an inner ``images`` folder, validation labels in a text file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from .lists import show
from .sources import Source

SPLITS = ("train", "val")


class TinyImageNetSource(Source):
    """``root/train/<wnid>/images/*.JPEG``, or ``root/val/images/*.JPEG`` labelled by ``val/val_annotations.txt``.

    Classes are those of ``root/wnids.txt``, in alphabetical order as of a folder, for both splits. Validation samples
    stand in the order of their file.

    Args:
        classes: the classes' names in the order of their numbers, if not those of ``wnids.txt`` in alphabetical order.

    Raises:
        FileNotFoundError: where a file or folder of the layout is missing.
        ValueError: naming file and line, or the folder, where the parts do not agree.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None = None):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}; choose from {list(SPLITS)}; the test images have no labels")
        root = Path(root)
        wnids = read_wnids(root / "wnids.txt")
        self.classes = sorted(wnids) if classes is None else list(classes)
        if strange := sorted(wnids - set(self.classes)):
            raise ValueError(f"{root / 'wnids.txt'}: {strange[0]} is not one of the {len(self.classes)} classes")
        numbers = {name: number for number, name in enumerate(self.classes)}
        samples = training_images(root / "train", wnids) if split == "train" else annotated(root / "val", wnids)
        self.paths = [str(path) for path, _ in samples]
        self.labels = np.array([numbers[wnid] for _, wnid in samples], np.int64)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


def read_wnids(file: Path) -> set[str]:
    """The classes of ``wnids.txt``, one a line."""
    wnids = set()
    for number, line in enumerate(read_lines(file), 1):
        wnid = line.strip()
        if not wnid or "/" in wnid or len(wnid.split()) > 1 or wnid in wnids:
            fault = "is there already" if wnid in wnids else "is not the name of a class"
            raise ValueError(f"{file}, line {number}: {show(line)} {fault}")
        wnids.add(wnid)
    return wnids


def training_images(folder: Path, wnids: set[str]) -> list[tuple[Path, str]]:
    """(image, wnid) of the class folders, which must be those of ``wnids``, sorted."""
    present = {path.name for path in list_folder(folder) if path.is_dir()}
    for wnid in sorted(wnids ^ present):
        here, there = ("has no folder here", "has it") if wnid in wnids else ("is a folder here", "lacks it")
        raise ValueError(f"{folder}: the class {wnid} {here}, but {folder.parent / 'wnids.txt'} {there}")
    samples = []
    for wnid in sorted(wnids):
        images = list_images(folder / wnid / "images")
        if not images:
            raise FileNotFoundError(f"{folder / wnid / 'images'}: no images in it; complete the class")
        samples += [(path, wnid) for path in images]
    return samples


def annotated(folder: Path, wnids: set[str]) -> list[tuple[Path, str]]:
    """(image, wnid) of ``val_annotations.txt``, whose lines are ``file<TAB>wnid<TAB>box``."""
    file = folder / "val_annotations.txt"
    samples, left = [], {path.name: path for path in list_images(folder / "images")}
    for number, line in enumerate(read_lines(file), 1):
        name, *rest = line.split("\t")
        if not rest:
            raise ValueError(f"{file}, line {number}: no tab in {show(line)}; a line is file<TAB>wnid<TAB>box")
        if rest[0] not in wnids:
            raise ValueError(f"{file}, line {number}: {folder.parent / 'wnids.txt'} has no class {show(rest[0])}")
        if name not in left:
            raise ValueError(
                f"{file}, line {number}: {folder / 'images'} has no image {show(name)}, or a line before it"
            )
        samples.append((left.pop(name), rest[0]))
    if left:
        raise ValueError(f"{file}: no line for {show(min(left))}, nor for {len(left) - 1} more in {folder / 'images'}")
    return samples


def read_lines(file: Path) -> list[str]:
    """The lines of a text file. Raises ``FileNotFoundError`` or ``ValueError`` where it is missing or empty."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file}: no such file; Tiny-ImageNet has wnids.txt, train/<wnid>/images and val/val_annotations.txt"
        )
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    if not lines:
        raise ValueError(f"{file}: empty; extract the archive again")
    return lines


def list_images(folder: Path) -> list[Path]:
    return [path for path in list_folder(folder) if path.suffix.lower() in IMG_EXTENSIONS]


def list_folder(folder: Path) -> list[Path]:
    """What is in a folder, sorted. Raises ``FileNotFoundError`` where it is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; extract the archive again")
    return sorted(folder.iterdir())
