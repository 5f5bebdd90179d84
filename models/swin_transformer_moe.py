"""Swin-MoE: Swin V1's blocks with SwinV2's continuous position bias, and experts for the MLPs of some blocks.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", https://arxiv.org/abs/2206.03382. Names, parameters and,
but for experts and routers, initial weights are those of the official ``models/swin_transformer_moe.py``. As there, the
model gives the logits and an auxiliary loss, which is 0 without experts. B batch, L tokens of a map, C channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone, Stage
from .blocks import AttentionBlock, Resolution
from .expert_parallel import ExpertGroups, exclude_from_ddp, expert_groups
from .experts import local_experts
from .layers import Mlp, Pair, PatchEmbed, PatchMerging, window_partition, window_reverse
from .moe_mlp import MoEMlp
from .precision import in_native_precision
from .routers import Projection
from .swin_transformer_v2 import ContinuousBias, check_window_sizes

__all__ = [
    "BasicLayer",
    "Mlp",
    "MoEMlp",
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
    """Attention in windows, shifted in every second block, then an MLP or experts.

    With experts it gives the map and its auxiliary loss.

    Args:
        input_resolution: (H, W) of the map.
        mlp_fc2_bias: whether the second layers of the MLP or the experts have a bias.
        init_std: of the weights of experts.
        pretrained_window_size: of the window that weights were trained with, if not this one; 0 says this one.
        is_moe: has experts; all that follow, but for ``pad_maps``, are those of `MoEMlp`.
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
        **new: Any,
    ):
        def make_mlp(hidden: int) -> nn.Module:
            if not is_moe:
                return Mlp(dim, hidden, act_layer=act_layer, drop=drop, mlp_fc2_bias=mlp_fc2_bias)
            return MoEMlp(
                *(dim, hidden, num_local_experts, top_value, capacity_factor, cosine_router, normalize_gate, use_bpr),
                *(
                    is_gshard_loss,
                    gate_noise,
                    cosine_router_dim,
                    cosine_router_init_t,
                    moe_drop,
                    init_std,
                    mlp_fc2_bias,
                ),
                **new,
            )

        super().__init__(
            *(dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, drop_path, norm_layer, pad_maps),
            make_attention=lambda window: WindowAttention(
                dim, window, num_heads, qkv_bias, qk_scale, attn_drop, drop, pretrained_window_size
            ),
            make_mlp=make_mlp,
        )
        self.is_moe = is_moe
        bounded = capacity_factor > 0 and new.get("path", "capacity") == "capacity"
        self.mlps_per_token = top_value * (capacity_factor if bounded else 1) if is_moe else 1

    def forward(self, x: Tensor, resolution: Resolution | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if not self.is_moe:
            return super().forward(x, resolution)
        x = self.add_mixed(x, self.resolve(x, resolution))
        answer, loss = self.mlp(self.norm2(x))
        return x + self.drop_path(answer), loss

    def flops(self) -> float:
        """As officially, slots of experts count whether they are filled or not; but routers do not count."""
        H, W = self.input_resolution
        mlp = 2 * H * W * self.dim * self.dim * self.mlp_ratio
        return super().flops() + (self.mlps_per_token - 1) * mlp


class BasicLayer(Stage):
    """One stage: ``depth`` blocks, every second one with shifted windows, then the merging of patches.

    Args:
        moe_block: numbers of the blocks that have experts; [-1] says none.
    """

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
        **new: Any,
    ):
        numbers = iter(range(depth))
        make = partial(
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
            init_std=init_std,
            pretrained_window_size=pretrained_window_size,
            num_local_experts=num_local_experts,
            top_value=top_value,
            capacity_factor=capacity_factor,
            cosine_router=cosine_router,
            normalize_gate=normalize_gate,
            use_bpr=use_bpr,
            is_gshard_loss=is_gshard_loss,
            gate_noise=gate_noise,
            cosine_router_dim=cosine_router_dim,
            cosine_router_init_t=cosine_router_init_t,
            moe_drop=moe_drop,
            pad_maps=pad_maps,
            **new,
        )
        super().__init__(
            *(dim, input_resolution, depth, window_size, drop_path),
            lambda **own: make(is_moe=next(numbers) in moe_block, **own),
            *(downsample, norm_layer, use_checkpoint),
        )

    def run_with_loss(self, x: Tensor, resolution: Resolution | None = None) -> tuple[Tensor, Tensor]:
        """(B, L, C) to (B, L, C), and the sum of the blocks' auxiliary losses."""
        loss = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, resolution, use_reentrant=False)
            else:
                x = block(x, resolution)
            if block.is_moe:
                x, own = x
                loss = loss + own
        return x, loss

    def run_blocks(self, x: Tensor, resolution: Resolution | None = None) -> Tensor:
        return self.run_with_loss(x, resolution)[0]

    def forward(self, x: Tensor, resolution: Resolution | None = None) -> tuple[Tensor, Tensor]:
        """As `Stage.forward`, and the auxiliary loss."""
        x, loss = self.run_with_loss(x, resolution)
        return self.merge(x, resolution), loss


