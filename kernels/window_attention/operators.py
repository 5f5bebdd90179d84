"""Fused window attention as PyTorch operators: `swin::window_attention` and its backward pass.

torch.compile and torch.export take them as they are. On CUDA they are Triton kernels (`launch`), on a CPU the
extension's (`cpu`), or Triton's in its interpreter. Triton is imported when it runs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .geometry import INTERPRETED, Geometry, is_whole, products_are_tf32


def _geometry(qkv: Tensor, num_heads: int, window: list[int], shift: list[int], masked: bool, cosine: bool) -> Geometry:
    _, H, W, C3 = qkv.shape
    return Geometry(
        num_heads=num_heads,
        head_width=C3 // (3 * num_heads),
        window=tuple(window),
        shift=tuple(shift),
        shifted=masked and any(shift),
        padded=bool(H % window[0] or W % window[1]),
        cosine=cosine,
        dtype=qkv.dtype,
        precision="tf32" if products_are_tf32() else "ieee",
    )


@torch.library.custom_op("swin::window_attention", mutates_args=())
def forward(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: list[int],
    shift: list[int],
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, C), and what the backward pass needs of the sums of exponentials, (windows, nH, N).

    On a CPU it needs nothing: (0,).
    """
    if _by_extension(qkv):
        out = cpu.forward(qkv.contiguous(), bias, logit_scale, num_heads, window, shift, masked, scale)
        return out, qkv.new_empty(0, dtype=torch.float32)
    from . import launch

    geometry = _geometry(qkv, num_heads, window, shift, masked, logit_scale is not None)
    return launch.forward(qkv.contiguous(), bias.contiguous(), _flat(logit_scale), geometry, scale)


@forward.register_fake
def _(qkv, bias, logit_scale, num_heads, window, shift, masked, scale):
    B, H, W, C3 = qkv.shape
    windows = B * -(-H // window[0]) * -(-W // window[1])
    shape = (0,) if _by_extension(qkv) else (windows, num_heads, math.prod(window))
    lse = qkv.new_empty(shape, dtype=torch.float32)
    return qkv.new_empty(B, H, W, C3 // 3), lse


@torch.library.custom_op("swin::window_attention_backward", mutates_args=())
def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    num_heads: int,
    window: list[int],
    shift: list[int],
    masked: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, bias and logit_scale, the last of no elements where there is none."""
    grad, qkv = grad.contiguous(), qkv.contiguous()
    if _by_extension(qkv):
        arguments = (num_heads, window, shift, masked, scale)
        grad_qkv, grad_bias, grad_scale = cpu.backward(grad, qkv, bias, logit_scale, *arguments)
    else:
        from . import launch

        geometry = _geometry(qkv, num_heads, window, shift, masked, logit_scale is not None)
        tensors = (grad, qkv, bias.contiguous(), _flat(logit_scale), out, lse)
        grad_qkv, grad_bias, grad_scale = launch.backward(*tensors, geometry, scale)
    if logit_scale is None:
        return grad_qkv, grad_bias.to(bias.dtype), grad_scale.new_empty(0)
    return grad_qkv, grad_bias.to(bias.dtype), grad_scale.to(logit_scale.dtype).view(logit_scale.shape)


@backward.register_fake
def _(grad, qkv, bias, logit_scale, out, lse, num_heads, window, shift, masked, scale):
    grad_scale = lse.new_empty(0) if logit_scale is None else logit_scale.new_empty(logit_scale.shape)
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape), grad_scale


def _by_extension(qkv: Tensor) -> bool:
    return qkv.device.type == "cpu" and not INTERPRETED


def _flat(logit_scale: Tensor | None) -> Tensor | None:
    return None if logit_scale is None else logit_scale.reshape(-1).contiguous()


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, logit_scale, *ctx.arguments = inputs
    out, lse = output
    num_heads, window = ctx.arguments[:2]
    whole = is_whole(window, qkv.shape[3] // (3 * num_heads))
    ctx.save_for_backward(qkv, bias, logit_scale, None if whole or _by_extension(qkv) else out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple:
    none = (None,) * len(ctx.arguments)
    if grad is None:
        return (None, None, None, *none)
    grad_qkv, grad_bias, grad_scale = backward(grad, *ctx.saved_tensors, *ctx.arguments)
    return grad_qkv, grad_bias, grad_scale if ctx.needs_input_grad[2] else None, *none


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple:
    raise NotImplementedError(
        "fused window attention has no second derivatives; choose MODEL.ATTENTION_BACKEND reference"
    )


forward.register_autograd(_differentiate, setup_context=_save)
backward.register_autograd(_refuse)
