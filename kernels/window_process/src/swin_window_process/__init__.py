"""The operators ``swin::window_partition`` and ``swin::window_merge``, each the other's inverse and backward.

``window_partition(x, window_size, shift_size, parts, heads)`` cuts maps (B, H, W, C) into windows (parts, B, nW, heads,
N, d): C = parts * heads * d, and windows of N = h * w tokens begin ``shift_size`` below and right of the map's corner,
and wrap around its edges. ``window_merge(windows, resolution, window_size, shift_size)`` goes back. Any dtype; sizes
and shifts are lists of two. Importing this package loads the operators.
"""

from pathlib import Path

import torch
from torch import Tensor


def _load() -> tuple[tuple[str, ...], str]:
    """Load what was built. The types of devices that it serves, and why one of them is not served."""
    devices, problem = [], ""
    for device, name in (("cpu", "_C"), ("cuda", "_C_cuda")):
        for path in Path(__file__).parent.glob(f"{name}.*"):
            try:
                torch.ops.load_library(path)
            except OSError as err:
                if device == "cpu":
                    raise
                problem = f"{path.name} cannot be loaded, {err}"
            else:
                devices.append(device)
    if "cpu" not in devices:
        raise ImportError(f"{Path(__file__).parent} holds no compiled library")
    return tuple(devices), problem


DEVICES, PROBLEM = _load()


@torch.library.register_fake("swin::window_partition")
def _(x: Tensor, window_size: list[int], shift_size: list[int], parts: int, heads: int) -> Tensor:
    B, H, W, C = x.shape
    h, w = window_size
    return x.new_empty(parts, B, (H // h) * (W // w), heads, h * w, C // (parts * heads))


@torch.library.register_fake("swin::window_merge")
def _(windows: Tensor, resolution: list[int], window_size: list[int], shift_size: list[int]) -> Tensor:
    parts, B, _, heads, _, d = windows.shape
    return windows.new_empty(B, *resolution, parts * heads * d)


def _keep_partition(ctx, inputs, output) -> None:
    x, ctx.window_size, ctx.shift_size, _, _ = inputs
    ctx.resolution = x.shape[1:3]


def _partition_backward(ctx, grad: Tensor):
    grad = torch.ops.swin.window_merge(grad, ctx.resolution, ctx.window_size, ctx.shift_size)
    return grad, None, None, None, None


def _keep_merge(ctx, inputs, output) -> None:
    windows, _, ctx.window_size, ctx.shift_size = inputs
    ctx.parts, _, _, ctx.heads = windows.shape[:4]


def _merge_backward(ctx, grad: Tensor):
    grad = torch.ops.swin.window_partition(grad, ctx.window_size, ctx.shift_size, ctx.parts, ctx.heads)
    return grad, None, None, None


torch.library.register_autograd("swin::window_partition", _partition_backward, setup_context=_keep_partition)
torch.library.register_autograd("swin::window_merge", _merge_backward, setup_context=_keep_merge)
