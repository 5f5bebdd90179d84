"""Augmentation of batches on the device, by what workers drew (`policies`).

Workers group their draws by operation (`Plan.of`), so that the device runs each operation once for all of its samples
and is never asked for a value. Operations take and give uint8 and round as Pillow does: colours are its exact values,
geometry within a level (``nearest``: but for few pixels). A device needs float64. Erasing follows normalisation.
B batch, n samples of an operation, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)  # timm's, around what was rotated or moved

Op = tuple[str, tuple[float, ...]]  # a key of OPS and its arguments
Box = tuple[int, int, int, int]  # top, left, height, width


class Draw(NamedTuple):
    """What a sample's generator drew for the device."""

    ops: Sequence[Op] = ()
    boxes: Sequence[Box] = ()
    noise: int = 0  # seed of the batch's noise, if the sample is its batch's first


@dataclass
class Plan:
    """A batch's draws, grouped so that the device needs no decision.

    Attributes:
        steps: (key of OPS, start, stop): ranges of ``samples`` and ``arguments``. Operations that come first for their
            samples come first; no sample occurs twice in one step.
        samples: (N,), int64.
        arguments: (N, 6), float64, filled up with zeros.
        rounds: (start, stop): ranges of ``boxes``, each with at most one box per sample.
        boxes: (M, 5), int64: sample, top, left, height, width.
        noise: seed.
    """

    steps: list[tuple[str, int, int]]
    samples: Tensor
    arguments: Tensor
    rounds: list[tuple[int, int]]
    boxes: Tensor
    noise: int

    @classmethod
    def of(cls, draws: Sequence[Draw]) -> "Plan":
        groups: dict[tuple[int, str], list] = {}
        layers: dict[int, list] = {}
        for sample, draw in enumerate(draws):
            for place, (op, arguments) in enumerate(draw.ops):
                groups.setdefault((place, op), []).append((sample, arguments))
            for place, box in enumerate(draw.boxes):
                layers.setdefault(place, []).append((sample, *box))
        steps, samples, rows = [], [], []
        for place, op in sorted(groups):
            group = groups[place, op]
            steps.append((op, len(samples), len(samples) + len(group)))
            samples += [sample for sample, _ in group]
            rows += [(*arguments, *(0.0,) * (6 - len(arguments))) for _, arguments in group]
        rounds, boxes = [], []
        for place in sorted(layers):
            rounds.append((len(boxes), len(boxes) + len(layers[place])))
            boxes += layers[place]
        return cls(
            steps,
            torch.from_numpy(np.array(samples, np.int64)),
            torch.from_numpy(np.array(rows, np.float64).reshape(-1, 6)),
            rounds,
            torch.from_numpy(np.array(boxes, np.int64).reshape(-1, 5)),
            draws[0].noise,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Plan":
        return replace(self, samples=change(self.samples), arguments=change(self.arguments), boxes=change(self.boxes))

    def pin_memory(self) -> "Plan":
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Plan":
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))


# --- Operations on the device: images (n, 3, H, W), uint8, and arguments (n, 6) to such images ----------------------


def _levels(like: Tensor) -> Tensor:
    return torch.arange(256, device=like.device)


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """table (n, 1 or 3, 256), uint8: the new value of each value in each channel."""
    return table.expand(-1, 3, -1).gather(2, images.flatten(2).long()).view_as(images)


