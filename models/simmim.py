"""SimMIM: hide patches, encode the rest, predict the hidden pixels with one linear layer.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", https://arxiv.org/abs/2111.09886. Names,
arguments and parameters are those of the official ``models/simmim.py``. B images, C channels, H x W a map of patches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .arguments import model_arguments
from .precision import in_native_precision
from .swin_transformer import SwinTransformer
from .swin_transformer_v2 import SwinTransformerV2


class MaskedEncoder:
    """What the encoders of SimMIM add to a backbone: a learnt token in the place of hidden patches (section 3.2)."""

    def add_mask_token(self) -> None:
        assert self.num_classes == 0
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        trunc_normal_(self.mask_token, std=0.02)

    def hide(self, x: Tensor, mask: Tensor) -> Tensor:
        """Replace tokens (B, L, C) by the mask token where ``mask`` (B, H, W) is 1."""
        hidden = mask.flatten(1).unsqueeze(-1).to(x.dtype)  # B, L, 1
        return x * (1 - hidden) + self.mask_token * hidden

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | list[Tensor]:
        """Images (B, C, height, width) and a mask (B, H, W) of patches to the last map (B, num_features, H/8, W/8).

        Without a mask nothing is hidden.
        """
        if self.out_indices:
            return self.forward_maps(x)
        x, resolution = self.run_stages(*self.embed(x, mask))
        return self.norm(x).transpose(1, 2).unflatten(2, resolution).contiguous()  # as DDP wants the decoder's gradient

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"mask_token"}


class SwinTransformerForSimMIM(MaskedEncoder, SwinTransformer):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_mask_token()


class SwinTransformerV2ForSimMIM(MaskedEncoder, SwinTransformerV2):
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_mask_token()


ENCODERS = {"swin": SwinTransformerForSimMIM, "swinv2": SwinTransformerV2ForSimMIM}


class SimMIM(nn.Module):
    """Encoder, one linear layer from each token of the last map to its pixels, and the loss on hidden pixels.

    Args:
        config: holds ``NORM_TARGET.ENABLE`` and ``NORM_TARGET.PATCH_SIZE``, of `norm_targets`.
        encoder_stride: pixels along a side of a token of the encoder's last map.
        patch_size: pixels along a side of a patch.
    """

    def __init__(self, config: Any, encoder: nn.Module, encoder_stride: int, in_chans: int, patch_size: int):
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.encoder_stride = encoder_stride
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, encoder_stride**2 * in_chans, kernel_size=1),
            nn.PixelShuffle(encoder_stride),
        )
        self.in_chans = in_chans
        self.patch_size = patch_size

    @in_native_precision
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The mean absolute error on hidden pixels, of images (B, C, height, width) and a mask (B, H, W)."""
        prediction, hidden = self.decoder(self.encoder(x, mask)), self.hidden_pixels(mask)
        errors = F.l1_loss(prediction, self.targets(x), reduction="none") * hidden
        return errors.sum() / (hidden.sum() + 1e-5) / self.in_chans

    def targets(self, x: Tensor) -> Tensor:
        target = self.config.NORM_TARGET
        return norm_targets(x, target.PATCH_SIZE) if target.ENABLE else x

    def hidden_pixels(self, mask: Tensor) -> Tensor:
        """A mask of patches (B, H, W) as one of pixels (B, 1, height, width)."""
        return mask.repeat_interleave(self.patch_size, 1).repeat_interleave(self.patch_size, 2).unsqueeze(1)

    @torch.no_grad()
    @in_native_precision
    def reconstruct(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each image (B,), and the predicted images (B, C, height, width), normalised as ``x`` is."""
        prediction, hidden = self.decoder(self.encoder(x, mask)).to(x.dtype), self.hidden_pixels(mask)
        errors = (prediction - self.targets(x)).abs() * hidden
        loss = errors.flatten(1).sum(1) / (hidden.flatten(1).sum(1) + 1e-5) / self.in_chans
        if self.config.NORM_TARGET.ENABLE:
            mean, deviation = window_statistics(x, self.config.NORM_TARGET.PATCH_SIZE)
            prediction = prediction * deviation + mean
        return loss, prediction

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    @torch.jit.ignore
    def no_weight_decay_keywords(self) -> set[str]:
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay_keywords()}


def norm_targets(targets: Tensor, patch_size: int) -> Tensor:
    """Each pixel normalised by mean and deviation of the window of side ``patch_size`` around it, within the image.

    Raises ``ValueError`` for a side that is even, or 1.
    """
    mean, deviation = window_statistics(targets, patch_size)
    return (targets - mean) / deviation


def window_statistics(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and (unbiased) deviation around each pixel, of `norm_targets`; both (B, C, height, width)."""
    check_window_side(patch_size)

    def window_mean(x: Tensor, of_whole_window: bool = False) -> Tensor:
        return F.avg_pool2d(x, patch_size, stride=1, padding=patch_size // 2, count_include_pad=of_whole_window)

    mean = window_mean(images)
    count = window_mean(torch.ones_like(images), of_whole_window=True) * patch_size**2
    variance = (window_mean(images**2) - mean**2) * (count / (count - 1))
    return mean, (variance.clamp(min=0.0) + 1e-6) ** 0.5


def check_window_side(patch_size: int) -> None:
    if patch_size % 2 == 0 or patch_size < 3:
        raise ValueError(f"patch_size={patch_size} (MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE) must be odd and at least 3")


def build_simmim(config: Any) -> SimMIM:
    """The pre-training model of ``config``; raises ``ValueError`` for a type that cannot be an encoder."""
    kind = config.MODEL.TYPE
    if kind not in ENCODERS:
        raise ValueError(f"MODEL.TYPE={kind!r} cannot be pre-trained by SimMIM; choose from {sorted(ENCODERS)}")
    section = config.MODEL[kind.upper()]
    if not isinstance(section.PATCH_SIZE, int):
        raise ValueError(
            f"MODEL.{kind.upper()}.PATCH_SIZE={section.PATCH_SIZE}: SimMIM's patches are square; give one number"
        )
    if config.MODEL.PAD_MAPS:
        raise ValueError(
            "MODEL.PAD_MAPS=True: SimMIM reconstructs whole patches; choose a DATA.IMG_SIZE that needs no padding"
        )
    if config.MODEL.SIMMIM.NORM_TARGET.ENABLE:
        check_window_side(config.MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE)
    encoder = ENCODERS[kind](**{**model_arguments(config), "num_classes": 0})
    stride = section.PATCH_SIZE * 2 ** (len(section.DEPTHS) - 1)
    return SimMIM(config.MODEL.SIMMIM, encoder, stride, section.IN_CHANS, section.PATCH_SIZE)
