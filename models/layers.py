"""Parts that every Swin variant shares. B batch, H x W a map, L = H * W tokens, C channels, N tokens of a window.

Maps are channels last. Windows and shifts are one number for both sides, or a pair (height, width).
"""

import math
from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from .linear import Linear, mlp, normed_linear
from .linear import linear as linear  # SwinV2 takes it from here

Pair = int | tuple[int, int]

MASKED = -100.0  # not -inf: the released weights were trained with it, and SwinV2's logits reach it


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on the last dimension."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        mlp_fc2_bias: bool = True,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, out_features or in_features, bias=mlp_fc2_bias)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(mlp(x, self.fc1, self.act, self.drop, self.fc2))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to ``embed_dim`` channels (paper, section 3.1).

    Args:
        pad_maps: take images of any size; zeros at the bottom and right complete the last patches.
    """

    def __init__(
        self,
        img_size: Pair = 224,
        patch_size: Pair = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
        pad_maps: bool = False,
    ):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.pad_maps = pad_maps
        self.set_input_size(img_size)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def set_input_size(self, img_size: Pair) -> None:
        self.img_size = to_2tuple(img_size)
        self.patches_resolution = list(self.resolution_of(self.img_size))
        self.num_patches = math.prod(self.patches_resolution)

    def resolution_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the map of images of this size."""
        return patches_of(img_size, self.patch_size, self.pad_maps)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to tokens (B, L, embed_dim)."""
        height, width = self.img_size
        if x.ndim != 4 or x.shape[1] != self.in_chans or (not self.pad_maps and x.shape[2:] != (height, width)):
            raise ValueError(
                f"the model takes images of {self.in_chans}x{height}x{width}, not of "
                f"{'x'.join(map(str, x.shape[1:]))}; change them, call set_input_size, or build the model with "
                "in_chans (IN_CHANS), img_size (DATA.IMG_SIZE) or, for any size, pad_maps=True (MODEL.PAD_MAPS)"
            )
        if self.pad_maps:
            x = F.pad(x, (0, -x.shape[3] % self.patch_size[1], 0, -x.shape[2] % self.patch_size[0]))
        # Convolved channels last, patches come out as tokens, without a copy; on CPUs it takes half the time.
        x = self.proj(x.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2)  # B, L, C
        return x if self.norm is None else self.norm(x)

    def flops(self) -> int:
        """Multiply-adds of one image, counted as officially."""
        per_patch = self.embed_dim * self.in_chans * self.patch_size[0] * self.patch_size[1]
        return self.num_patches * (per_patch + (self.embed_dim if self.norm is not None else 0))


class PatchMerging(nn.Module):
    """Each 2x2 neighbourhood becomes one token of twice the channels (paper, section 3.1).

    Args:
        pad_maps: take maps of any size; zeros at the bottom and right complete the last neighbourhoods.
    """

    def __init__(
        self,
        input_resolution: tuple[int, int],
        dim: int,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        pad_maps: bool = False,
    ):
        super().__init__()
        self.input_resolution = tuple(input_resolution)
        self.dim = dim
        self.pad_maps = pad_maps
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(self.norm_width())

    def norm_width(self) -> int:
        """Channels that the norm sees: those of four tokens."""
        return 4 * self.dim

    def forward(self, x: Tensor, resolution: tuple[int, int] | None = None) -> Tensor:
        """(B, H * W, C) to (B, H/2 * W/2, 2C), for a map of ``resolution``, by default the one it was built for."""
        return self.merge(gather_neighbours(x, resolution or self.input_resolution, self.pad_maps))

    def merge(self, x: Tensor) -> Tensor:
        """(..., 4C) to (..., 2C)."""
        return normed_linear(x, self.norm, self.reduction)

    def extra_repr(self) -> str:
        return f"input_resolution={self.input_resolution}, dim={self.dim}"

    def flops(self) -> int:
        H, W = self.input_resolution
        return H * W * self.dim + self.reduction_flops()

    def reduction_flops(self) -> int:
        H, W = merged_resolution(self.input_resolution)
        return H * W * 4 * self.dim * 2 * self.dim


def patches_of(img_size: tuple[int, int], patch_size: tuple[int, int], pad: bool) -> tuple[int, int]:
    """How many patches lie along each side; a last partial one counts if it is padded."""
    return tuple(-(-side // patch) if pad else side // patch for side, patch in zip(img_size, patch_size, strict=True))


def merged_resolution(resolution: tuple[int, int]) -> tuple[int, int]:
    """(H, W) after 2x2 patches are merged; odd sides are padded."""
    return (resolution[0] + 1) // 2, (resolution[1] + 1) // 2


def gather_neighbours(x: Tensor, resolution: tuple[int, int], pad: bool = False) -> Tensor:
    """(B, H * W, C) to (B, H/2 * W/2, 4C): top left, bottom left, top right, bottom right, as officially.

    With ``pad``, zeros stand in for the neighbours that odd sides lack; otherwise odd sides raise ``ValueError``.
    """
    H, W = resolution
    B, L, C = x.shape
    check_tokens(L, resolution)
    if H % 2 or W % 2:
        if not pad:
            raise ValueError(
                f"a {H}x{W} map cannot be merged by 2x2 patches; choose an image size with even maps, or pad_maps=True "
                "(MODEL.PAD_MAPS)"
            )
        x = F.pad(x.view(B, H, W, C), (0, 0, 0, W % 2, 0, H % 2))
        H, W = H + H % 2, W + W % 2
    x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5)  # B, H/2, W/2, column, row, C
    return x.reshape(B, (H // 2) * (W // 2), 4 * C)


def check_tokens(count: int, resolution: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless so many tokens are a map of ``resolution``."""
    if count != resolution[0] * resolution[1]:
        raise ValueError(f"{count} tokens are not a {resolution[0]}x{resolution[1]} map")