class SwinTransformerMoE(Backbone):
    """Swin-MoE: images (B, in_chans, height, width) to logits (B, num_classes) and the weighted auxiliary loss.

    Args:
        img_size: side of the images, or (height, width).
        window_size: side of the windows, or (height, width); maps no larger than it are one window.
        drop_path_rate: of the last block; it grows linearly from 0.
        ape: add a learnt absolute position embedding to the patches.
        mlp_fc2_bias: whether the second layers of MLPs and experts have a bias.
        init_std: standard deviation of initial weights.
        pretrained_window_sizes: for each stage the window that weights were trained with; 0 says this one.
        moe_blocks: for each stage the numbers of its blocks that have experts; [-1] says none.
        num_local_experts: experts of each process; -n says that n processes share one.
        aux_loss_weight: of the sum of all auxiliary losses.
        pad_maps: take images of any size: maps are padded to whole windows, and a mask keeps padding out.
        num_experts: experts in all, in place of ``num_local_experts``; 0 leaves it at that.
        expert_parallel: how many processes share one set of experts; 0 says all. More of them hold copies.
        backend, path, router, groups, top_groups, others: those of `MoEMlp`.

    Raises:
        ValueError: where the maps of a stage are not a whole number of windows, and for experts that cannot be.
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
        num_experts: int = 0,
        expert_parallel: int = 0,
        backend: str = "native",
        path: str = "capacity",
        router: str = "flat",
        groups: int = 1,
        top_groups: int = 1,
    ):
        check_window_sizes(pretrained_window_sizes, depths)
        processes, with_experts = ExpertGroups(), has_experts(moe_blocks, depths)
        if with_experts:
            processes = expert_groups(expert_parallel)
            num_local_experts = local_experts(num_experts, processes.size) if num_experts else num_local_experts
        layer = partial(
            BasicLayer,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop_rate,
            mlp_fc2_bias=mlp_fc2_bias,
            init_std=init_std,
            num_local_experts=num_local_experts,
            top_value=top_value,
            capacity_factor=capacity_factor,
            cosine_router=cosine_router,
            normalize_gate=normalize_gate,
            use_bpr=use_bpr,
            is_gshard_loss=is_gshard_loss,
            gate_noise=gate_noise,
            cosine_router_dim=cosine_router_dim,
            cosine_router_init_t=cosine_router_init_t,
            moe_drop=moe_drop,
            backend=backend,
            path=path,
            router=router,
            groups=groups,
            top_groups=top_groups,
            group=processes,
        )
        super().__init__(
            lambda i, **shared: layer(
                pretrained_window_size=pretrained_window_sizes[i], moe_block=moe_blocks[i], **shared
            ),
            PatchMerging,
            *(img_size, patch_size, in_chans, num_classes, embed_dim, depths, num_heads, window_size, mlp_ratio),
            *(drop_rate, drop_path_rate, norm_layer, ape, patch_norm, use_checkpoint, pad_maps, init_std),
        )
        self.has_experts = with_experts
        self.aux_loss_weight = aux_loss_weight
        exclude_from_ddp(self)

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, Projection):  # routers and experts have drawn theirs
            super()._init_weights(module)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, in_chans, height, width) to pooled features (B, num_features) and the auxiliary loss."""
        if self.has_experts and not x.shape[0]:
            return self._answer_others()
        x, resolution = self.embed(x)
        loss = x.new_zeros((), dtype=torch.float32)
        for stage in self.layers:
            x, own = stage(x, resolution)
            loss = loss + own
            resolution = stage.next_resolution(resolution)
        return self.pool(x), loss

    def _answer_others(self) -> tuple[Tensor, Tensor]:
        """What `forward_features` gives without images; the experts here serve the processes that have some."""
        if torch.is_grad_enabled():
            raise ValueError("a batch without images: in training every process needs at least one")
        weight = self.patch_embed.proj.weight
        for module in self.modules():
            if isinstance(module, MoEMlp):
                module(weight.new_zeros(0, 1, module.in_features))
        return weight.new_zeros(0, self.num_features), weight.new_zeros((), dtype=torch.float32)

    @in_native_precision
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | list[Tensor]:
        """Images (B, in_chans, height, width) to logits (B, num_classes) and the weighted auxiliary loss.

        Processes that share experts must call it equally often; B may differ and, in evaluation, be 0.
        """
        if self.out_indices:
            return self.forward_maps(x)
        x, loss = self.forward_features(x)
        return self.forward_head(x), self.aux_loss_weight * loss

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


def has_experts(moe_blocks: Sequence[Sequence[int]], depths: Sequence[int]) -> bool:
    """Whether any block has experts. Raises ``ValueError`` where ``moe_blocks`` names blocks that are not there."""
    named = f"moe_blocks={[list(stage) for stage in moe_blocks]} (MODEL.SWIN_MOE.MOE_BLOCKS)"
    if len(moe_blocks) < len(depths):
        raise ValueError(f"{named}: give a list for each of the {len(depths)} stages; [-1] says no experts")
    for i, (blocks, depth) in enumerate(zip(moe_blocks, depths, strict=False)):
        if any(not -1 <= block < depth for block in blocks):
            raise ValueError(f"{named}: stage {i + 1} has blocks 0 to {depth - 1}; [-1] says no experts")
    return any(block >= 0 for blocks in moe_blocks for block in blocks)
