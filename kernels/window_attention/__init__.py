"""Fused window attention on maps in image order, forward and backward: in Triton, and in C++ for CPUs.

B maps of H x W tokens, windows of N tokens, nH heads of D channels, C = nH * D. Shift, partition, padding, bias, mask,
softmax and their inverses happen within the kernels, by addressing: no copy of the map and no scores reach memory.
`geometry` says what is possible, `operators` is what PyTorch sees, `launch` starts `triton_kernels`, `cpu` calls the
extension built from ``csrc/``, and `reference` says what they compute.
"""

import torch
from torch import Tensor

from . import cpu
from .geometry import INTERPRETED, products_are_tf32, unsupported
from .operators import forward

__all__ = ["attend", "products_are_tf32", "serves_cpu", "unsupported"]


def serves_cpu(dtype: torch.dtype) -> bool:
    """Whether the extension for CPUs takes maps of this type; there it is faster than PyTorch's operations."""
    return not INTERPRETED and not cpu.unsupported(dtype)


def attend(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    masked: bool,
    scale: float,
) -> Tensor:
    """Attention within (shifted) windows of maps; any that `unsupported` has nothing against.

    Args:
        qkv: (B, H, W, 3C), float32, bfloat16 or float16: each token's q, k and v, each split into heads. Sides that
            are no multiple of the window's are treated as padded at the bottom and right, with padding masked.
        bias: (nH, N, N), added to the logits of every window.
        logit_scale: nH numbers, for cosine attention: q and k are normalised, their products multiplied by it.
        masked: tokens that only the shift brings together get -100.
        scale: multiplies the products.

    Returns:
        (B, H, W, C). Gradients of qkv, bias and logit_scale are the same in every run, bit for bit.
    """
    return forward(qkv, bias, logit_scale, num_heads, list(window), list(shift), masked, scale)[0]
