"""The official training and evaluation transforms: timm's augmentation, PIL resizing, ImageNet normalisation."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import to_2tuple
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from .decoding import as_pil
from .fast import PADDING, SMALL, crop_ratio

MAX_ASPECT = 1000  # above it, an image that is resized to cover a square can take gigabytes

# The official names; evaluation takes bilinear for any other.
EVAL_INTERPOLATION = {
    "bicubic": InterpolationMode.BICUBIC,
    "lanczos": InterpolationMode.LANCZOS,
    "hamming": InterpolationMode.HAMMING,
}


def build_transform(is_train: bool, config: Any) -> Callable:
    """What a decoder gives to normalised tensor (3, height, width) of ``IMG_SIZE`` (official ``data/build.py``)."""
    return _train_transform(config) if is_train else _eval_transform(config)


def _train_transform(config: Any) -> Callable:
    aug, size = config.AUG, to_2tuple(config.DATA.IMG_SIZE)
    try:
        transform = create_transform(
            input_size=size,
            is_training=True,
            ratio=crop_ratio(size),
            hflip=aug.HFLIP,
            color_jitter=aug.COLOR_JITTER if aug.COLOR_JITTER > 0 else None,
            auto_augment=aug.AUTO_AUGMENT if aug.AUTO_AUGMENT != "none" else None,
            re_prob=aug.REPROB,
            re_mode=aug.REMODE,
            re_count=aug.RECOUNT,
            interpolation=config.DATA.INTERPOLATION,
        )
    except (AssertionError, KeyError) as err:
        raise ValueError(
            f"AUG.AUTO_AUGMENT={aug.AUTO_AUGMENT!r} is not a policy of timm's, such as "
            "rand-m9-mstd0.5-inc1, original or none"
        ) from err
    steps = transform.transforms
    steps[0] = ResizedCrop(size, ratio=crop_ratio(size), interpolation=config.DATA.INTERPOLATION)
    if _is_small(size):
        steps[:1] = [as_pil, transforms.RandomCrop(size, padding=PADDING)]
    normalise = next(place for place, step in enumerate(steps) if isinstance(step, transforms.Normalize))
    steps[normalise - 1 : normalise + 1] = [Normalised()]
    for step in steps:
        for op in _augment_ops(step):
            if op.name.startswith("Posterize"):
                op.aug_fn = posterize
    return transform


def _eval_transform(config: Any) -> Callable:
    size, steps = to_2tuple(config.DATA.IMG_SIZE), [as_pil]
    if not _is_small(size):
        interpolation = EVAL_INTERPOLATION.get(config.DATA.INTERPOLATION, InterpolationMode.BILINEAR)
        if config.TEST.CROP:
            larger = tuple(int(256 / 224 * side) for side in size)
            square = size[0] == size[1]
            cover = transforms.Resize(larger[0], interpolation) if square else Cover(larger, interpolation)
            steps += [not_too_long, cover, transforms.CenterCrop(size)]
        else:
            steps += [transforms.Resize(size, interpolation)]
    return transforms.Compose([*steps, Normalised()])


def not_too_long(image: Image.Image) -> Image.Image:
    """The image itself. Raises ``ValueError`` for one whose shorter side cannot be resized with the aspect kept."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"{image.width}x{image.height} pixels; one side is more than {MAX_ASPECT} times the other, "
            "which is too much to resize; replace the file or delete it"
        )
    return image


def shape_alone(pixels: np.ndarray) -> Tensor:
    """An image of the size of ``pixels`` (H, W, 3) without memory: ``get_params`` takes one, but asks for no more."""
    return torch.empty(3, *pixels.shape[:2], device="meta")


class ResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop of a PIL image, also of pixels (H, W, 3), uint8, of which the crop alone becomes such one."""

    def __call__(self, image: np.ndarray | Image.Image) -> Image.Image:
        if not isinstance(image, np.ndarray):
            return super().__call__(image)
        top, left, height, width = self.get_params(shape_alone(image), self.scale, self.ratio)
        several = isinstance(self.interpolation, tuple | list)
        interpolation = random.choice(self.interpolation) if several else self.interpolation
        return F.resize(Image.fromarray(image[top : top + height, left : left + width]), self.size, interpolation)


class Normalised:
    """torchvision's ``ToTensor`` and ``Normalize`` with ImageNet's mean and deviation, bit for bit, by a table: in half
    of the time.
    """

    def __init__(self):
        levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(3, -1, -1)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        self.tables = ((levels / 255 - mean) / std).numpy()

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W), float32, of an image in RGB. Raises ``ValueError`` for one of another mode."""
        if image.mode != "RGB":
            raise ValueError(f"an image of mode {image.mode!r}, but this takes RGB alone; convert it before")
        result = np.empty((3, image.height, image.width), np.float32)
        for plane, table, part in zip(cv2.split(np.asarray(image)), self.tables, result, strict=True):
            cv2.LUT(plane, table, dst=part)
        return torch.from_numpy(result)


class Cover:
    """Resize an image, its aspect kept, to the smallest size that covers (height, width)."""

    def __init__(self, size: tuple[int, int], interpolation: InterpolationMode):
        self.size = size
        self.interpolation = interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = max(self.size[0] / image.height, self.size[1] / image.width)
        size = [
            max(round(side * scale), least) for side, least in zip((image.height, image.width), self.size, strict=True)
        ]
        return F.resize(image, size, self.interpolation)


def _is_small(size: tuple[int, int]) -> bool:
    """CIFAR-sized images are taken as they are: padded and cropped for training, not resized for evaluation."""
    return max(size) <= SMALL


def _augment_ops(step: Any) -> Iterator[Any]:
    """The elementary operations of a timm RandAugment or AutoAugment step; nothing for another step."""
    yield from getattr(step, "ops", None) or []
    for policy in getattr(step, "policy", None) or []:
        yield from policy


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel. No bits give black, as in Pillow below 13, which timm relies on."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)
