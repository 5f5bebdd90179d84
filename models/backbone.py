"""What all variants share besides blocks: a stage of blocks, the backbone of stages.

Variants override a step and pass their difference as arguments; wrapper modules would rename checkpoint keys.
B images, L = H * W tokens in image order, C channels. A ``resolution`` is (H, W) in tokens; where it may be None it
is the one that the module was built for, or given by ``set_input_size``.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import resize_position_embedding

from . import memory
from .blocks import Resolution
from .features import Features
from .layers import (
    Pair,
    PatchEmbed,
    as_pair,
    check_input_size,
    half_window,
    merged_resolution,
)
from .linear import is_hooked, kernel_is_faster, runs_plainly
from .precision import in_native_precision

# Bytes of an MLP's hidden values for which its images go through a stage together on a CPU. Found by trying 1.5 to
# 20 MiB: all of a block stays in the cache then, and the allocator hands out warm pages again.
CACHED = 10 * 2**20


class Stage(nn.Module):
    """Blocks on maps of one resolution, then, but for the last stage, a layer that merges patches.

    Args:
        make_block: called with a block's ``shift_size`` and ``drop_path``.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: Resolution,
        depth: int,
        window_size: Pair,
        drop_path: float | Sequence[float],
        make_block: Callable[..., nn.Module],
        downsample: Callable[..., nn.Module] | None,
        norm_layer: Callable[[int], nn.Module],
        use_checkpoint: bool,
    ):
        super().__init__()
        self.dim = dim
        self.input_resolution = tuple(input_resolution)
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        rates = drop_path if isinstance(drop_path, Sequence) else [drop_path] * depth
        self.blocks = nn.ModuleList(
            make_block(shift_size=self._shift(i, window_size), drop_path=rates[i]) for i in range(depth)
        )
        self.downsample = None
        if downsample is not None:
            self.downsample = downsample(input_resolution, dim=dim, norm_layer=norm_layer)

    @staticmethod
    def _shift(i: int, window_size: Pair) -> Pair:
        """Windows of every second block are shifted (paper, section 3.2)."""
        return 0 if i % 2 == 0 else half_window(as_pair(window_size))

    def set_input_size(self, resolution: Resolution, window_size: Pair | None = None) -> None:
        self.input_resolution = tuple(resolution)
        for i, block in enumerate(self.blocks):
            block.set_input_size(resolution, window_size, None if window_size is None else self._shift(i, window_size))
        if self.downsample is not None:
            self.downsample.input_resolution = self.input_resolution

    def forward(self, x: Tensor, resolution: Resolution | None = None) -> Tensor:
        """(B, L, C) to (B, L, C), or to (B, L/4, 2C) where patches are merged."""
        return self.merge(self.run_blocks(x, resolution), resolution)

    def run_blocks(self, x: Tensor, resolution: Resolution | None = None) -> Tensor:
        """(B, L, C) to (B, L, C): the map that detection and segmentation use."""
        parts = self._parts(x)
        if len(parts) > 1:
            return torch.cat([self._run_blocks(part, resolution) for part in parts])
        return self._run_blocks(x, resolution)

    def _run_blocks(self, x: Tensor, resolution: Resolution | None) -> Tensor:
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, resolution, use_reentrant=False)
            else:
                x = block(x, resolution)
        return x

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images that go through the blocks together: in inference on a CPU, as many as its caches hold.

        Not where hooks would see parts of the batch, nor in float32 for kernels that keep an MLP's values in the cache
        anyway; in bfloat16 attention gains by it.
        """
        if not runs_plainly() or x.device.type != "cpu":
            return (x,)
        memory.keep_some()
        if self.training or torch.is_grad_enabled() or any(is_hooked(module) for module in self.modules()):
            return (x,)
        if x.dtype == torch.float32 and kernel_is_faster():
            return (x,)
        hidden = 4 * x[:1].numel() * x.element_size()  # bytes within an MLP, the widest of a block
        return x.split(max(1, CACHED // max(1, hidden)))

    def merge(self, x: Tensor, resolution: Resolution | None = None) -> Tensor:
        return x if self.downsample is None else self.downsample(x, resolution)

    def next_resolution(self, resolution: Resolution) -> Resolution:
        return resolution if self.downsample is None else merged_resolution(resolution)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_resolution={self.input_resolution}, depth={self.depth}"

    def flops(self) -> float:
        merging = 0 if self.downsample is None else self.downsample.flops()
        return sum(block.flops() for block in self.blocks) + merging


class Backbone(Features, nn.Module):
    """Patches, stages, norm, mean over tokens, head: images (B, in_chans, height, width) to logits (B, num_classes).

    Args:
        make_stage: called with the stage's index and the arguments that every variant's ``BasicLayer`` takes:
            ``dim, input_resolution, depth, num_heads, window_size, mlp_ratio, drop, drop_path, norm_layer, downsample,
            use_checkpoint, pad_maps``.
        merging: the layer between two stages.
        init_std: of the weights of linear layers.
        pad_maps: take images of any size. Maps are padded to whole windows, and a mask keeps padding out.

    Raises:
        ValueError: where the maps of a stage are not a whole number of windows; the message names sizes that work.
    """

    def __init__(
        self,
        make_stage: Callable[..., Stage],
        merging: Callable[..., nn.Module],
        img_size: Pair,
        patch_size: Pair,
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Pair,
        mlp_ratio: float,
        drop_rate: float,
        drop_path_rate: float,
        norm_layer: Callable[[int], nn.Module],
        ape: bool,
        patch_norm: bool,
        use_checkpoint: bool,
        pad_maps: bool,
        init_std: float = 0.02,
    ):
        super().__init__()
        img_size, patch_size, window_size = as_pair(img_size), as_pair(patch_size), as_pair(window_size)
        _check_widths(embed_dim, depths, num_heads)
        check_input_size(img_size, patch_size, window_size, len(depths), pad_maps)
        self.num_classes = num_classes
        self.num_layers = len(depths)
        self.embed_dim = embed_dim
        self.ape = ape
        self.patch_norm = patch_norm
        self.num_features = embed_dim * 2 ** (self.num_layers - 1)
        self.mlp_ratio = mlp_ratio
        self.window_size = window_size
        self.pad_maps = pad_maps
        self.init_std = init_std
        self.norm_layer = norm_layer

        # The order of creation is part of the interface: under one seed it decides the initial weights.
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, norm_layer if patch_norm else None, pad_maps
        )
        self.patches_resolution = self.patch_embed.patches_resolution
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
            trunc_normal_(self.absolute_pos_embed, std=init_std)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()  # deeper blocks drop more often
        self.layers = nn.ModuleList()
        resolution = tuple(self.patches_resolution)
        for i, depth in enumerate(depths):
            stage = make_stage(
                i,
                dim=embed_dim * 2**i,
                input_resolution=resolution,
                depth=depth,
                num_heads=num_heads[i],
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=rates[sum(depths[:i]) : sum(depths[: i + 1])],
                norm_layer=norm_layer,
                downsample=partial(merging, pad_maps=pad_maps) if i < self.num_layers - 1 else None,
                use_checkpoint=use_checkpoint,
                pad_maps=pad_maps,
            )
            self.layers.append(stage)
            resolution = stage.next_resolution(resolution)
        self.norm = norm_layer(self.num_features)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv1d)):  # Conv1d: across the tokens of Swin-MLP's windows
            trunc_normal_(module.weight, std=self.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def set_input_size(self, img_size: Pair | None = None, window_size: Pair | None = None) -> None:
        """Take images of another size, or cut maps into windows of another size; None keeps what is.

        What was learnt of positions is resized as for a checkpoint of other sizes. Parameters may be replaced, so make
        the optimizer, and wrap the model in DDP or compile it, afterwards.

        Raises ``ValueError`` where the sizes do not fit, and changes nothing then.
        """
        img_size = self.patch_embed.img_size if img_size is None else as_pair(img_size)
        window_size = self.window_size if window_size is None else as_pair(window_size)
        self._check_window_change(img_size, window_size)
        check_input_size(img_size, self.patch_embed.patch_size, window_size, self.num_layers, self.pad_maps)
        old = tuple(self.patches_resolution)
        self.window_size = window_size
        self.patch_embed.set_input_size(img_size)
        self.patches_resolution = self.patch_embed.patches_resolution
        resolution = tuple(self.patches_resolution)
        if self.ape and resolution != old:
            resized = resize_position_embedding(self.absolute_pos_embed.detach(), old, resolution)
            self.absolute_pos_embed = nn.Parameter(resized, self.absolute_pos_embed.requires_grad)
        for stage in self.layers:
            stage.set_input_size(resolution, window_size)
            resolution = stage.next_resolution(resolution)

    def _check_window_change(self, img_size: Pair, window_size: Pair) -> None:
        """Raise ``ValueError`` where weights cannot follow such a change. Attention's always can."""

    def embed(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Resolution]:
        """Images (B, in_chans, height, width) to tokens (B, L, embed_dim), and the (H, W) of their map.

        With a mask (B, H, W), patches are hidden where it is 1 (`simmim`).
        """
        size = tuple(x.shape[2:])
        x = self.patch_embed(x)
        resolution = self.patch_embed.resolution_of(size)
        if mask is not None:
            x = self.hide(x, mask)
        return self.pos_drop(self.add_positions(x, resolution)), resolution

    def add_positions(self, x: Tensor, resolution: Resolution) -> Tensor:
        """Add the absolute position embedding, if there is one, resized to maps of another resolution."""
        if not self.ape:
            return x
        built_for, embedding = tuple(self.patches_resolution), self.absolute_pos_embed
        if resolution != built_for:
            embedding = resize_position_embedding(embedding, built_for, resolution)
        return x + embedding

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, height, width) to pooled features (B, num_features)."""
        return self.pool(self.run_stages(*self.embed(x))[0])

    def run_stages(self, x: Tensor, resolution: Resolution) -> tuple[Tensor, Resolution]:
        """Tokens and their map's (H, W) to those of the last stage."""
        for stage in self.layers:
            x = stage(x, resolution)
            resolution = stage.next_resolution(resolution)
        return x, resolution

    def pool(self, x: Tensor) -> Tensor:
        """Tokens (B, L, num_features) to their normalised mean (B, num_features)."""
        return self.avgpool(self.norm(x).transpose(1, 2)).flatten(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pooled features (B, num_features) to logits (B, num_classes)."""
        return x if pre_logits else self.head(x)

    @in_native_precision
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices:
            return self.forward_maps(x)
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of ``num_classes``, initialised as at construction; 0 removes it.

        ``global_pool``: as timm's models take it; only the mean ("avg") is there.
        """
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}; these models pool by the mean: 'avg'")
        place = self.patch_embed.proj.weight
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        self.head.apply(self._init_weights)
        self.head.to(place.device, place.dtype)

    def get_classifier(self) -> nn.Module:
        return self.head

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
