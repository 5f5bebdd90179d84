"""Where images come from: numbered samples, each with a label, read as encoded bytes or as pixels.

A source knows nothing of decoding, transforms, shuffling or ranks. Samples keep their numbers for as long as the files
are the same, so that samplers and checkpoints can speak of them.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

UNKNOWN = -1  # the label of a sample that cannot be used, where nothing tells its class
logger = logging.getLogger(__name__)

Faults = dict[int, str]  # by a sample's number: what keeps it from being read, naming file, line or member


class Source:
    """Numbered samples. A subclass sets ``labels`` and ``classes`` and says how a sample is read and called.

    Some take ``skip`` (``DATA.ON_ERROR skip``): what is found to be wrong with a sample when the source is made is not
    raised then, but whenever that sample is read. It keeps its number, so that the length does not depend on damage.

    Attributes:
        labels: (samples,), int64, the class of each sample.
        classes: the classes' names in the order of their numbers, or None where samples have numbers alone.
    """

    labels: np.ndarray
    classes: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What errors and reports call a sample: a path, or archive and member."""
        raise NotImplementedError

    def read(self, index: int) -> bytes | np.ndarray:
        """The file's bytes, or pixels (H, W, 3), uint8, where they are stored so.

        Raises ``OSError`` or ``ValueError`` where it cannot be read; the message names the sample.
        """
        raise NotImplementedError


class FolderSource(Source):
    """``root/<class>/<image>``, classes in alphabetical order, as torchvision's ``ImageFolder``.

    Args:
        classes: the classes to number, each with images or without; those of ``root`` itself if None.
        skip: warn of a class of ``root`` itself without images, which keeps its number, instead of raising.

    Raises:
        FileNotFoundError: where the folder is missing or holds no images, or a class of its own has none.
        ValueError: where it holds a class that ``classes`` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None, skip: bool = False):
        found = class_names(root)
        self.classes = known_classes(root, found, classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        samples = ImageFolder.make_dataset(
            str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=skip or classes is not None
        )
        if not samples:
            raise FileNotFoundError(f"{root}: no images in it; expected {root}/<class>/<image>.JPEG")
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples])
        if classes is None:
            warn_of_empty(root, [found[number] for number in np.setdiff1d(np.arange(len(found)), self.labels)])

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:  # a Path would take a tenth of the time to read it
            return file.read()


class ImageTree(FolderSource):
    """All images below ``root``, for training that needs no labels; hidden files and folders are left out.

    Where every image lies in a folder, these folders are the classes, as for `FolderSource`, but may be empty. Where
    images lie in ``root`` itself, they and all others have the label 0, and no class has a name.

    Raises ``FileNotFoundError`` where the folder is missing or holds no images.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; --data-path takes a folder with images, or with train/")
        with os.scandir(root) as listed:  # unlike Path.iterdir, it knows of a million files which are folders
            entries = [(entry.name, entry.is_dir()) for entry in listed if not entry.name.startswith(".")]
        folders = sorted(name for name, is_folder in entries if is_folder)
        has_images = any(name.lower().endswith(IMG_EXTENSIONS) for name, is_folder in entries if not is_folder)
        is_flat = has_images or not folders
        self.classes = None if is_flat else folders
        numbers = {"": 0} if is_flat else {name: i for i, name in enumerate(folders)}
        samples = ImageFolder.make_dataset(str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
        hidden, start = f"{os.sep}.", len(str(root))
        samples = [(path, label) for path, label in samples if hidden not in path[start:]]
        if not samples:
            raise FileNotFoundError(f"{root}: no images in it, nor in its folders; they end in .jpg, .png and the like")
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples])


def class_names(root: Path) -> list[str]:
    """The names of ``root``'s class folders, sorted. Raises ``FileNotFoundError`` where there are none."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such folder; --data-path takes a folder with train/<class>/<image> and val/<class>/<image>"
        )
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    if not names:
        raise FileNotFoundError(f"{root}: no class folders in it; expected {root}/<class>/<image>.JPEG")
    return names


def known_classes(where: Path | str, found: Sequence[str], known: Sequence[str] | None) -> list[str]:
    """``known``, or ``found`` if None. Raises ``ValueError`` where a class was found that is not known."""
    if known is None:
        return list(found)
    strange = sorted(set(found) - set(known))
    if strange:
        raise ValueError(
            f"{where}: {len(strange)} class(es) that the training data does not have ({', '.join(strange[:5])}); the "
            f"{len(known)} known ones begin with {', '.join(known[:3])}"
        )
    return list(known)


def warn_of_empty(root: Path, classes: Sequence[str]) -> None:
    """Log the classes of a training set that have no images."""
    if classes:
        logger.warning(
            f"{root}: no images in the folder(s) of {len(classes)} class(es), which keep their numbers: "
            f"{', '.join(classes)}"
        )


def settle_faults(where: Path | str, faults: Faults, count: int, what: str = "samples") -> None:
    """Log how many of ``count`` samples cannot be used. Raises ``ValueError`` where none can."""
    if not faults:
        return
    first = faults[min(faults)]
    if len(faults) == count:
        raise ValueError(f"{where}: none of {count} {what} can be used; the first: {first}")
    logger.warning(f"{where}: {len(faults)} of {count} {what} cannot be used and are skipped; the first: {first}")
