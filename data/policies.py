"""What workers draw for a sample: timm's RandAugment and random erasing, torchvision's colour jitter.

Nothing is applied here: `augment` does that on the device, in batches. Draws come from one generator per sample, in
timm's order.
"""

import math
import random
from collections.abc import Callable

from timm.data.auto_augment import rand_augment_transform

from .augment import OPS, Box, Draw, Op


def _signed(level: float, rng: random.Random) -> float:
    return -level if rng.random() > 0.5 else level


# timm's operations: key of OPS (or of _MATRICES), and its argument at a level, which is the magnitude over 10.
# Signs are drawn where timm draws them, so that one generator's state gives one result in both.
_LEVELS: dict[str, tuple[str, Callable[[float, random.Random], float] | None]] = {
    "AutoContrast": ("auto_contrast", None),
    "Equalize": ("equalize", None),
    "Invert": ("invert", None),
    "Posterize": ("posterize", lambda level, rng: int(level * 4)),
    "PosterizeIncreasing": ("posterize", lambda level, rng: 4 - int(level * 4)),
    "Solarize": ("solarize", lambda level, rng: min(256, int(level * 256))),
    "SolarizeIncreasing": ("solarize", lambda level, rng: 256 - min(256, int(level * 256))),
    "SolarizeAdd": ("solarize_add", lambda level, rng: min(128, int(level * 110))),
    "Rotate": ("rotate", lambda level, rng: _signed(level * 30, rng)),
    "ShearX": ("shear_x", lambda level, rng: _signed(level * 0.3, rng)),
    "ShearY": ("shear_y", lambda level, rng: _signed(level * 0.3, rng)),
    "TranslateXRel": ("translate_x", lambda level, rng: _signed(level * 0.45, rng)),
    "TranslateYRel": ("translate_y", lambda level, rng: _signed(level * 0.45, rng)),
}
for _name in ("Brightness", "Color", "Contrast", "Sharpness"):
    _LEVELS[_name] = (_name.lower(), lambda level, rng: level * 1.8 + 0.1)
    _LEVELS[_name + "Increasing"] = (_name.lower(), lambda level, rng: max(0.1, 1 + _signed(level * 0.9, rng)))


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)  # as Pillow, so that right angles are exact
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# (a, b, c, d, e, f): the output's point (x, y) comes from (ax + by + c, dx + ey + f). Corners of pixels are integers.
_MATRICES: dict[str, Callable[[float, int, int], tuple[float, ...]]] = {
    "rotate": _rotation,
    "shear_x": lambda value, height, width: (1, value, 0, 0, 1, 0),
    "shear_y": lambda value, height, width: (1, 0, 0, value, 1, 0),
    "translate_x": lambda value, height, width: (1, 0, value * width, 0, 1, 0),
    "translate_y": lambda value, height, width: (1, 0, 0, 0, 1, value * height),
}


