"""Maps to (shifted) windows and back: by the extension ``swin_window_process``, else by PyTorch's operations.

B maps of H x W tokens in image order, nW windows of N = h * w tokens, C = parts * heads * d channels. Sizes and shifts
are one number or a pair (height, width). Windows begin ``shift_size`` below and right of a map's corner and wrap around
its edges. `WindowProcess` and `WindowProcessReverse` are the official names and signatures
(``kernels/window_process/window_process.py``); this file can be imported alone, as theirs.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Pair = int | Sequence[int]

INSTALL = "pip install ./kernels/window_process --no-build-isolation"

logger = logging.getLogger("kernels.window_process")

try:
    from swin_window_process import DEVICES, PROBLEM  # types of devices that it serves; why not another
except (ImportError, OSError) as err:  # OSError: a library that this PyTorch cannot load
    DEVICES, PROBLEM = (), str(err)


def partition(x: Tensor, window_size: Pair, shift_size: Pair = 0, parts: int = 1, heads: int = 1) -> Tensor:
    """Cut maps into windows, channels into heads, in one copy.

    Args:
        x: (B, H, W, C), any dtype; it need not be contiguous.
        parts: tensors that share the channels, as q, k and v do; they come apart.

    Returns:
        (parts, B, nW, heads, N, d), contiguous. With one part and head these are the windows of
        `models.layers.window_partition` in memory.

    Raises ``ValueError`` where sizes do not fit together.
    """
    window, shift = _pair(window_size), _pair(shift_size)
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, H, W, C)")
    _check_windows(tuple(x.shape[1:3]), window)
    if parts < 1 or heads < 1 or x.shape[3] % (parts * heads):
        raise ValueError(f"C={x.shape[3]} is not divisible by parts={parts} times heads={heads}")
    if _take_extension(x):
        return torch.ops.swin.window_partition(x, window, shift, parts, heads)
    return partition_reference(x, window, shift, parts, heads)


def merge(windows: Tensor, resolution: Sequence[int], window_size: Pair, shift_size: Pair = 0) -> Tensor:
    """The inverse of `partition`: (parts, B, nW, heads, N, d) to (B, H, W, C), contiguous, for ``resolution`` (H, W).

    Raises ``ValueError`` where sizes do not fit together.
    """
    window, shift, (H, W) = _pair(window_size), _pair(shift_size), resolution
    if windows.ndim != 6:
        raise ValueError(f"windows has shape {tuple(windows.shape)}; it must be (parts, B, nW, heads, N, d)")
    _check_windows((H, W), window)
    count, tokens = (H // window[0]) * (W // window[1]), window[0] * window[1]
    if windows.shape[2] != count or windows.shape[4] != tokens:
        raise ValueError(
            f"windows has shape {tuple(windows.shape)}; a {H}x{W} map in windows of {window[0]}x{window[1]} makes "
            f"nW {count} and N {tokens}"
        )
    if _take_extension(windows):
        return torch.ops.swin.window_merge(windows, (H, W), window, shift)
    return merge_reference(windows, (H, W), window, shift)


def partition_reference(x: Tensor, window_size: Pair, shift_size: Pair = 0, parts: int = 1, heads: int = 1) -> Tensor:
    """`partition` in PyTorch's operations: a roll, where there is a shift, and one copy."""
    (h, w), (down, right) = _pair(window_size), _pair(shift_size)
    B, H, W, C = x.shape
    if down or right:
        x = torch.roll(x, (-down, -right), (1, 2))
    x = x.reshape(B, H // h, h, W // w, w, parts, heads, C // (parts * heads))
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # parts, B, rows of windows, columns of windows, heads, h, w, d
    return x.reshape(parts, B, (H // h) * (W // w), heads, h * w, C // (parts * heads)).contiguous()


def merge_reference(windows: Tensor, resolution: Sequence[int], window_size: Pair, shift_size: Pair = 0) -> Tensor:
    """`merge` in PyTorch's operations: one copy and, where there is a shift, a roll."""
    (h, w), (down, right), (H, W) = _pair(window_size), _pair(shift_size), resolution
    parts, B, _, heads, _, d = windows.shape
    x = windows.reshape(parts, B, H // h, W // w, heads, h, w, d)
    x = x.permute(1, 2, 5, 3, 6, 0, 4, 7).reshape(B, H, W, parts * heads * d).contiguous()
    return torch.roll(x, (down, right), (1, 2)) if down or right else x


class WindowProcess:
    """Official name: roll maps by ``shift_size``, then cut them. The official model gives a negative number."""

    @staticmethod
    def apply(x: Tensor, B: int, H: int, W: int, C: int, shift_size: Pair, window_size: Pair) -> Tensor:
        """(B, H, W, C) to (B * nW, h, w, C)."""
        _check_shape("x", x, (B, H, W, C))
        h, w = _pair(window_size)
        return partition(x, (h, w), _negative(shift_size)).view(B * (H // h) * (W // w), h, w, C)


class WindowProcessReverse:
    """Official name: put windows together, then roll the maps by ``shift_size``, a positive number officially."""

    @staticmethod
    def apply(windows: Tensor, B: int, H: int, W: int, C: int, shift_size: Pair, window_size: Pair) -> Tensor:
        """(B * nW, h, w, C) to (B, H, W, C)."""
        h, w = _pair(window_size)
        _check_windows((H, W), (h, w))
        count = (H // h) * (W // w)
        _check_shape("windows", windows, (B * count, h, w, C))
        return merge(windows.reshape(1, B, count, 1, h * w, C), (H, W), (h, w), shift_size)


def is_built_for(device: torch.device) -> bool:
    """Whether the extension serves tensors on ``device``."""
    return device.type in DEVICES


def why_not_built(device: torch.device) -> str:
    """Why it does not, and the way out."""
    reason = " ".join(PROBLEM.split()) or f"it serves {' and '.join(DEVICES)} only"
    return f"the extension is not built for {device.type}: {reason}; {INSTALL}"


def _take_extension(x: Tensor) -> bool:
    compiling = torch.compiler.is_compiling()
    if not compiling and torch.jit.is_tracing():
        return False  # torch.jit.trace cannot record the sizes that operators take
    if not is_built_for(x.device) and not compiling:
        _say_once(x.device.type)
    return is_built_for(x.device)


@lru_cache
def _say_once(device_type: str) -> None:
    logger.warning(f"{why_not_built(torch.device(device_type))}; PyTorch's operations take its place")


def _pair(value: Pair) -> tuple[int, int]:
    if isinstance(value, (int, torch.SymInt)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{value} is neither a number nor a pair (height, width)")
    return tuple(value)


def _negative(shift_size: Pair) -> tuple[int, int]:
    down, right = _pair(shift_size)
    return -down, -right


def _check_windows(resolution: tuple[int, int], window_size: tuple[int, int]) -> None:
    (H, W), (h, w) = resolution, window_size
    if h < 1 or w < 1 or H < 1 or W < 1 or H % h or W % w:
        raise ValueError(f"a {H}x{W} map is not a whole number of windows of window_size={h}x{w}")


def _check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; B, H, W, C and window_size make it {shape}")
