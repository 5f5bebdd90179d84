"""Fused window attention on CPUs, by the extension ``swin_window_attention`` (``csrc/``).

A window's q, k and v of one head are read from the map where they lie; scores live in the cache. Nothing is kept for
the backward pass, which computes the scores again: that is cheaper than to move them.
"""

from typing import Any

import torch
from torch import Tensor

INSTALL = "pip install ./kernels/window_attention --no-build-isolation"
DTYPES = (torch.float32, torch.bfloat16)

try:
    import swin_window_attention  # noqa: F401 - loads the operators

    PROBLEM = ""
except (ImportError, OSError) as err:  # OSError: a library that this PyTorch cannot load
    PROBLEM = f"the extension for CPUs is not built: {' '.join(str(err).split())}; {INSTALL}"


def unsupported(dtype: torch.dtype) -> str:
    """Why it cannot take maps of this type; empty where it can."""
    if dtype not in DTYPES:
        return f"on a CPU {dtype} is not one of {', '.join(str(known) for known in DTYPES)}"
    return PROBLEM


def forward(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    masked: bool,
    scale: float,
) -> Tensor:
    """The output (B, H, W, C) of contiguous maps."""
    return torch.ops.swin_cpu.attend(qkv, *_tables(bias, logit_scale), num_heads, window, shift, masked, scale)


def backward(
    grad: Tensor, qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, of bias (nH, N, N) and of logit_scale (nH,); the last two in float32.

    Sums over windows are taken in one order, whatever the number of threads.

    Args:
        arguments: those of `forward` after ``logit_scale``.
    """
    return torch.ops.swin_cpu.attend_backward(grad, qkv, *_tables(bias, logit_scale), *arguments)


def _tables(bias: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return bias.float().contiguous(), None if logit_scale is None else logit_scale.float().contiguous()
