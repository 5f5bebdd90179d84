"""Swin Transformer: attention in shifted windows. B batch, H x W a map, L tokens, N tokens per window, nH heads.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", https://arxiv.org/abs/2103.14030.
Names, arguments, parameters and initial weights are those of the official ``models/swin_transformer.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from checkpoint import resize_bias_table

from .attention import AttentionBase
from .backbone import Backbone, Stage
from .blocks import AttentionBlock
from .layers import Mlp, Pair, PatchEmbed, PatchMerging, window_partition, window_reverse

__all__ = [
    "BasicLayer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformer",
    "SwinTransformerBlock",
    "WindowAttention",
    "window_partition",
    "window_reverse",
]


class WindowAttention(AttentionBase):
    """Multi-head attention within windows, with a learnt bias for each relative position (paper, equation 4).

    Args:
        window_size: (height, width), or one number for both.
        qk_scale: replaces 1 / sqrt(channels per head).
    """

    def __init__(
        self,
        dim: int,
        window_size: Pair,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, window_size, num_heads)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        h, w = self.window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), num_heads))
        self.add_projections(qkv_bias, attn_drop, proj_drop)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self) -> Tensor:
        return self.relative_position_bias_table

    def fit_bias(self, window_size: tuple[int, int]) -> None:
        table = self.relative_position_bias_table
        resized = resize_bias_table(table.detach(), self.window_size, window_size)
        self.relative_position_bias_table = nn.Parameter(resized, table.requires_grad)


class SwinTransformerBlock(AttentionBlock):
    """Attention in windows, shifted in every second block, then an MLP.

    Args:
        input_resolution: (H, W) of the map.
        fused_window_process: attend by the backend ``window_process``; `set_attention_backend` chooses anew.
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
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_window_process: bool = False,
        pad_maps: bool = False,
    ):
        super().__init__(
            *(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, drop_path, norm_layer, pad_maps),
            make_attention=lambda window: WindowAttention(
                dim, window, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop=drop
            ),
            make_mlp=lambda hidden: Mlp(dim, hidden, act_layer=act_layer, drop=drop),
        )
        self.fused_window_process = fused_window_process
        if fused_window_process:
            self.attn.backend = "window_process"


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
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        fused_window_process: bool = False,
        pad_maps: bool = False,
    ):
        make_block = partial(
            SwinTransformerBlock,
            dim,
            input_resolution,
            num_heads,
            window_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop,
            attn_drop=attn_drop,
            norm_layer=norm_layer,
            fused_window_process=fused_window_process,
            pad_maps=pad_maps,
        )

        super().__init__(
            dim, input_resolution, depth, window_size, drop_path, make_block, downsample, norm_layer, use_checkpoint
        )


class SwinTransformer(Backbone):
    """Swin Transformer for classification: images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows, or (height, width); maps no larger than it are one window.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.
        pad_maps: take images of any size: maps are padded to whole windows, and a mask keeps padding out.

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
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        fused_window_process: bool = False,
        pad_maps: bool = False,
    ):
        layer = partial(
            BasicLayer,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop_rate,
            fused_window_process=fused_window_process,
        )
        super().__init__(
            lambda i, **shared: layer(**shared),
            PatchMerging,
            *(img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio),
            *(drop_rate, drop_path_rate, norm_layer, ape, patch_norm, use_checkpoint, pad_maps),
        )
