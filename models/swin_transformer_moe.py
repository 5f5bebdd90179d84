"""Swin-MoE, so far without its mixture-of-experts layers: Swin V1's blocks with SwinV2's continuous position bias.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", https://arxiv.org/abs/2206.03382. Names, parameters and
initial weights are those of the official ``models/swin_transformer_moe.py``. As there, the model gives the logits and
an auxiliary loss, which is 0 without experts.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .backbone import Backbone, Stage
from .blocks import AttentionBlock
from .layers import Mlp, Pair, PatchEmbed, PatchMerging, window_partition, window_reverse
from .swin_transformer_v2 import ContinuousBias, check_window_sizes

__all__ = [
    "BasicLayer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "SwinTransformerBlock",
    "SwinTransformerMoE",
    "WindowAttention",
    "window_partition",
    "window_reverse",
]


class WindowAttention(ContinuousBias):
    """Multi-head attention within windows by scaled products, with SwinV2's continuous position bias.

    Args:
        window_size: (height, width), or one number for both.
        qk_scale: replaces 1 / sqrt(channels per head).
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
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
        pretrained_window_size: Pair = 0,
    ):
        super().__init__(dim, window_size, num_heads, pretrained_window_size)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.add_projections(qkv_bias, attn_drop, proj_drop)


class SwinTransformerBlock(AttentionBlock):
    """Attention in windows, shifted in every second block, then an MLP.

    Args:
        input_resolution: (H, W) of the map.
        mlp_fc2_bias: whether the MLP's second layer has a bias.
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
        is_moe: has experts; those and all that follow, but for ``pad_maps``, are not in this version.
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
        mlp_fc2_bias: bool = True,
        init_std: float = 0.02,
        pretrained_window_size: Pair = 0,
        is_moe: bool = False,
        num_local_experts: int = 1,
        top_value: int = 1,
        capacity_factor: float = 1.25,
        cosine_router: bool = False,
        normalize_gate: bool = False,
        use_bpr: bool = True,
        is_gshard_loss: bool = True,
        gate_noise: float = 1.0,
        cosine_router_dim: int = 256,
        cosine_router_init_t: float = 0.5,
        moe_drop: float = 0.0,
        pad_maps: bool = False,
    ):
        refuse_experts([[0]] if is_moe else [], "is_moe=True")
        super().__init__(
            *(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, drop_path, norm_layer, pad_maps),
            make_attention=lambda window: WindowAttention(
                dim, window, num_heads, qkv_bias, qk_scale, attn_drop, drop, pretrained_window_size
            ),
            make_mlp=lambda hidden: Mlp(dim, hidden, act_layer=act_layer, drop=drop, mlp_fc2_bias=mlp_fc2_bias),
        )


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
        mlp_fc2_bias: bool = True,
        init_std: float = 0.02,
        use_checkpoint: bool = False,
        pretrained_window_size: Pair = 0,
        moe_block: Sequence[int] = (-1,),
        num_local_experts: int = 1,
        top_value: int = 1,
        capacity_factor: float = 1.25,
        cosine_router: bool = False,
        normalize_gate: bool = False,
        use_bpr: bool = True,
        is_gshard_loss: bool = True,
        cosine_router_dim: int = 256,
        cosine_router_init_t: float = 0.5,
        gate_noise: float = 1.0,
        moe_drop: float = 0.0,
        pad_maps: bool = False,
    ):
        refuse_experts([moe_block], f"moe_block={list(moe_block)}")
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
            mlp_fc2_bias=mlp_fc2_bias,
            pretrained_window_size=pretrained_window_size,
            pad_maps=pad_maps,
        )

        super().__init__(
            dim, input_resolution, depth, window_size, drop_path, make_block, downsample, norm_layer, use_checkpoint
        )


class SwinTransformerMoE(Backbone):
    """Swin-MoE: images (B, in_chans, height, width) to logits (B, num_classes) and the weighted auxiliary loss.

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows, or (height, width); maps no larger than it are one window.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.
        mlp_fc2_bias: whether the second layer of MLPs has a bias.
        init_std: standard deviation of initial weights.
        pretrained_window_sizes: for each stage the window that weights were trained with; 0 says this one.
        moe_blocks: for each stage the numbers of its blocks that have experts; [-1] says none.
        pad_maps: take images of any size: maps are padded to whole windows, and a mask keeps padding out.
        others: of the experts, which this version does not have yet.

    Raises:
        ValueError: where ``moe_blocks`` names blocks, and where the maps of a stage are not a whole number of windows.
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
        mlp_fc2_bias: bool = True,
        init_std: float = 0.02,
        use_checkpoint: bool = False,
        pretrained_window_sizes: Sequence[Pair] = (0, 0, 0, 0),
        moe_blocks: Sequence[Sequence[int]] = ((-1,), (-1,), (-1,), (-1,)),
        num_local_experts: int = 1,
        top_value: int = 1,
        capacity_factor: float = 1.25,
        cosine_router: bool = False,
        normalize_gate: bool = False,
        use_bpr: bool = True,
        is_gshard_loss: bool = True,
        gate_noise: float = 1.0,
        cosine_router_dim: int = 256,
        cosine_router_init_t: float = 0.5,
        moe_drop: float = 0.0,
        aux_loss_weight: float = 0.01,
        pad_maps: bool = False,
    ):
        check_window_sizes(pretrained_window_sizes, depths)
        named = f"moe_blocks={[list(stage) for stage in moe_blocks]} (MODEL.SWIN_MOE.MOE_BLOCKS)"
        refuse_experts(moe_blocks, named)
        layer = partial(
            BasicLayer, qkv_bias=qkv_bias, qk_scale=qk_scale, attn_drop=attn_drop_rate, mlp_fc2_bias=mlp_fc2_bias
        )
        super().__init__(
            lambda i, **shared: layer(pretrained_window_size=pretrained_window_sizes[i], **shared),
            PatchMerging,
            *(img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio),
            *(drop_rate, drop_path_rate, norm_layer, ape, patch_norm, use_checkpoint, pad_maps, init_std),
        )

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, height, width) to pooled features (B, num_features) and the auxiliary loss."""
        x = super().forward_features(x)
        return x, x.new_zeros(())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | list[Tensor]:
        if self.out_indices:
            return self.forward_maps(x)
        x, auxiliary = self.forward_features(x)
        return self.forward_head(x), auxiliary

    @torch.jit.ignore
    def no_weight_decay_keywords(self) -> set[str]:
        return {
            "cpb_mlp",
            "relative_position_bias_table",
            "fc1_bias",
            "fc2_bias",
            "temperature",
            "cosine_projector",
            "sim_matrix",
        }


def refuse_experts(moe_blocks: Sequence[Sequence[int]], named: str) -> None:
    """Raise ``ValueError`` where blocks have experts: their layers are not in this version."""
    if any(block >= 0 for stage in moe_blocks for block in stage):
        raise ValueError(f"{named}: layers of experts are not in this version; [-1] for every stage is the dense model")
