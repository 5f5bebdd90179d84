"""Swin Transformer: attention in shifted windows. B batch, H x W a map, L tokens, N tokens per window, nH heads.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", https://arxiv.org/abs/2103.14030.
Names, arguments, parameters and initial weights are those of the official ``models/swin_transformer.py``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple, trunc_normal_
from torch import Tensor, nn

from .attention import AttentionBase
from .backbone import Backbone, Block, Stage, drop_path_layer
from .layers import (
    Linear,
    Mlp,
    Pair,
    PatchEmbed,
    PatchMerging,
    fit_window,
    relative_position_index,
    shift_mask,
    window_partition,
    window_reverse,
)

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
        window_size: (height, width).
        qk_scale: replaces 1 / sqrt(channels per head).
    """

    def __init__(
        self,
        dim: int,
        window_size: tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.dim = dim
        self.window_size = h, w = to_2tuple(window_size)
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * h - 1) * (2 * w - 1), num_heads))
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def packed_qkv(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def position_bias(self) -> Tensor:
        # An embedding's backward is deterministic; that of plain indexing adds in any order, on CPU too.
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)  # N, N, nH
        return bias.permute(2, 0, 1).contiguous()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"

    def flops(self, N: int) -> int:
        """Multiply-adds of one window of N tokens."""
        projections = 4 * N * self.dim * self.dim
        products = 2 * self.num_heads * N * N * (self.dim // self.num_heads)
        return projections + products


class SwinTransformerBlock(Block):
    """Attention in windows, shifted in every second block, then an MLP.

    Args:
        input_resolution: (H, W) of the map.
        fused_window_process: accepted for compatibility; backends are chosen in `models.attention`.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 7,
        shift_size: int = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_window_process: bool = False,
    ):
        super().__init__()
        self.dim = dim
        self.input_resolution = input_resolution
        self.num_heads = num_heads
        self.window_size, self.shift_size = fit_window(input_resolution, window_size, shift_size)
        self.mlp_ratio = mlp_ratio
        self.fused_window_process = fused_window_process

        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim, to_2tuple(self.window_size), num_heads, qkv_bias, qk_scale, attn_drop, proj_drop=drop
        )
        self.drop_path = drop_path_layer(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)
        mask = shift_mask(input_resolution, self.window_size, self.shift_size) if self.shift_size > 0 else None
        self.register_buffer("attn_mask", mask)

    def mix_tokens(self, x: Tensor) -> Tensor:
        H, W = self.input_resolution
        B, L, C = x.shape
        if L != H * W:
            raise ValueError(f"{L} tokens are not the {H}x{W} map that this block was built for")
        return self.attn(x.view(B, H, W, C), self.attn_mask, self.shift_size).view(B, L, C)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, input_resolution={self.input_resolution}, num_heads={self.num_heads}, "
            f"window_size={self.window_size}, shift_size={self.shift_size}, mlp_ratio={self.mlp_ratio}"
        )

    def flops(self) -> float:
        H, W = self.input_resolution
        windows = H * W / self.window_size**2
        norms = 2 * self.dim * H * W
        mlp = 2 * H * W * self.dim * self.dim * self.mlp_ratio
        return norms + windows * self.attn.flops(self.window_size**2) + mlp


class BasicLayer(Stage):
    """One stage: ``depth`` blocks, every second one with shifted windows, then the merging of patches."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        depth: int,
        num_heads: int,
        window_size: int,
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
    ):
        def make_block(i: int) -> SwinTransformerBlock:
            return SwinTransformerBlock(
                dim,
                input_resolution,
                num_heads,
                window_size,
                shift_size=0 if i % 2 == 0 else window_size // 2,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                qk_scale=qk_scale,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=drop_path[i] if isinstance(drop_path, Sequence) else drop_path,
                norm_layer=norm_layer,
                fused_window_process=fused_window_process,
            )

        super().__init__(dim, input_resolution, depth, make_block, downsample, norm_layer, use_checkpoint)


class SwinTransformer(Backbone):
    """Swin Transformer for classification: images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows; maps no larger than it are one window.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.

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
        window_size: int = 7,
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
    ):
        attention = partial(
            BasicLayer,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop_rate,
            fused_window_process=fused_window_process,
        )
        super().__init__(
            lambda i, **shared: attention(num_heads=num_heads[i], **shared),
            PatchMerging,
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=norm_layer,
            ape=ape,
            patch_norm=patch_norm,
            use_checkpoint=use_checkpoint,
        )
