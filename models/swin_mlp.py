"""Swin-MLP: windows whose tokens are mixed by a linear layer for each head, instead of attention.

From the official ``models/swin_mlp.py``, whose names, arguments, parameters and initial weights these are.
B batch, H x W a map, L tokens, N tokens per window, nH heads of d = C / nH channels.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from .backbone import Backbone, Stage
from .blocks import Block, drop_path_layer
from .layers import (
    Mlp,
    Pair,
    PatchEmbed,
    PatchMerging,
    fit_window,
    padded_resolution,
    patches_of,
    window_partition,
    window_reverse,
)

__all__ = [
    "BasicLayer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinMLP",
    "SwinMLPBlock",
    "window_partition",
    "window_reverse",
]


class SwinMLPBlock(Block):
    """A linear layer across the tokens of a window for each head, then an MLP. Shifted windows are padded with zeros
    around the map, not wrapped around.

    Args:
        input_resolution: (H, W) of the map.
        pad_maps: take maps of any size, padded to whole windows.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: Pair = 7,
        shift_size: Pair = 0,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        pad_maps: bool = False,
    ):
        super().__init__(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, pad_maps)
        h, w = to_2tuple(self.window_size)
        self.norm1 = norm_layer(dim)
        self.spatial_mlp = nn.Conv1d(num_heads * h * w, num_heads * h * w, kernel_size=1, groups=num_heads)
        self.drop_path = drop_path_layer(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def mix_tokens(self, x: Tensor, resolution: tuple[int, int]) -> Tensor:
        B, L, C = x.shape
        (H, W), (h, w) = resolution, to_2tuple(self.window_size)
        top, left, bottom, right = self.padding_for(resolution)
        x = F.pad(x.view(B, H, W, C), (0, 0, left, right, top, bottom))
        padded = x.shape[1:3]
        x = window_partition(x, (h, w)).view(-1, h * w, self.num_heads, C // self.num_heads)
        x = x.transpose(1, 2).flatten(1, 2)  # B * nW, nH * N, d
        x = self.spatial_mlp(x).unflatten(1, (self.num_heads, h * w)).transpose(1, 2)  # B * nW, N, nH, d
        x = window_reverse(x.reshape(-1, h, w, C), (h, w), *padded)
        return x[:, top : top + H, left : left + W].reshape(B, L, C)

    def padding_for(self, resolution: tuple[int, int]) -> tuple[int, int, int, int]:
        """Zeros above, left of, below and right of a map, so that windows begin at the shift and cover it."""
        window, shift = to_2tuple(self.window_size), to_2tuple(self.shift_for(resolution))
        before = [w - s if s else 0 for w, s in zip(window, shift, strict=True)]
        covered = [side + b for side, b in zip(resolution, before, strict=True)]
        after = [p - c for p, c in zip(padded_resolution(covered, window), covered, strict=True)]
        return before[0], before[1], after[0], after[1]

    def set_input_size(
        self, resolution: tuple[int, int], window_size: Pair | None = None, shift_size: Pair | None = None
    ) -> None:
        built = to_2tuple(self.window_size)
        super().set_input_size(resolution, window_size, shift_size)
        assert to_2tuple(self.window_size) == built  # the model has checked it

    def mixing_flops(self) -> float:
        (H, W), (h, w) = self.input_resolution, to_2tuple(self.window_size)
        top, left, bottom, right = self.padding_for(self.input_resolution)
        windows = (H + top + bottom) * (W + left + right) / (h * w)
        return windows * self.dim * (h * w) ** 2


class BasicLayer(Stage):
    """One stage: ``depth`` blocks, every second one with shifted windows, then the merging of patches."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        depth: int,
        num_heads: int,
        window_size: Pair,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        pad_maps: bool = False,
    ):
        make_block = partial(
            SwinMLPBlock,
            dim,
            input_resolution,
            num_heads,
            window_size,
            mlp_ratio=mlp_ratio,
            drop=drop,
            norm_layer=norm_layer,
            pad_maps=pad_maps,
        )

        super().__init__(
            dim, input_resolution, depth, window_size, drop_path, make_block, downsample, norm_layer, use_checkpoint
        )


class SwinMLP(Backbone):
    """Swin-MLP for classification: images (B, in_chans, height, width) to logits (B, num_classes).

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows, or (height, width); maps no larger than it are one window. The weights depend
            on it, so it cannot be changed later.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.
        pad_maps: take images of any size: maps are padded to whole windows with zeros.

    Raises:
        ValueError: where the maps of a stage are not a whole number of windows; the message names sizes that work.
    """

    def __init__(
        self,
        img_size: Pair = 224,
        patch_size: Pair = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Pair = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        pad_maps: bool = False,
    ):
        super().__init__(
            lambda i, **shared: BasicLayer(**shared),
            PatchMerging,
            *(img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio),
            *(drop_rate, drop_path_rate, norm_layer, ape, patch_norm, use_checkpoint, pad_maps),
        )

    def _check_window_change(self, img_size: Pair, window_size: Pair) -> None:
        resolution = patches_of(to_2tuple(img_size), self.patch_embed.patch_size, self.pad_maps)
        for number, stage in enumerate(self.layers, 1):
            built, wanted = stage.blocks[0].window_size, fit_window(resolution, window_size, 0)[0]
            if to_2tuple(built) != to_2tuple(wanted):
                raise ValueError(
                    f"img_size={img_size}, window_size={window_size}: stage {number} would have windows of {wanted}, "
                    f"but Swin-MLP's weights are for windows of {built}; choose sizes that keep them"
                )
            resolution = stage.next_resolution(resolution)
