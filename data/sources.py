"""Where images come from: numbered samples, each with a label, read as encoded bytes or as pixels.

A source knows nothing of decoding, transforms, shuffling or ranks. Samples keep their numbers for as long as the files
are the same, so that samplers and checkpoints can speak of them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS


class Source:
    """Numbered samples. A subclass sets ``labels`` and ``classes`` and says how a sample is read and called.

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
        classes: the classes to number; those of ``root`` itself if None. A class without images is allowed then.

    Raises:
        FileNotFoundError: where the folder is missing or holds no images.
        ValueError: where it holds a class that ``classes`` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None = None):
        found = class_names(root)
        self.classes = known_classes(root, found, classes)
        numbers = {name: i for i, name in enumerate(self.classes)}
        samples = ImageFolder.make_dataset(
            str(root), numbers, extensions=IMG_EXTENSIONS, allow_empty=classes is not None
        )
        if not samples:
            raise FileNotFoundError(f"{root}: no images in it; expected {root}/<class>/<image>.JPEG")
        self.paths = [path for path, _ in samples]
        self.labels = np.array([label for _, label in samples])

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


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
