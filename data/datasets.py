"""Image folders in ImageNet's layout, and the seeding of random transforms by sample."""

import random
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder


def load_image(path: str) -> Image.Image:
    """The image as RGB. Raises ``ValueError`` naming the file where it cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        reason = " ".join(str(err).split())
        raise ValueError(f"cannot decode {path}: {reason}; replace the file or delete it") from err


class ClassFolder(ImageFolder):
    """``root/<class>/<image>``, classes in alphabetical order (official ``ImageFolder``).

    Args:
        classes: the classes to number; those of ``root`` itself if None. A class without images is allowed then.

    Raises:
        FileNotFoundError: where the folder is missing or holds no images.
        ValueError: where it holds a class that ``classes`` lacks.
    """

    def __init__(self, root: Path, transform: Callable | None = None, classes: list[str] | None = None):
        self.known_classes = classes
        super().__init__(str(root), transform, loader=load_image, allow_empty=classes is not None)
        if not self.samples:
            raise FileNotFoundError(f"{root}: no images in it; expected {root}/<class>/<image>.JPEG")

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        found = class_names(Path(directory))
        known = self.known_classes or found
        strange = sorted(set(found) - set(known))
        if strange:
            raise ValueError(
                f"{directory}: {len(strange)} class folder(s) that the training data does not have "
                f"({', '.join(strange[:5])}); the {len(known)} known ones begin with {', '.join(known[:3])}"
            )
        return known, {name: i for i, name in enumerate(known)}


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


class SampleSeeded(Dataset):
    """Draws each sample's random transforms from (seed, epoch, index), so that they depend on nothing else.

    Whatever the number of workers or ranks, and wherever training is resumed, a sample of an epoch looks the same.
    Items are asked for by (epoch, index), as `TrainSampler` gives them.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, index = item
        with _seeded(self.seed, epoch, index):
            return self.dataset[index]


@contextmanager
def _seeded(*key: int):
    """Run with Python's, NumPy's and torch's generators seeded from ``key``, then put them back."""
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])
