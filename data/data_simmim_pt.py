"""Images and random masks for SimMIM pre-training (official ``data/data_simmim_pt.py``).

Labels are passed on where there are any, and are 0 where there are none; nothing looks at them.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from yacs.config import CfgNode

from .build import Stored, has_split, open_split, pick_decoder, resolve_pipeline, train_loader
from .decoding import Encoded, as_pil, decode_pil
from .device import DeviceLoader
from .fast import crop_ratio, resize
from .images import stack
from .shards import ShardSet
from .transforms import Cover, Normalised, not_too_long, shape_alone

SCALE = (0.67, 1.0)  # shares of the area that random crops have
logger = logging.getLogger(__name__)


class MaskGenerator:
    """Random masks: patches of the image in squares, of which a share is hidden (Xie et al., section 3.2).

    Args:
        input_size: pixels along each side of an image, or (height, width).
        mask_patch_size: pixels along a side of a square, which is hidden as a whole or not at all.
        model_patch_size: pixels along a side of the model's patches.
        mask_ratio: share of the squares that are hidden, rounded up to whole ones.
        model_type: whose patch size it is, for errors: ``MODEL.TYPE`` in capitals.

    Raises ``ValueError`` where squares do not fill the image, or patches the squares, or for a share outside (0, 1).
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 192,
        mask_patch_size: int = 32,
        model_patch_size: int = 4,
        mask_ratio: float = 0.6,
        model_type: str = "<TYPE>",
    ):
        size = to_2tuple(input_size)
        _check_patches(size, mask_patch_size, model_patch_size, f"MODEL.{model_type}.PATCH_SIZE")
        if not 0 < mask_ratio < 1:
            raise ValueError(f"DATA.MASK_RATIO={mask_ratio}; it must be above 0 and below 1")
        self.input_size, self.mask_patch_size = input_size, mask_patch_size
        self.model_patch_size, self.mask_ratio = model_patch_size, mask_ratio
        self.rand_size = (size[0] // mask_patch_size, size[1] // mask_patch_size)  # rows and columns of squares
        self.scale = mask_patch_size // model_patch_size
        self.token_count = self.rand_size[0] * self.rand_size[1]
        self.mask_count = math.ceil(self.token_count * mask_ratio)

    def __call__(self, generator: np.random.RandomState | np.random.Generator | None = None) -> np.ndarray:
        """(height, width) in patches, int64, 1 where hidden; drawn from NumPy's global generator if none is given."""
        order = (np.random if generator is None else generator).permutation(self.token_count)
        mask = np.zeros(self.token_count, dtype=np.int64)
        mask[order[: self.mask_count]] = 1
        return mask.reshape(self.rand_size).repeat(self.scale, 0).repeat(self.scale, 1)


def _check_patches(size: tuple[int, int], mask_patch: int, patch: Any, key: str) -> None:
    if not isinstance(patch, int):
        raise ValueError(f"{key}={patch}: SimMIM's patches are square; give one number")
    shown = size[0] if size[0] == size[1] else list(size)
    allowed = [side for side in range(patch, min(size) + 1, patch) if size[0] % side == size[1] % side == 0]
    if not allowed:
        raise ValueError(f"DATA.IMG_SIZE={shown} with {key}={patch}: sides must be multiples of the patch size")
    if mask_patch not in allowed:
        raise ValueError(
            f"DATA.MASK_PATCH_SIZE={mask_patch} must be a multiple of {key}={patch} and divide DATA.IMG_SIZE={shown}; "
            f"choose from {allowed}"
        )


def build_mask_generator(config: Any) -> MaskGenerator:
    kind = config.MODEL.TYPE.upper()
    section = config.MODEL.get(kind)
    if not isinstance(section, CfgNode) or "PATCH_SIZE" not in section:
        raise ValueError(f"MODEL.TYPE={config.MODEL.TYPE!r} has no MODEL.{kind}.PATCH_SIZE; choose swin or swinv2")
    data = config.DATA
    return MaskGenerator(data.IMG_SIZE, data.MASK_PATCH_SIZE, section.PATCH_SIZE, data.MASK_RATIO, kind)


class SimMIMTransform:
    """PIL image to a random crop (3, height, width), float32, normalised, and a random mask; it can be pickled.

    Crops are resized bilinearly, torchvision's default, as officially: ``DATA.INTERPOLATION`` does not count here.
    """

    def __init__(self, config: Any):
        size = to_2tuple(config.DATA.IMG_SIZE)
        self.crop = transforms.RandomResizedCrop(size, scale=SCALE, ratio=crop_ratio(size))
        self.flip = transforms.RandomHorizontalFlip(config.AUG.HFLIP)
        self.transform_img = transforms.Compose([self.crop, self.flip, Normalised()])
        self.mask_generator = build_mask_generator(config)

    def __call__(self, img: Image.Image) -> tuple[Tensor, np.ndarray]:
        image = as_pil(img)
        image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
        return self.transform_img(image), self.mask_generator()


class FastSimMIMTransform(SimMIMTransform):
    """The same draws for the device pipeline: the crop stays uint8, within 2 levels of the official one."""

    def __call__(self, img: np.ndarray | Image.Image) -> tuple[Tensor, np.ndarray]:
        """img: pixels (h, w, 3), uint8, or a PIL image in RGB. Gives (3, height, width), uint8, and the mask."""
        pixels = np.asarray(img)
        top, left, height, width = self.crop.get_params(shape_alone(pixels), self.crop.scale, self.crop.ratio)
        part = pixels[top : top + height, left : left + width]
        # Either copies the crop alone.
        part = cv2.flip(part, 1) if torch.rand(1) < self.flip.p else part.copy()
        return resize(part, self.crop.size, "bilinear"), self.mask_generator()


def collate_fn(batch: Sequence[tuple[tuple[Tensor, np.ndarray], int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, height, width), masks (B, H, W), int64, and labels (B,), of ((image, mask), label)."""
    images, labels = stack([(image, label) for (image, _), label in batch])
    return images, default_collate([mask for (_, mask), _ in batch]), labels


def build_loader_simmim(config: Any) -> DeviceLoader:
    """Training batches (images, masks, labels) on this process's device; images normalised.

    The images are those of supervised training. From folders, they are all those below ``DATA.DATA_PATH``/train, or
    below ``DATA.DATA_PATH`` where there is no such folder; see `sources.ImageTree`.

    Raises:
        FileNotFoundError, ValueError: for missing or unreadable data, or masks that do not fit image and model.
    """
    pipeline = resolve_pipeline(config, augments=False)
    transform = (FastSimMIMTransform if pipeline == "device" else SimMIMTransform)(config)
    samples = open_split(config, "train", labelled=False)
    logger.info(f"pre-training on {len(samples)} images")
    return train_loader(samples, config, (pick_decoder(config, pipeline, is_train=True), transform), collate_fn)


def steady_transform(config: Any) -> Callable[[Image.Image], Tensor]:
    """PIL image, RGB, to its middle (3, height, width) of ``IMG_SIZE``, float32, normalised, without random draws."""
    size = to_2tuple(config.DATA.IMG_SIZE)
    return transforms.Compose(
        [
            not_too_long,
            Cover(size, InterpolationMode.BILINEAR),
            transforms.CenterCrop(size),
            Normalised(),
        ]
    )


def reconstruction_samples(config: Any, count: int) -> tuple[Tensor, Tensor]:
    """Always the same images and masks, for watching what becomes of them; on every rank, and drawn from no generator.

    They are spread evenly over the validation images, or over those for training where there are no others, resized to
    cover ``IMG_SIZE`` and cropped in the middle. With ``DATA.ON_ERROR`` skip, the next usable image takes the place of
    one that is not.

    Returns:
        Images (N, 3, height, width), float32, normalised, and masks (N, H, W), int64, on the CPU. N is ``count``, or
        the number of usable images where there are fewer.

    Raises:
        FileNotFoundError, ValueError: as `build_loader_simmim`, and where no image is usable.
    """
    masks, transform = build_mask_generator(config), steady_transform(config)
    samples = open_split(_without_cache(config), "val" if has_split(config, "val") else "train", labelled=False)

    def load(number: int) -> Tensor:
        name, data = fetch(samples, number)
        image = decode_pil(data, name)
        try:
            return transform(image)
        except ValueError as err:
            raise ValueError(f"{name}: {err}") from err

    images = load_usable(load, spread(samples, count), len(samples), config.DATA.ON_ERROR == "skip")
    generator = np.random.RandomState(0)  # its own, so that more images leave the masks of the first ones as they are
    return torch.stack(images), torch.from_numpy(np.stack([masks(generator) for _ in images]))


def _without_cache(config: Any) -> Any:
    config = config.clone()
    config.defrost()
    config.DATA.CACHE_MODE = "no"
    config.freeze()
    return config


def spread(samples: Stored, count: int) -> list[int]:
    """Numbers of at most ``count`` samples, evenly spaced; in shards, the first ones of evenly spaced shards.

    A shard is read from its beginning, so that a sample in its middle would cost half of it.
    """
    count = min(count, len(samples))
    if not isinstance(samples, ShardSet):
        return [place * len(samples) // count for place in range(count)]
    filled = np.flatnonzero(samples.counts)
    shards = filled[np.arange(count) * len(filled) // count]
    return (samples.first[shards] + np.arange(count) - np.searchsorted(shards, shards)).tolist()


def fetch(samples: Stored, number: int) -> tuple[str, Encoded]:
    """The name and the data of one sample. Raises ``OSError`` or ``ValueError`` naming it."""
    if not isinstance(samples, ShardSet):
        return samples.name(number), samples.read(number)
    shard = int(np.searchsorted(samples.first, number, side="right")) - 1
    with closing(samples.read(shard, [number - int(samples.first[shard])])) as found:
        _, name, data, _ = next(found)
    if isinstance(data, ValueError):
        raise data
    return name, data


def load_usable(load: Callable[[int], Tensor], numbers: Iterable[int], total: int, skip: bool) -> list[Tensor]:
    """What ``load`` gives for each of ``numbers``, or, with ``skip``, for the next of ``total`` that is still free."""
    images, tried, failure = [], set(), None
    for first in numbers:
        for number in ((first + step) % total for step in range(total)):
            if number in tried:
                continue
            tried.add(number)
            try:
                images.append(load(number))
                break
            except (OSError, ValueError) as err:
                if not skip:
                    raise
                failure = failure or err
    if not images:
        raise ValueError(f"none of the {total} images can be used; the first: {failure}") from failure
    return images
