"""Parts that every Swin variant shares. B batch, H x W a map, L = H * W tokens, C channels, N tokens of a window.

Maps are channels last. Windows and shifts are pairs (height, width); functions also take one number for both.
"""

import platform
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

Pair = int | tuple[int, int]

MASKED = -100.0  # not -inf: the released weights were trained with it, and SwinV2's logits reach it


class Linear(nn.Linear):
    """``nn.Linear``; on AMD's CPUs its float32 product is oneDNN's, which takes half the time of the default there.

    A 1x1 convolution of channels-last data is the same product, and PyTorch gives it to oneDNN, gradients included.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _takes_onednn(x):
            return super().forward(x)
        rows = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)  # 1, C, 1, rows; in memory rows, C
        rows = F.conv2d(rows, self.weight[:, :, None, None], self.bias)
        return rows.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def _takes_onednn(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # first: compilers know linear layers better, and must not see the rest
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and cpu_is_amd()
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


@lru_cache
def cpu_is_amd() -> bool:
    path = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (path.read_text() if path.exists() else platform.processor())


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on the last dimension."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each projected to ``embed_dim`` channels (paper, section 3.1)."""

    def __init__(
        self,
        img_size: Pair = 224,
        patch_size: Pair = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        norm_layer: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.img_size = to_2tuple(img_size)
        self.patch_size = to_2tuple(patch_size)
        self.patches_resolution = [side // patch for side, patch in zip(self.img_size, self.patch_size, strict=True)]
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.norm = norm_layer(embed_dim) if norm_layer is not None else None

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens (B, L, embed_dim)."""
        if x.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the model takes images of {self.in_chans}x{self.img_size[0]}x{self.img_size[1]}, not of "
                f"{'x'.join(map(str, x.shape[1:]))}; change them, or build it with another in_chans (IN_CHANS) or "
                "img_size (DATA.IMG_SIZE)"
            )
        x = self.proj(x).flatten(2).transpose(1, 2)  # B, L, C
        return x if self.norm is None else self.norm(x)

    def flops(self) -> int:
        """Multiply-adds of one image, counted as officially."""
        per_patch = self.embed_dim * self.in_chans * self.patch_size[0] * self.patch_size[1]
        return self.num_patches * (per_patch + (self.embed_dim if self.norm is not None else 0))


class PatchMerging(nn.Module):
    """Each 2x2 neighbourhood becomes one token of twice the channels (paper, section 3.1)."""

    def __init__(
        self, input_resolution: tuple[int, int], dim: int, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm
    ):
        super().__init__()
        self.input_resolution = input_resolution
        self.dim = dim
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H * W, C) to (B, H/2 * W/2, 2C)."""
        return self.reduction(self.norm(gather_neighbours(x, self.input_resolution)))

    def extra_repr(self) -> str:
        return f"input_resolution={self.input_resolution}, dim={self.dim}"

    def flops(self) -> int:
        H, W = self.input_resolution
        return H * W * self.dim + (H // 2) * (W // 2) * 4 * self.dim * 2 * self.dim


def gather_neighbours(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """(B, H * W, C) to (B, H/2 * W/2, 4C): top left, bottom left, top right, bottom right, as officially."""
    H, W = resolution
    B, L, C = x.shape
    if L != H * W:
        raise ValueError(f"{L} tokens are not a {H}x{W} map")
    if H % 2 or W % 2:
        raise ValueError(f"a {H}x{W} map cannot be merged by 2x2 patches; choose an image size with even maps")
    x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5)  # B, H/2, W/2, column, row, C
    return x.reshape(B, L // 4, 4 * C)


def window_partition(x: Tensor, window_size: Pair) -> Tensor:
    """Cut maps (B, H, W, C) into windows (B * nW, window height, window width, C), row by row."""
    h, w = to_2tuple(window_size)
    B, H, W, C = x.shape
    x = x.view(B, H // h, h, W // w, w, C).transpose(2, 3)
    return x.reshape(-1, h, w, C)


def window_reverse(windows: Tensor, window_size: Pair, H: int, W: int) -> Tensor:
    """The inverse of `window_partition`: (B * nW, window height, window width, C) to (B, H, W, C)."""
    h, w = to_2tuple(window_size)
    x = windows.view(-1, H // h, W // w, h, w, windows.shape[-1]).transpose(2, 3)
    return x.reshape(-1, H, W, windows.shape[-1])


def relative_position_index(window_size: Pair) -> Tensor:
    """For each pair of tokens in a window, the row of the bias table that holds their offset: (N, N), int64."""
    h, w = to_2tuple(window_size)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    down = rows[:, None] - rows[None, :] + h - 1  # from 0 to 2h - 2
    right = columns[:, None] - columns[None, :] + w - 1
    return down * (2 * w - 1) + right


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
    region = 3 * regions[0][:, None] + regions[1][None, :]  # H, W
    h, w = to_2tuple(window_size)
    region = window_partition(region[None, :, :, None], (h, w)).view(-1, h * w)  # nW, N
    return (region[:, :, None] != region[:, None, :]).float() * MASKED


def fit_window(resolution: tuple[int, int], window_size: int, shift_size: int) -> tuple[int, int]:
    """Window and shift for a map: one window without a shift where the map is no larger than the window."""
    if min(resolution) <= window_size:
        return min(resolution), 0
    if not 0 <= shift_size < window_size:
        raise ValueError(f"shift_size={shift_size} must be at least 0 and below window_size={window_size}")
    return window_size, shift_size


def check_input_size(img_size: Pair, patch_size: Pair, window_size: int, num_stages: int) -> None:
    """Raise ``ValueError`` where the stages cannot cut images of this size into windows, naming sizes that work."""
    if window_size < 1 or min(to_2tuple(patch_size)) < 1:
        raise ValueError(f"window_size={window_size} and patch_size={patch_size} must be at least 1")
    problem = _input_size_problem(to_2tuple(img_size), to_2tuple(patch_size), window_size, num_stages)
    if problem is None:
        return
    sizes = range(1, 2 * max(to_2tuple(img_size)) + 1)
    good = [s for s in sizes if _input_size_problem((s, s), to_2tuple(patch_size), window_size, num_stages) is None]
    good = [s for s in good if s % to_2tuple(patch_size)[0] == 0]
    nearest = sorted(sorted(good, key=lambda s: abs(s - max(to_2tuple(img_size))))[:3])
    raise ValueError(f"img_size={img_size} (DATA.IMG_SIZE): {problem}; sizes near it that work: {nearest}")


def _input_size_problem(
    img_size: tuple[int, int], patch_size: tuple[int, int], window_size: int, num_stages: int
) -> str | None:
    H, W = (side // patch for side, patch in zip(img_size, patch_size, strict=True))
    for stage in range(num_stages):
        window = min(H, W, window_size)
        if window < 1:
            return f"stage {stage + 1} has no tokens left"
        if H % window or W % window:
            return f"the {H}x{W} map of stage {stage + 1} is not a whole number of {window}x{window} windows"
        if stage < num_stages - 1 and (H % 2 or W % 2):
            return f"the {H}x{W} map of stage {stage + 1} cannot be merged by 2x2 patches"
        H, W = H // 2, W // 2
    return None
