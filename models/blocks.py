"""The block's skeleton that all variants share: how tokens of a map, whatever its size, are mixed in windows.

B images, L = H * W tokens in image order, C channels. A ``resolution`` is (H, W) in tokens; where it may be None it
is the one that the block was built for, or given by ``set_input_size``.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from timm.layers import DropPath, to_2tuple
from torch import Tensor, nn

from kernels import linear as kernel

from .attention import AttentionBase
from .layers import (
    Mlp,
    Pair,
    as_pair,
    check_tokens,
    check_window,
    fit_window,
    half_window,
    padded_resolution,
    window_mask,
)
from .linear import fuses_residual_mlp, is_hooked, joins, passes

Resolution = tuple[int, int]


def drop_path_layer(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0.0 else nn.Identity()


class Block(nn.Module):
    """Mix tokens, then channels, each with a residual (paper, equation 3). A subclass has ``norm1, drop_path, norm2,
    mlp`` and says how tokens are mixed.

    Args:
        input_resolution: (H, W) of the map.
        window_size: side of the windows, or (height, width); fitted to the map by `fit_window`.
        pad_maps: take maps of any size, padded to whole windows. Else they must be a whole number of windows.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Resolution,
        num_heads: int,
        window_size: Pair,
        shift_size: Pair,
        mlp_ratio: float,
        pad_maps: bool,
    ):
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.pad_maps = pad_maps
        self._wanted = as_pair(window_size), as_pair(shift_size)
        self._fit(input_resolution)

    def _fit(self, resolution: Resolution) -> None:
        self.input_resolution = tuple(resolution)
        self.window_size, self.shift_size = fit_window(self.input_resolution, *self._wanted)
        if not self.pad_maps:
            check_window(self.input_resolution, self.window_size)

    def set_input_size(
        self, resolution: Resolution, window_size: Pair | None = None, shift_size: Pair | None = None
    ) -> None:
        """Take maps of another resolution, in windows of another size; None keeps what is."""
        window, shift = self._wanted
        self._wanted = as_pair(window_size or window), shift if shift_size is None else as_pair(shift_size)
        self._fit(resolution)

    def shift_for(self, resolution: Resolution) -> Pair:
        """The shift on a map of ``resolution`` in windows of this block."""
        if resolution == self.input_resolution:
            return self.shift_size
        shifts = self._wanted[1] if self.window_size == self._wanted[0] else half_window(self.window_size)
        windows, shifts = to_2tuple(self.window_size), to_2tuple(shifts if self._wanted[1] else 0)
        if isinstance(self.window_size, int):
            return 0 if min(resolution) <= self.window_size else shifts[0]
        return tuple(0 if side <= w else s for side, w, s in zip(resolution, windows, shifts, strict=True))

    def mix_tokens(self, x: Tensor, resolution: Resolution) -> Tensor:
        """(B, L, C) to (B, L, C), across tokens."""
        raise NotImplementedError

    def mixing_flops(self) -> float:
        """Multiply-adds of `mix_tokens` on one map."""
        raise NotImplementedError

    def forward(self, x: Tensor, resolution: Resolution | None = None) -> Tensor:
        return self.mix_channels(self.add_mixed(x, self.resolve(x, resolution)))

    def add_mixed(self, x: Tensor, resolution: Resolution) -> Tensor:
        """(B, L, C) to (B, L, C): x and what its tokens are mixed to."""
        return x + self.drop_path(self.mix_tokens(self.norm1(x), resolution))

    def mix_channels(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C)."""
        mlp = self.mlp
        if type(mlp) is Mlp and not is_hooked(mlp):
            parts = mlp.fc1, mlp.act, mlp.drop, mlp.fc2
            if fuses_residual_mlp(x, self.norm2, self.drop_path, *parts):
                return kernel.residual_mlp(x, self.norm2, mlp.fc1, mlp.fc2)
        return x + self.drop_path(mlp(self.norm2(x)))

    def resolve(self, x: Tensor, resolution: Resolution | None) -> Resolution:
        resolution = resolution or self.input_resolution
        check_tokens(x.shape[1], resolution)
        if not self.pad_maps and resolution != self.input_resolution:
            check_window(resolution, self.window_size)
        return resolution

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}, "
            f"window_size={self.window_size}, shift_size={self.shift_size}, mlp_ratio={self.mlp_ratio}"
        )

    def flops(self) -> float:
        """Multiply-adds of one map, counted as officially."""
        H, W = self.input_resolution
        norms = 2 * self.dim * H * W
        mlp = 2 * H * W * self.dim * self.dim * self.mlp_ratio
        return norms + self.mixing_flops() + mlp

    def num_windows(self) -> float:
        (H, W), (h, w) = padded_resolution(self.input_resolution, self.window_size), to_2tuple(self.window_size)
        return H * W / (h * w)


class AttentionBlock(Block):
    """A block that mixes tokens by attention in windows.

    Args:
        make_attention, make_mlp: called in this order, the first with the (height, width) of the windows.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Resolution,
        num_heads: int,
        window_size: Pair,
        shift_size: Pair,
        mlp_ratio: float,
        drop_path: float,
        norm_layer: Callable[[int], nn.Module],
        pad_maps: bool,
        make_attention: Callable[[Resolution], AttentionBase],
        make_mlp: Callable[[int], nn.Module],
    ):
        super().__init__(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, pad_maps)
        self.norm1 = norm_layer(dim)
        self.attn = make_attention(to_2tuple(self.window_size))
        self.drop_path = drop_path_layer(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = make_mlp(int(dim * mlp_ratio))
        self.register_buffer("attn_mask", window_mask(self.input_resolution, self.window_size, self.shift_size))

    def set_input_size(
        self, resolution: Resolution, window_size: Pair | None = None, shift_size: Pair | None = None
    ) -> None:
        super().set_input_size(resolution, window_size, shift_size)
        self.attn.set_window_size(self.window_size)
        mask = window_mask(self.input_resolution, self.window_size, self.shift_size)
        self.attn_mask = mask if mask is None else mask.to(self.attn.proj.weight)

    def mask_for(self, resolution: Resolution) -> Tensor | None:
        """The `window_mask` of a map of ``resolution``."""
        if resolution == self.input_resolution:
            return self.attn_mask
        geometry = resolution, self.window_size, self.shift_for(resolution)
        weight = self.attn.proj.weight
        if torch.compiler.is_compiling():  # a tracer's fake tensor must not stay in the cache
            mask = window_mask(*geometry)
            return mask if mask is None else mask.to(weight)
        return _cached_mask(*geometry, weight.device, weight.dtype)

    def add_mixed(self, x: Tensor, resolution: Resolution) -> Tensor:
        attn, (B, L, C) = self.attn, x.shape
        joined = (
            isinstance(attn, AttentionBase)
            and passes(self.drop_path)
            and joins(x, attn.qkv, self.norm1)
            and joins(x, attn.proj)
            and attn.may_be_taken_apart(x.view(B, *resolution, C))
        )
        if not joined:
            return super().add_mixed(x, resolution)
        qkv = kernel.joined_linear(x, self.norm1, attn.qkv).view(B, *resolution, 3 * C)
        y = attn.attend(qkv, self.mask_for(resolution), self.shift_for(resolution))
        return kernel.joined_linear(y.reshape(B, L, C), None, attn.proj, residual=x)

    def mix_tokens(self, x: Tensor, resolution: Resolution) -> Tensor:
        B, L, C = x.shape
        x = self.attn(x.view(B, *resolution, C), self.mask_for(resolution), self.shift_for(resolution))
        return x.view(B, L, C)

    def mixing_flops(self) -> float:
        h, w = to_2tuple(self.window_size)
        return self.num_windows() * self.attn.flops(h * w)


@lru_cache(maxsize=16)  # those of four stages for two sizes: masks of large maps take megabytes
def _cached_mask(
    resolution: Resolution, window_size: Pair, shift_size: Pair, device: torch.device, dtype: torch.dtype
) -> Tensor | None:
    """`window_mask` of maps whose size changes from batch to batch; all blocks of a stage share two of them."""
    with torch.inference_mode(False), device:
        mask = window_mask(resolution, window_size, shift_size)
        return mask if mask is None else mask.to(dtype)
