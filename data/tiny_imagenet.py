"""Tiny-ImageNet in its own layout: class folders with an inner ``images`` folder, validation labels in a text file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from .lists import show
from .sources import UNKNOWN, Source, settle_faults, warn_of_empty

SPLITS = ("train", "val")


class TinyImageNetSource(Source):
    """``root/train/<wnid>/images/*.JPEG``, or ``root/val/images/*.JPEG`` labelled by ``val/val_annotations.txt``.

    Classes are those of ``root/wnids.txt``, in alphabetical order as of a folder, for both splits. Validation samples
    stand in the order of their file.

    Args:
        classes: the classes' names in the order of their numbers, if not those of ``wnids.txt`` in alphabetical order.
        skip: raise what is wrong with a line of ``val_annotations.txt`` when its sample is read, see `Source`; an image
            without a line is a sample like that, too. Warn of a training class without images.

    Raises:
        FileNotFoundError: where a file or folder of the layout is missing.
        ValueError: naming file and line, or the folder, where the parts do not agree.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None = None, skip: bool = False):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}; choose from {list(SPLITS)}; the test images have no labels")
        root = Path(root)
        wnids = read_wnids(root / "wnids.txt")
        self.classes = sorted(wnids) if classes is None else list(classes)
        if strange := sorted(wnids - set(self.classes)):
            raise ValueError(f"{root / 'wnids.txt'}: {strange[0]} is not one of the {len(self.classes)} classes")
        numbers = {name: number for number, name in enumerate(self.classes)}
        read_split = training_images if split == "train" else annotated
        samples = read_split(root / split, wnids, skip)
        self.paths = [str(path) for path, _ in samples]
        self.faults = {number: str(fault) for number, (_, fault) in enumerate(samples) if isinstance(fault, ValueError)}
        self.labels = np.array([numbers.get(wnid, UNKNOWN) for _, wnid in samples], np.int64)
        settle_faults(root / split, self.faults, len(self))

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        if index in self.faults:
            raise ValueError(self.faults[index])
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


Sample = tuple[Path, str | ValueError]  # an image and its wnid, or what is wrong with it


def training_images(folder: Path, wnids: set[str], skip: bool) -> list[Sample]:
    """The images of the class folders, which must be those of ``wnids``, sorted."""
    present = {path.name for path in list_folder(folder) if path.is_dir()}
    for wnid in sorted(present - wnids if skip else wnids ^ present):
        here, there = ("has no folder here", "has it") if wnid in wnids else ("is a folder here", "lacks it")
        raise ValueError(f"{folder}: the class {wnid} {here}, but {folder.parent / 'wnids.txt'} {there}")
    samples, empty = [], []
    for wnid in sorted(wnids):
        inner = folder / wnid / "images"
        images = [] if skip and not inner.is_dir() else list_images(inner)
        if not images:
            empty.append(wnid)
        samples += [(path, wnid) for path in images]
    if empty and not (skip and samples):
        raise FileNotFoundError(f"{folder / empty[0] / 'images'}: no images in it; complete the class")
    warn_of_empty(folder, empty)
    return samples


def annotated(folder: Path, wnids: set[str], skip: bool) -> list[Sample]:
    """The images of ``val_annotations.txt``, whose lines are ``file<TAB>wnid<TAB>box``."""
    file, images = folder / "val_annotations.txt", folder / "images"
    samples, left = [], {path.name: path for path in list_images(images)}
    for number, line in enumerate(read_lines(file), 1):
        name, *rest = line.split("\t")
        wnid, fault = rest[0] if rest else "", ""
        if not rest:
            fault = f"no tab in {show(line)}; a line is file<TAB>wnid<TAB>box"
        elif wnid not in wnids:
            fault = f"{folder.parent / 'wnids.txt'} has no class {show(wnid)}"
        elif name not in left:
            fault = f"{images} has no image {show(name)}, or a line before it"
        path = left.pop(name, images)
        samples.append((path, ValueError(f"{file}, line {number}: {fault}") if fault else wnid))
    samples += [(path, ValueError(f"{file}: no line for {show(name)} in {images}")) for name, path in left.items()]
    for _, fault in samples:
        if isinstance(fault, ValueError) and not skip:
            raise fault
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
