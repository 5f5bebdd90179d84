"""The fast pipeline's part in the workers: crop, resize and flip in uint8; the device does the rest (data/device.py).

A sample draws from one generator of its own (`sample_generator`), so that it looks the same whatever the number of
workers or ranks, and wherever training is resumed; but for the noise in erased boxes, which its batch draws. Drawing
from the three global generators, as the official transforms do, would cost more than the resizing of a small
photograph.
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from .augment import Box, Draw, Plan
from .policies import Augmentation

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # RandomResizedCrop's shares of the area and aspects (width by height)
SMALL, PADDING = 32, 4  # up to this size, images are padded and cropped instead

# torch has PIL's antialiased kernels for these two, several times as fast; the others are left to PIL.
TORCH_MODES = ("bilinear", "bicubic")
PIL_MODES = {name: Image.Resampling[name.upper()] for name in ("nearest", "box", "hamming", "lanczos")}


def sample_generator(seed: int, epoch: int, number: int) -> random.Random:
    """The generator of a sample in an epoch."""
    return random.Random((seed << 80) + (epoch << 48) + number)


def crop_ratio(size: tuple[int, int]) -> tuple[float, float]:
    """The range of a crop's aspect (width by height) for a target (height, width): oblong ones get oblong crops."""
    aspect = size[1] / size[0]
    return RATIO[0] * aspect, RATIO[1] * aspect


def random_crop(height: int, width: int, ratio: tuple[float, float], rng: random.Random) -> Box:
    """RandomResizedCrop's box (top, left, height, width), drawn as by timm."""
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = rng.uniform(*SCALE) * height * width
        aspect = math.exp(rng.uniform(*logs))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    # The largest middle part of an allowed aspect. An oblong photograph may hardly have room for a crop.
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(pixels: np.ndarray, size: tuple[int, int], mode: str) -> Tensor:
    """Pixels (h, w, 3), uint8, to (3, height, width), uint8, (height, width, 3) in memory; antialiased.

    As Pillow within 2 levels, where both filter rows first. Pillow takes columns first if that is cheaper, which shows
    where overshoot is cut off in between: of 54 million values of photographs, 600 differed by 3 to 10 levels.
    """
    if mode not in TORCH_MODES:
        resized = np.array(Image.fromarray(pixels).resize(size[::-1], PIL_MODES[mode]))
        return torch.from_numpy(resized).permute(2, 0, 1)
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, size, mode=mode, antialias=True)[0]


class FastTrain:
    """Random crop, resize and flip of an image; and the draws for the rest, which the device does.

    Args:
        size: (height, width) of the result. Up to 32, images are padded by 4 and cropped, as in data/transforms.py.
        hflip: probability of a horizontal flip.
        interpolation: of the resizing: a name of Pillow's in lower case, or ``random`` (bilinear or bicubic).
        augmentation: draws what the device does.

    Raises:
        ValueError: for an unknown interpolation; when called, for a small image that the crop does not fit into.
    """

    takes_generator = True  # its own, where `images.Samples` would seed the global ones

    def __init__(self, size: tuple[int, int], hflip: float, interpolation: str, augmentation: Augmentation):
        names = (*TORCH_MODES, *PIL_MODES)
        if interpolation not in (*names, "random"):
            raise ValueError(f"DATA.INTERPOLATION={interpolation!r}; choose from {[*names, 'random']}")
        self.size, self.hflip, self.augmentation = tuple(size), hflip, augmentation
        self.modes = TORCH_MODES if interpolation == "random" else (interpolation,)
        self.ratio = crop_ratio(size)
        self.is_small = max(size) <= SMALL

    def __call__(self, image: np.ndarray | Image.Image, rng: random.Random) -> tuple[Tensor, Draw]:
        """image: pixels (h, w, 3), uint8, or a PIL image in RGB. Gives (3, height, width), uint8, and the draws."""
        pixels = np.asarray(image)
        if self.is_small:
            pixels = _padded(pixels)
        top, left, height, width = self._box(*pixels.shape[:2], rng)
        mode = self.modes[0] if len(self.modes) == 1 else rng.choice(self.modes)
        part = pixels[top : top + height, left : left + width]
        # Either copies the crop alone; flipping here is cheaper than after the resizing.
        part = cv2.flip(part, 1) if rng.random() < self.hflip else part.copy()
        if part.shape[:2] == self.size:
            return torch.from_numpy(part).permute(2, 0, 1), self.augmentation.draw(rng)
        return resize(part, self.size, mode), self.augmentation.draw(rng)

    def _box(self, height: int, width: int, rng: random.Random) -> Box:
        if not self.is_small:
            return random_crop(height, width, self.ratio, rng)
        down, across = height - self.size[0], width - self.size[1]
        if min(down, across) < 0:
            raise ValueError(
                f"an image of {height - 2 * PADDING}x{width - 2 * PADDING} pixels is too small to crop "
                f"DATA.IMG_SIZE={list(self.size)} from; images for sizes up to {SMALL} are not resized"
            )
        return rng.randint(0, down), rng.randint(0, across), *self.size


def _padded(pixels: np.ndarray) -> np.ndarray:
    height, width, channels = pixels.shape
    padded = np.zeros((height + 2 * PADDING, width + 2 * PADDING, channels), np.uint8)
    padded[PADDING:-PADDING, PADDING:-PADDING] = pixels
    return padded


class FastEval:
    """The official evaluation transform without its last step, which the device does with the same arithmetic.

    Args:
        steps: the official steps, PIL image to PIL image.
    """

    def __init__(self, steps: Sequence[Callable]):
        self.steps = list(steps)

    def __call__(self, image: np.ndarray | Image.Image) -> Tensor:
        """(3, height, width), uint8, (height, width, 3) in memory."""
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Plan]:
    """A batch of `FastTrain`'s or `FastEval`'s results with labels: images (B, 3, H, W), uint8, labels, plan if any."""
    results, labels = zip(*samples, strict=True)
    draws = None
    if isinstance(results[0], tuple):
        results, draws = zip(*results, strict=True)
    # As they lie in memory. A worker's default_collate writes straight into shared memory.
    images = default_collate([image.permute(1, 2, 0) for image in results]).permute(0, 3, 1, 2)
    labels = default_collate(list(labels))
    return (images, labels) if draws is None else (images, labels, Plan.of(draws))
