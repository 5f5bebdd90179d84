"""What a backbone gives besides logits: the maps of its stages, and where its blocks attend.

B images, stage i has maps of H x W tokens with C channels: those of its last block, before patches are merged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from .attention import AttentionBase
from .layers import padded_resolution, window_partition

FORMATS = ("NCHW", "NHWC")


class Features:
    """Methods of a backbone that has ``embed``, ``layers`` and ``norm``."""

    out_indices: tuple[int, ...] = ()  # of `as_feature_backbone`

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """For each stage, in order: channels, pixels per token, and the module whose blocks make the map."""
        patch = self.patch_embed.patch_size
        info = []
        for i, stage in enumerate(self.layers):
            down, right = (side * 2**i for side in patch)
            reduction = down if down == right else (down, right)
            info.append({"num_chs": stage.dim, "reduction": reduction, "module": f"layers.{i}"})
        return info

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of stages, as timm's models give them.

        Args:
            x: images (B, in_chans, height, width).
            indices: numbers of stages, negative ones from the end; a number n takes the last n; None takes all.
            norm: apply the final norm to the last stage's map.
            stop_early: compute nothing behind the last map; the first result is then None.
            output_fmt: NCHW or NHWC.
            intermediates_only: give the maps alone.

        Returns:
            The pooled features (B, num_features), and the maps in the order of their stages.
        """
        if output_fmt not in FORMATS:
            raise ValueError(f"output_fmt={output_fmt!r}; choose from {list(FORMATS)}")
        wanted = take_indices(len(self.layers), indices)
        stop_early = stop_early or intermediates_only
        x, resolution = self.embed(x)
        maps = []
        for i, stage in enumerate(self.layers):
            x = stage.run_blocks(x, resolution)
            if i in wanted:
                tokens = self.norm(x) if norm and i == len(self.layers) - 1 else x
                tokens = tokens.unflatten(1, resolution)  # B, H, W, C
                maps.append(tokens.permute(0, 3, 1, 2) if output_fmt == "NCHW" else tokens)
            if stop_early and i == max(wanted):
                return maps if intermediates_only else (None, maps)
            x, resolution = stage.merge(x, resolution), stage.next_resolution(resolution)
        return self.pool(x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] | None = None, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of these stages do not need, for good. Returns the stages' numbers, ascending.

        Where the last stage is removed, a norm or head that stays is a new one of the width that is left.
        """
        wanted = take_indices(len(self.layers), indices)
        self.layers = self.layers[: max(wanted) + 1]
        self.num_layers, width = len(self.layers), self.num_features
        self.num_features = self.layers[-1].dim
        self.layers[-1].downsample = None
        if prune_norm:
            self.norm = nn.Identity()
        elif self.num_features != width:
            self.norm = self.norm_layer(self.num_features).to(self.patch_embed.proj.weight)
        if prune_head or self.num_features != width:
            self.reset_classifier(0 if prune_head else self.num_classes)
        return wanted

    def as_feature_backbone(self, out_indices: int | Sequence[int] | None = None, norms: bool = True) -> nn.Module:
        """Turn this model into a backbone for detection and segmentation, and return it.

        Calling it then gives a list of maps (B, C, H, W), one for each of ``out_indices``, in the order of stages. Head
        and final norm are gone; with ``norms`` each map has a new layer norm, ``norm0``, ``norm1``, …, as in the
        official detection code. `feature_info` tells channels and reduction of all stages.
        """
        for i in self.out_indices:  # of an earlier call
            delattr(self, f"norm{i}")
        self.out_indices = tuple(self.prune_intermediate_layers(out_indices, prune_norm=True))
        for i in self.out_indices:
            layer = self.norm_layer(self.layers[i].dim) if norms else nn.Identity()
            setattr(self, f"norm{i}", layer.to(self.patch_embed.proj.weight))
        return self

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Images to the maps of `as_feature_backbone`."""
        maps = self.forward_intermediates(x, self.out_indices, output_fmt="NHWC", intermediates_only=True)
        named = zip(self.out_indices, maps, strict=True)
        return [getattr(self, f"norm{i}")(tokens).permute(0, 3, 1, 2) for i, tokens in named]

    def attention_maps(self, x: Tensor, stage: int, block: int, query: tuple[int, int] | None = None) -> Tensor:
        """How much tokens attend to each other in a block, laid out on its map: no windows, no shift, no padding.

        Tokens that share no window do not see each other: there the map is 0. Nothing is dropped, as in evaluation.

        Args:
            x: images (B, in_chans, height, width).
            query: (row, column) of the token that attends; None stands for every token, and takes (H * W)^2 numbers.

        Returns:
            (B, nH, H, W) for a query, else (B, nH, H, W, H, W), the attending token first; the last two sum to 1.

        Raises:
            ValueError: where there is no such block, token, or attention.
        """
        attention = self._attention(stage, block)
        seen = []
        hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        training = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with torch.no_grad():
                self.forward_intermediates(x, [stage], intermediates_only=True)
        finally:
            hook.remove()
            for module, mode in training.items():
                module.training = mode
        maps, mask, shift = seen[0]
        places = window_places(tuple(maps.shape[1:3]), attention.window_size, to_2tuple(shift)).to(x.device)
        return unwindow(attention.weights(maps, mask, shift), places, tuple(maps.shape[1:3]), query)

    def _attention(self, stage: int, block: int) -> AttentionBase:
        depths = [stage.depth for stage in self.layers]
        if not (-len(depths) <= stage < len(depths) and -depths[stage] <= block < depths[stage]):
            raise ValueError(f"stage={stage}, block={block}: the model has stages of {depths} blocks")
        chosen = self.layers[stage].blocks[block]
        if not hasattr(chosen, "attn"):
            raise ValueError(f"{type(self).__name__} mixes tokens without attention, so it has no attention maps")
        return chosen.attn


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Numbers of stages, as `Features.forward_intermediates` takes them, from 0 to ``count`` - 1, ascending.

    Raises ``ValueError`` for stages that are not there.
    """
    if isinstance(indices, int) and not 1 <= indices <= count:
        raise ValueError(f"the last {indices} stages: choose from 1 to {count}")
    chosen = range(-(indices or count), 0) if indices is None or isinstance(indices, int) else list(indices)
    if not chosen or not all(-count <= i < count for i in chosen):
        raise ValueError(f"stages {list(chosen)}: choose from 0 to {count - 1}, or {-count} to -1 from the end")
    return sorted({i % count for i in chosen})


def window_places(resolution: tuple[int, int], window_size: tuple[int, int], shift_size: tuple[int, int]) -> Tensor:
    """For each token of each window its place on the map, row * W + column; -1 for padding. (nW, N)."""
    H, W = padded_resolution(resolution, window_size)
    rows, columns = torch.arange(H)[:, None], torch.arange(W)[None, :]
    places = torch.where((rows < resolution[0]) & (columns < resolution[1]), rows * resolution[1] + columns, -1)
    places = torch.roll(places, (-shift_size[0], -shift_size[1]), (0, 1))
    return window_partition(places[None, :, :, None], window_size).flatten(1)


def unwindow(weights: Tensor, places: Tensor, resolution: tuple[int, int], query: tuple[int, int] | None) -> Tensor:
    """Attention of windows (B, nW, nH, N, N) on their map: see `Features.attention_maps`.

    Raises ``ValueError`` for a query outside the map.
    """
    B, _, num_heads, _, _ = weights.shape
    H, W = resolution
    places = places.where(places >= 0, H * W)  # padding goes to one more place, which is dropped
    if query is None:
        full = weights.new_zeros(B, num_heads, H * W + 1, H * W + 1)
        full[:, :, places[:, :, None], places[:, None, :]] = weights.transpose(1, 2)
        return full[:, :, :-1, :-1].reshape(B, num_heads, H, W, H, W)
    if not (0 <= query[0] < H and 0 <= query[1] < W):
        raise ValueError(f"query={tuple(query)} is outside the {H}x{W} map of this block")
    window, token = (places == query[0] * W + query[1]).nonzero()[0].tolist()
    full = weights.new_zeros(B, num_heads, H * W + 1)
    full[:, :, places[window]] = weights[:, window, :, token]
    return full[:, :, :-1].unflatten(2, (H, W))
