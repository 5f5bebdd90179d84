"""What all variants share: the block's skeleton, a stage of blocks, the backbone of stages.

Variants override a step and pass their difference as arguments; wrapper modules would rename checkpoint keys.
B images, L = H * W tokens in image order, C channels.
"""

from collections.abc import Callable, Sequence

import torch
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Pair, PatchEmbed, check_input_size


def drop_path_layer(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0.0 else nn.Identity()


class Block(nn.Module):
    """Mix tokens, then channels, each with a residual (paper, equation 3). A subclass has ``norm1, drop_path, norm2,
    mlp`` and says how tokens are mixed."""

    def mix_tokens(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C), across tokens."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mix_tokens(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """Blocks on maps of one resolution, then, but for the last stage, a layer that merges patches."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        depth: int,
        make_block: Callable[[int], nn.Module],
        downsample: Callable[..., nn.Module] | None,
        norm_layer: Callable[[int], nn.Module],
        use_checkpoint: bool,
    ):
        super().__init__()
        self.dim = dim
        self.input_resolution = input_resolution
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(make_block(i) for i in range(depth))
        self.downsample = None
        if downsample is not None:
            self.downsample = downsample(input_resolution, dim=dim, norm_layer=norm_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C), or to (B, L/4, 2C) where patches are merged."""
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x if self.downsample is None else self.downsample(x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_resolution={self.input_resolution}, depth={self.depth}"

    def flops(self) -> float:
        merging = 0 if self.downsample is None else self.downsample.flops()
        return sum(block.flops() for block in self.blocks) + merging


class Backbone(nn.Module):
    """Patches, stages, norm, mean over tokens, head: images (B, in_chans, H, W) to logits (B, num_classes).

    Args:
        make_stage: called with the stage's index and the arguments that every variant's ``BasicLayer`` takes:
            ``dim, input_resolution, depth, window_size, mlp_ratio, drop, drop_path, norm_layer, downsample,
            use_checkpoint``.
        merging: the layer between two stages.
    """

    def __init__(
        self,
        make_stage: Callable[..., Stage],
        merging: Callable[..., nn.Module],
        *,
        img_size: Pair,
        patch_size: Pair,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        norm_layer: Callable[[int], nn.Module],
        ape: bool,
        patch_norm: bool,
        use_checkpoint: bool,
    ):
        super().__init__()
        _check_widths(embed_dim, depths, num_heads)
        check_input_size(img_size, patch_size, window_size, len(depths))
        self.num_classes = num_classes
        self.num_layers = len(depths)
        self.embed_dim = embed_dim
        self.ape = ape
        self.patch_norm = patch_norm
        self.num_features = embed_dim * 2 ** (self.num_layers - 1)
        self.mlp_ratio = mlp_ratio

        # The order of creation is part of the interface: under one seed it decides the initial weights.
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, norm_layer if patch_norm else None)
        self.patches_resolution = H, W = self.patch_embed.patches_resolution
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, H * W, embed_dim))
            trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()  # deeper blocks drop more often
        self.layers = nn.ModuleList()
        for i, depth in enumerate(depths):
            stage = make_stage(
                i,
                dim=embed_dim * 2**i,
                input_resolution=(H // 2**i, W // 2**i),
                depth=depth,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                norm_layer=norm_layer,
                downsample=merging if i < self.num_layers - 1 else None,
                use_checkpoint=use_checkpoint,
            )
            self.layers.append(stage)
        self.norm = norm_layer(self.num_features)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to pooled features (B, num_features)."""
        x = self.patch_embed(x)
        if self.ape:
            x = x + self.absolute_pos_embed
        x = self.pos_drop(x)
        for stage in self.layers:
            x = stage(x)
        x = self.norm(x)  # B, L, C
        return self.avgpool(x.transpose(1, 2)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def flops(self) -> float:
        """Multiply-adds of one image, by the official count (matrix products and norms)."""
        H, W = self.patches_resolution
        stages = sum(stage.flops() for stage in self.layers)
        last_norm = self.num_features * H * W // 2**self.num_layers
        return self.patch_embed.flops() + stages + last_norm + self.num_features * self.num_classes

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"absolute_pos_embed"}

    @torch.jit.ignore
    def no_weight_decay_keywords(self) -> set[str]:
        return {"relative_position_bias_table"}


def _check_widths(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    if len(depths) > len(num_heads):
        raise ValueError(f"depths={list(depths)} names more stages than num_heads={list(num_heads)}")
    for i, heads in enumerate(num_heads[: len(depths)]):
        if heads < 1 or (embed_dim * 2**i) % heads:
            raise ValueError(
                f"num_heads={list(num_heads)}: stage {i + 1} has {embed_dim * 2**i} channels, which "
                f"{heads} heads do not divide"
            )