class RandAugment:
    """timm's RandAugment by its policy string, such as ``rand-m9-mstd0.5-inc1``, which timm itself reads.

    Args:
        size: (height, width) of the images.
        interpolation: of rotation, shear and translation: ``nearest``, ``bilinear``, ``bicubic`` or, drawn for each,
            ``random``. Other names mean bicubic; Pillow refuses them here.

    Raises:
        ValueError: for what is no policy, or one with operations that only the official pipeline has.
    """

    def __init__(self, policy: str, size: tuple[int, int], interpolation: str = "bicubic"):
        wrong = f"AUG.AUTO_AUGMENT={policy!r} cannot run on the device; set DATA.PIPELINE official, or take a policy "
        wrong += "such as rand-m9-mstd0.5-inc1, or none"
        if policy.split("-")[0] != "rand":
            raise ValueError(wrong)
        try:
            parsed = rand_augment_transform(policy, {})
        except (AssertionError, KeyError, ValueError) as err:
            raise ValueError(wrong) from err
        self.names = [op.name for op in parsed.ops]
        if not set(self.names) <= set(_LEVELS):
            raise ValueError(wrong)
        self.layers = parsed.num_layers
        self.weights = None if parsed.choice_weights is None else list(parsed.choice_weights)
        one = parsed.ops[0]
        self.probability, self.magnitude = one.prob, one.magnitude
        self.std, self.limit = one.magnitude_std, one.magnitude_max or 10
        self.size = size
        names = ["bilinear", "bicubic"] if interpolation == "random" else [interpolation]
        self.interpolations = [name if f"affine_{name}" in OPS else "bicubic" for name in names]

    def draw(self, rng: random.Random) -> list[Op]:
        ops = [self.draw_op(name, rng) for name in self._choose(rng)]
        return [op for op in ops if op is not None]

    def draw_op(self, name: str, rng: random.Random) -> Op | None:
        """The operation of that name with its arguments, or None where it is not applied this time."""
        if self.probability < 1 and rng.random() > self.probability:
            return None
        magnitude = self.magnitude
        if self.std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif self.std > 0:
            magnitude = rng.gauss(magnitude, self.std)
        op, argument = _LEVELS[name]
        if argument is None:
            return op, ()
        value = argument(max(0.0, min(magnitude, self.limit)) / 10, rng)
        if op not in _MATRICES:
            return op, (value,)
        several = len(self.interpolations) > 1
        interpolation = rng.choice(self.interpolations) if several else self.interpolations[0]
        return f"affine_{interpolation}", _MATRICES[op](value, *self.size)

    def _choose(self, rng: random.Random) -> list[str]:
        if self.weights is None:
            return [self.names[int(rng.random() * len(self.names))] for _ in range(self.layers)]
        left, chosen = dict(zip(self.names, self.weights, strict=True)), []
        for _ in range(self.layers):  # by weight, without repetition
            chosen += rng.choices(list(left), list(left.values()))
            del left[chosen[-1]]
        return chosen


class ColorJitter:
    """torchvision's, as timm uses it: brightness, contrast and saturation in random order, by 1 ± ``strength``."""

    def __init__(self, strength: float):
        self.low, self.high = max(0.0, 1 - strength), 1 + strength

    def draw(self, rng: random.Random) -> list[Op]:
        names = ["brightness", "contrast", "color"]
        rng.shuffle(names)
        return [(name, (rng.uniform(self.low, self.high),)) for name in names]


class RandomErasing:
    """timm's boxes to erase: 1 to ``count`` of them, of 2 % to 1/3 of the area over their number, 0.3 to 1/0.3 tall."""

    def __init__(self, probability: float, count: int, size: tuple[int, int]):
        self.probability, self.count, self.size = probability, count, size

    def draw(self, rng: random.Random) -> list[Box]:
        if rng.random() > self.probability:
            return []
        count = 1 if self.count == 1 else rng.randint(1, self.count)
        boxes = [self._box(count, rng) for _ in range(count)]
        return [box for box in boxes if box is not None]

    def _box(self, count: int, rng: random.Random) -> Box | None:
        height, width = self.size
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width / count
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        return None


class Augmentation:
    """All that is drawn for the device.

    Args:
        size: (height, width) of the images.
        policy: as `RandAugment`, or ``none`` for colour jitter.
        color_jitter: strength, 0 for none; a policy replaces it, as in timm.
        erasing: probability of random erasing.
        count: largest number of boxes to erase.
    """

    def __init__(
        self,
        size: tuple[int, int],
        policy: str = "none",
        color_jitter: float = 0.0,
        interpolation: str = "bicubic",
        erasing: float = 0.0,
        count: int = 1,
    ):
        self.colors: RandAugment | ColorJitter | None = None
        if policy != "none":
            self.colors = RandAugment(policy, size, interpolation)
        elif color_jitter > 0:
            self.colors = ColorJitter(color_jitter)
        self.erasing = RandomErasing(erasing, count, size) if erasing > 0 else None

    def draw(self, rng: random.Random) -> Draw:
        ops = self.colors.draw(rng) if self.colors else ()
        boxes = self.erasing.draw(rng) if self.erasing else ()
        return Draw(ops, boxes, rng.getrandbits(62))