def _blend(start: Tensor, end: Tensor, factor: Tensor) -> Tensor:
    """start + factor (end - start), in float32 and cut off to uint8, as Pillow blends."""
    return ((end - start) * factor.float() + start).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """Pillow's luma, (n, H, W), int32."""
    red, green, blue = images.int().unbind(1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def invert(images: Tensor, arguments: Tensor) -> Tensor:
    return 255 - images


def posterize(images: Tensor, arguments: Tensor) -> Tensor:
    """Keep the highest bits, 0 (black) to 8 (all), of each channel."""
    lost = 8 - arguments[:, 0].int().clamp(0, 8)
    return images & ((255 >> lost) << lost).to(torch.uint8)[:, None, None, None]


def solarize(images: Tensor, arguments: Tensor) -> Tensor:
    """Invert values from a threshold on."""
    table = _levels(images)
    table = torch.where(table < arguments[:, :1], table, 255 - table)
    return _look_up(images, table.to(torch.uint8)[:, None])


def solarize_add(images: Tensor, arguments: Tensor) -> Tensor:
    """Add to values below 128."""
    table = _levels(images)
    table = torch.where(table < 128, (table + arguments[:, :1].long()).clamp(max=255), table)
    return _look_up(images, table.to(torch.uint8)[:, None])


def auto_contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Stretch each channel to 0 to 255. In float64, as Pillow, since values are cut off."""
    values = images.flatten(2)
    low, high = (bound.double()[..., None] for bound in (values.amin(2), values.amax(2)))
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / tensor multiplies by a rounded reciprocal
    table = (_levels(images) * scale + -low * scale).clamp_(0, 255)
    return _look_up(images, torch.where(high > low, table, _levels(images)).to(torch.uint8))


def equalize(images: Tensor, arguments: Tensor) -> Tensor:
    """Spread each channel's values evenly by their histogram."""
    count = _histogram(images)
    levels = _levels(images)
    last = torch.where(count > 0, levels, 0).amax(2, keepdim=True)
    step = (count.sum(2, keepdim=True) - count.gather(2, last)) // 255
    table = (step // 2 + count.cumsum(2) - count) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, table.clamp(max=255), levels).to(torch.uint8))


def _histogram(images: Tensor) -> Tensor:
    """(n, 3, 256), int64."""
    rows = images.shape[0] * 3
    places = images.flatten(2).flatten(0, 1).long() + 256 * torch.arange(rows, device=images.device)[:, None]
    count = torch.zeros(rows * 256, dtype=torch.long, device=images.device)
    one = torch.ones(1, dtype=torch.long, device=images.device).expand(places.numel())
    return count.scatter_add_(0, places.flatten(), one).view(-1, 3, 256)


def brightness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend black with the image."""
    table = _levels(images).float()
    return _look_up(images, _blend(torch.zeros_like(table), table, arguments[:, :1])[:, None])


def contrast(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend the mean grey with the image."""
    grey = _grey(images).flatten(1)
    pixels = grey.shape[1]
    mean = (2 * grey.sum(1, keepdim=True) + pixels) // (2 * pixels)  # rounded
    return _look_up(images, _blend(mean.float(), _levels(images).float(), arguments[:, :1])[:, None])


def color(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend the grey image with the image."""
    return _blend(_grey(images)[:, None].float(), images.float(), arguments[:, 0, None, None, None])


def sharpness(images: Tensor, arguments: Tensor) -> Tensor:
    """Blend a smoothed image, whose border stays, with the image."""
    pixels = images.int()
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = pixels.clone()
    smooth[:, :, 1:-1, 1:-1] = (2 * sums + 13) // 26  # sums / 13, rounded
    return _blend(smooth.float(), images.float(), arguments[:, 0, None, None, None])


def _nearest(values: Sequence[Tensor], part: Tensor) -> Tensor:
    return torch.where(part < 0.5, *values)


def _linear(values: Sequence[Tensor], part: Tensor) -> Tensor:
    first, second = values
    return first + part * (second - first)


def _cubic(values: Sequence[Tensor], part: Tensor) -> Tensor:
    """Pillow's bicubic transform: Keys' kernel with a = -1 (its resizing has -1/2). By differences: even areas stay."""
    v1, v2, v3, v4 = values
    first, last = v1 - v2, v3 - v4
    slope = (first + last).mul_(-part).add_(first, alpha=2).add_(last)
    return slope.mul_(part).add_(v3 - v1).mul_(part).add_(v2)


def affine(images: Tensor, arguments: Tensor, interpolate: Callable, taps: Sequence[int]) -> Tensor:
    """Each output pixel from where its matrix points to, `FILL` where that is outside; no antialiasing, as Pillow.

    Places are float64, so that pixels on the border fall on Pillow's side of it.
    """
    height, width = images.shape[2:]
    across = torch.arange(width, device=images.device) + 0.5
    down = (torch.arange(height, device=images.device) + 0.5)[:, None]
    a, b, c, d, e, f = arguments[:, :, None, None].unbind(1)
    x, y = a * across + b * down + c, d * across + e * down + f  # n, H, W
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    right_part, lower_part = (x - 0.5 - left).float()[:, None], (y - 0.5 - top).float()[:, None]
    columns = [(left.long() + tap).clamp_(0, width - 1) for tap in taps]
    rows = [(top.long() + tap).clamp_(0, height - 1) * width for tap in taps]
    shifts = 8 * torch.arange(3, dtype=torch.int32, device=images.device)[:, None, None]
    pixels = (
        (images.int() << shifts).sum(1, dtype=torch.int32).flatten(1)
    )  # a pixel in a number: a third of the gathers

    def line(row: Tensor) -> Tensor:
        values = [pixels.gather(1, (row + column).flatten(1)).view_as(row)[:, None] for column in columns]
        return interpolate([(value >> shifts & 255).float() for value in values], right_part)

    moved = interpolate([line(row) for row in rows], lower_part).clamp_(0, 255)
    planes = zip(moved.to(torch.uint8).unbind(1), FILL, strict=True)
    return torch.stack([torch.where(inside, plane, fill) for plane, fill in planes], 1)


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "invert": invert,
    "posterize": posterize,
    "solarize": solarize,
    "solarize_add": solarize_add,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "brightness": brightness,
    "contrast": contrast,
    "color": color,
    "sharpness": sharpness,
    "affine_nearest": partial(affine, interpolate=_nearest, taps=(0, 1)),
    "affine_bilinear": partial(affine, interpolate=_linear, taps=(0, 1)),
    "affine_bicubic": partial(affine, interpolate=_cubic, taps=(-1, 0, 1, 2)),
}

# --- Batches on the device ------------------------------------------------------------------------------------------


def augment(images: Tensor, plan: Plan) -> Tensor:
    """Apply the plan's operations to images (B, 3, H, W), uint8, in place."""
    for op, start, stop in plan.steps:
        samples = plan.samples[start:stop]
        images.index_copy_(0, samples, OPS[op](images.index_select(0, samples), plan.arguments[start:stop]))
    return images


def erase(images: Tensor, plan: Plan, mode: str) -> Tensor:
    """Erase the plan's boxes in normalised images (B, 3, H, W), in place.

    Args:
        mode: what fills them: ``pixel``, normal noise for each value; ``rand``, for each box and channel; ``const``, 0.
    """
    if not plan.rounds:
        return images
    channels, height, width = images.shape[1:]
    shape = {"pixel": (channels, height, width), "rand": (channels, 1, 1)}.get(mode)
    generator = torch.Generator(images.device).manual_seed(plan.noise) if shape else None
    across, down = torch.arange(width, device=images.device), torch.arange(height, device=images.device)[:, None]
    for start, stop in plan.rounds:
        samples, top, left, h, w = (column[:, None, None] for column in plan.boxes[start:stop].unbind(1))
        samples = samples.flatten()
        inside = (down >= top) & (down < top + h) & (across >= left) & (across < left + w)
        fill = 0.0
        if shape:
            fill = torch.randn((stop - start, *shape), generator=generator, device=images.device)
        images.index_copy_(0, samples, torch.where(inside[:, None], fill, images.index_select(0, samples)))
    return images


class Finish:
    """uint8 batches to normalised float32 ones: augment, normalise (as ``ToTensor`` and ``Normalize``), erase.

    Args:
        erase_mode: ``pixel``, ``rand`` or ``const``, as `erase`.
    """

    def __init__(self, device: torch.device, erase_mode: str = "pixel"):
        if erase_mode not in ("pixel", "rand", "const"):
            raise ValueError(f"AUG.REMODE={erase_mode!r}; choose from ['pixel', 'rand', 'const']")
        self.erase_mode = erase_mode
        mean_std = torch.tensor([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD])[..., None, None]
        self.mean, self.std = mean_std.to(device).unbind()

    def __call__(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """images (B, 3, H, W), uint8, in any memory order, on the device; they may be changed."""
        images = images.contiguous()
        if plan is not None:
            images = augment(images, plan)
        images = images.float().div_(255).sub_(self.mean).div_(self.std)
        return images if plan is None else erase(images, plan, self.erase_mode)