def window_partition(x: Tensor, window_size: Pair) -> Tensor:
    """Cut maps (B, H, W, C) into windows (B * nW, window height, window width, C), row by row."""
    h, w = to_2tuple(window_size)
    B, H, W, C = x.shape
    x = x.view(B, H // h, h, W // w, w, C).transpose(2, 3)
    return x.contiguous().view(-1, h, w, C)  # contiguous in degenerate cases too: callers go on with view


def window_reverse(windows: Tensor, window_size: Pair, H: int, W: int) -> Tensor:
    """The inverse of `window_partition`: (B * nW, window height, window width, C) to (B, H, W, C)."""
    h, w = to_2tuple(window_size)
    x = windows.view(-1, H // h, W // w, h, w, windows.shape[-1]).transpose(2, 3)
    return x.contiguous().view(-1, H, W, windows.shape[-1])


def relative_position_index(window_size: Pair) -> Tensor:
    """For each pair of tokens in a window, the row of the bias table that holds their offset: (N, N), int64."""
    h, w = to_2tuple(window_size)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + h - 1  # from 0 to 2h - 2
    right = columns[:, None] - columns[None, :] + w - 1
    return down * (2 * w - 1) + right


def relative_coords_table(window_size: Pair, pretrained_window_size: Pair = 0) -> Tensor:
    """Offsets within a window on a logarithmic scale, from about -1.06 to 1.06 at the pre-trained window's ends.

    SwinV2, section 3.3, equation 4; scaled by 8 and divided by log2 8 as in the official code.

    Args:
        pretrained_window_size: the window that weights were trained with, if not this one; 0 says this one.

    Returns:
        (1, 2h - 1, 2w - 1, 2), float32.
    """
    axes = []
    for size, trained in zip(to_2tuple(window_size), to_2tuple(pretrained_window_size), strict=True):
        offsets = torch.arange(-(size - 1), size, dtype=torch.float32)
        offsets = 8 * (offsets / max((trained or size) - 1, 1))  # a window of 1 has the offset 0 alone
        axes.append(torch.sign(offsets) * torch.log2(offsets.abs() + 1.0) / 3.0)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).unsqueeze(0)


def shift_mask(resolution: tuple[int, int], window_size: Pair, shift_size: Pair) -> Tensor:
    """What to add to the logits of shifted windows, so that only true neighbours attend to each other.

    Rolling a map by the shift brings its opposite edges together; tokens of different edges get -100 (paper, figure 4).

    Returns:
        (nW, N, N), float32.
    """
    regions = []
    for side, window, shift in zip(resolution, to_2tuple(window_size), to_2tuple(shift_size), strict=True):
        place = torch.arange(side)
        regions.append((place >= side - window).int() + (place >= side - shift).int())
    region = _windows_of(3 * regions[0][:, None] + regions[1][None, :], window_size)  # nW, N
    return (region[:, :, None] != region[:, None, :]).float() * MASKED


def window_mask(resolution: tuple[int, int], window_size: Pair, shift_size: Pair) -> Tensor | None:
    """What to add to the logits of a map's windows: the `shift_mask`, and -inf for keys that are padding.

    A map whose sides are no multiples of the window is padded at the bottom and right, then rolled by the shift.
    Padding is cut off by -inf, not -100: no released weights depend on it, and SwinV2's logits reach 116.

    Returns:
        (nW, N, N), float32, or None where there is nothing to mask.
    """
    window, shift = to_2tuple(window_size), to_2tuple(shift_size)
    padded = padded_resolution(resolution, window)
    mask = shift_mask(padded, window, shift) if any(shift) else None
    if padded == tuple(resolution):
        return mask
    place = [torch.roll(torch.arange(side), -by) for side, by in zip(padded, shift, strict=True)]
    real = (place[0] < resolution[0])[:, None] & (place[1] < resolution[1])[None, :]
    away = torch.where(_windows_of(real, window), 0.0, -torch.inf)[:, None, :]  # nW, 1, N
    return away.expand(-1, window[0] * window[1], -1).contiguous() if mask is None else mask + away


def _windows_of(plane: Tensor, window_size: Pair) -> Tensor:
    """A plane (H, W) cut into windows (nW, N)."""
    h, w = to_2tuple(window_size)
    return window_partition(plane[None, :, :, None], (h, w)).view(-1, h * w)


def padded_resolution(resolution: tuple[int, int], window_size: Pair) -> tuple[int, int]:
    """(H, W) rounded up to whole windows."""
    return tuple(-(-side // window) * window for side, window in zip(resolution, to_2tuple(window_size), strict=True))


def fit_window(resolution: tuple[int, int], window_size: Pair, shift_size: Pair) -> tuple[Pair, Pair]:
    """Window and shift for a map: no larger than the map, and no shift where one window covers it.

    One number is fitted as officially: both sides shrink to the map's shorter side, and both shifts go. Of a pair, each
    side is fitted alone. What is returned is a number or a pair, as ``window_size`` is.

    Raises ``ValueError`` for a shift that is not within the window.
    """
    if isinstance(window_size, int):
        if min(resolution) <= window_size:
            return min(resolution), 0
        check_shift(window_size, shift_size)
        return window_size, shift_size
    fitted = [
        fit_window((side, side), window, shift)
        for side, window, shift in zip(resolution, window_size, to_2tuple(shift_size), strict=True)
    ]
    windows, shifts = zip(*fitted, strict=True)
    return windows, shifts if any(shifts) else 0


def check_shift(window_size: int, shift_size: int) -> None:
    if not 0 <= shift_size < window_size:
        raise ValueError(f"shift_size={shift_size} must be at least 0 and below window_size={window_size}")


def half_window(window_size: Pair) -> Pair:
    """The shift of every second block (paper, section 3.2): half a window, rounded down."""
    return window_size // 2 if isinstance(window_size, int) else tuple(side // 2 for side in window_size)


def as_pair(value: Pair) -> Pair:
    """A size as a number or a tuple of two; configurations hold lists. Raises ``ValueError`` for anything else."""
    numbers = list(value) if isinstance(value, (list, tuple, torch.Size)) else [value]
    if len(numbers) > 2 or not all(isinstance(number, Integral) for number in numbers):
        raise ValueError(f"size {value!r} is neither a whole number nor (height, width)")
    numbers = [int(number) for number in numbers]
    return tuple(numbers) if len(numbers) == 2 else numbers[0]


def check_window(resolution: tuple[int, int], window_size: Pair) -> None:
    """Raise ``ValueError`` where a map is not a whole number of windows, naming the way out."""
    if padded_resolution(resolution, window_size) != tuple(resolution):
        h, w = to_2tuple(window_size)
        raise ValueError(
            f"a {resolution[0]}x{resolution[1]} map is not a whole number of {h}x{w} windows; choose other sizes, or "
            "pad_maps=True (MODEL.PAD_MAPS)"
        )


def check_input_size(img_size: Pair, patch_size: Pair, window_size: Pair, num_stages: int, pad_maps: bool) -> None:
    """Raise ``ValueError`` where the stages cannot cut images of this size into windows, naming sizes that work."""
    if min(to_2tuple(window_size)) < 1 or min(to_2tuple(patch_size)) < 1:
        raise ValueError(f"window_size={window_size} and patch_size={patch_size} must be at least 1")
    size, patch = to_2tuple(img_size), to_2tuple(patch_size)
    if pad_maps:
        if min(size) < 1:
            raise ValueError(f"img_size={img_size} (DATA.IMG_SIZE) must be at least 1")
        return
    problem = _input_size_problem(size, patch, window_size, num_stages)
    if problem is None:
        return
    sizes = range(patch[0], 2 * max(size) + 1, patch[0])
    good = [s for s in sizes if _input_size_problem((s, s), patch, window_size, num_stages) is None]
    nearest = sorted(sorted(good, key=lambda s: abs(s - max(size)))[:3])
    advice = f"sizes near it that work: {nearest}; or " if nearest else ""
    raise ValueError(
        f"img_size={img_size} (DATA.IMG_SIZE): {problem}; {advice}pad_maps=True (MODEL.PAD_MAPS) takes any size"
    )


def _input_size_problem(
    img_size: tuple[int, int], patch_size: tuple[int, int], window_size: Pair, num_stages: int
) -> str | None:
    H, W = patches_of(img_size, patch_size, pad=False)
    for stage in range(num_stages):
        if min(H, W) < 1:
            return f"stage {stage + 1} has no tokens left"
        h, w = to_2tuple(fit_window((H, W), window_size, 0)[0])
        if H % h or W % w:
            return f"the {H}x{W} map of stage {stage + 1} is not a whole number of {h}x{w} windows"
        if stage < num_stages - 1 and (H % 2 or W % 2):
            return f"the {H}x{W} map of stage {stage + 1} cannot be merged by 2x2 patches"
        H, W = H // 2, W // 2
    return None
