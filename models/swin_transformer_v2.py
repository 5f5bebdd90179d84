"""Swin Transformer V2: cosine attention, a bias from a small MLP on log-spaced offsets, norms after each step.

Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", https://arxiv.org/abs/2111.09883.
Names, arguments, parameters and initial weights are those of the official ``models/swin_transformer_v2.py``.
B batch, H x W a map, L tokens, N tokens per window, nH heads.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .attention import AttentionBase
from .backbone import Backbone, Stage
from .blocks import AttentionBlock
from .layers import (
    Mlp,
    Pair,
    PatchEmbed,
    linear,
    relative_coords_table,
    window_partition,
    window_reverse,
)
from .layers import PatchMerging as PatchMergingV1

__all__ = [
    "BasicLayer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformerBlock",
    "SwinTransformerV2",
    "WindowAttention",
    "window_partition",
    "window_reverse",
]

MAX_LOG_SCALE = math.log(100.0)  # cosines are multiplied by 100 at most (section 3.2)


class ContinuousBias(AttentionBase):
    """Attention whose bias an MLP computes from log-spaced offsets, so that it fits windows of any size (section 3.3).

    Args:
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
    """

    def __init__(self, dim: int, window_size: Pair, num_heads: int, pretrained_window_size: Pair = 0):
        super().__init__(dim, window_size, num_heads)
        self.pretrained_window_size = pretrained_window_size
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512, bias=True), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False)
        )
        self.register_buffer("relative_coords_table", relative_coords_table(self.window_size, pretrained_window_size))

    def bias_table(self) -> Tensor:
        return self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)

    def fit_bias(self, window_size: tuple[int, int]) -> None:
        """The offsets keep their scale: as officially, the old window becomes the pre-trained one."""
        pairs = zip(to_2tuple(self.pretrained_window_size), self.window_size, strict=True)
        self.pretrained_window_size = trained = tuple(before or side for before, side in pairs)
        table = relative_coords_table(window_size, trained)
        self.relative_coords_table = table.to(self.relative_coords_table)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pretrained_window_size={self.pretrained_window_size}"


class WindowAttention(ContinuousBias):
    """Multi-head attention within windows by scaled cosines (equation 2).

    Args:
        window_size: (height, width), or one number for both.
        qkv_bias: add a learnt bias to q and v; k has none.
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
    """

    def __init__(
        self,
        dim: int,
        window_size: Pair,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: Pair = 0,
    ):
        super().__init__(dim, window_size, num_heads, pretrained_window_size)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.add_projections(False, attn_drop, proj_drop)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def packed_qkv(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return linear(x, self.qkv.weight, bias)

    def cosine_scale(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOG_SCALE).exp()

    def bias_table(self) -> Tensor:
        return 16 * torch.sigmoid(super().bias_table())


class SwinTransformerBlock(AttentionBlock):
    """Attention in windows, then an MLP; each output is normalised before it is added (figure 1).

    Args:
        input_resolution: (H, W) of the map.
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
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
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        pretrained_window_size: Pair = 0,
        pad_maps: bool = False,
    ):
        super().__init__(
            *(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, drop_path, norm_layer, pad_maps),
            make_attention=lambda window: WindowAttention(
                dim, window, num_heads, qkv_bias, attn_drop, drop, pretrained_window_size
            ),
            make_mlp=lambda hidden: Mlp(dim, hidden, act_layer=act_layer, drop=drop),
        )

    def forward(self, x: Tensor, resolution: tuple[int, int] | None = None) -> Tensor:
        x = x + self.drop_path(self.norm1(self.mix_tokens(x, self.resolve(x, resolution))))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class PatchMerging(PatchMergingV1):
    """Each 2x2 neighbourhood becomes one token of twice the channels; the norm comes last."""

    def norm_width(self) -> int:
        return 2 * self.dim

    def merge(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))

    def flops(self) -> int:
        H, W = self.input_resolution
        return self.reduction_flops() + H * W * self.dim // 2


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
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        pretrained_window_size: Pair = 0,
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
            drop=drop,
            attn_drop=attn_drop,
            norm_layer=norm_layer,
            pretrained_window_size=pretrained_window_size,
            pad_maps=pad_maps,
        )

        super().__init__(
            dim, input_resolution, depth, window_size, drop_path, make_block, downsample, norm_layer, use_checkpoint
        )

    def zero_norms(self) -> None:
        """Start as the identity: what each step adds is scaled by 0."""
        for block in self.blocks:
            for norm in (block.norm1, block.norm2):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)


class SwinTransformerV2(Backbone):
    """Swin Transformer V2 for classification: images (B, in_chans, height, width) to logits (B, num_classes).

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows, or (height, width); maps no larger than it are one window.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.
        pretrained_window_sizes: for each stage the window that weights were trained with; 0 says this one.
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
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        pretrained_window_sizes: Sequence[Pair] = (0, 0, 0, 0),
        pad_maps: bool = False,
    ):
        check_window_sizes(pretrained_window_sizes, depths)
        layer = partial(BasicLayer, qkv_bias=qkv_bias, attn_drop=attn_drop_rate)
        super().__init__(
            lambda i, **shared: layer(pretrained_window_size=pretrained_window_sizes[i], **shared),
            PatchMerging,
            *(img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio),
            *(drop_rate, drop_path_rate, norm_layer, ape, patch_norm, use_checkpoint, pad_maps),
        )
        for stage in self.layers:
            stage.zero_norms()

    @torch.jit.ignore
    def no_weight_decay_keywords(self) -> set[str]:
        return {"cpb_mlp", "logit_scale", "relative_position_bias_table"}


def check_window_sizes(pretrained_window_sizes: Sequence[Pair], depths: Sequence[int]) -> None:
    if len(pretrained_window_sizes) < len(depths):
        raise ValueError(
            f"pretrained_window_sizes={list(pretrained_window_sizes)} names fewer stages than depths={list(depths)}"
        )
