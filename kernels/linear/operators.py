"""Linear layers and MLPs as operators for compilers: `swin::linear`, `swin::mlp` and their backward passes.

They are the extension's, with shapes and gradients that compilers know. Elsewhere the functions of the package call the
extension, with less to do for each call. Without gradients they are two operators: weights are packed, which is done
once where they are frozen, and multiplied.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("swin::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, C), (N, C) and (N,) to (M, N)."""
    return torch.ops.swin_linear.forward(x.contiguous(), weight.contiguous(), bias)


@linear.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("swin::linear_backward", mutates_args=())
def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; of no rows where they are not needed."""
    arguments = (grad.contiguous(), x.contiguous(), weight.contiguous(), needs_x, needs_weight)
    return torch.ops.swin_linear.backward(*arguments)


@linear_backward.register_fake
def _(grad, x, weight, needs_x, needs_weight):
    N, C = weight.shape
    rows = N if needs_weight else 0
    return x.new_empty(x.shape[0] if needs_x else 0, C), x.new_empty(rows, C), x.new_empty(rows)


@torch.library.custom_op("swin::pack_weight", mutates_args=())
def pack_weight(weight: Tensor, lanes: int, width: int) -> Tensor:
    """(N, C) as this processor's kernels read it: in their order and parts, with zeros up to a multiple of 32 rows.

    Args:
        lanes: those of the code that reads it; 0 for this processor's for float32.
        width: of the result, `packed_width` of C. Compiled programs hold it, so that compilers' caches, which machines
            may share, do not take one processor's program for another's.
    """
    return torch.ops.swin_linear.pack(weight.contiguous(), lanes)


@torch.compiler.assume_constant_result
def packed_width(C: int, lanes: int) -> int:
    return torch.ops.swin_linear.packed_width(C, lanes)


@pack_weight.register_fake
def _(weight, lanes, width):
    return weight.new_empty((weight.shape[0] + 31) // 32 * 32, width)


@torch.library.custom_op("swin::linear_packed", mutates_args=())
def linear_packed(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    N: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
) -> Tensor:
    """`linear` of a packed weight of N rows, and of a layer norm of x; plus ``added``, (M, N)."""
    x, added = x.contiguous(), added if added is None else added.contiguous()
    return torch.ops.swin_linear.forward_packed(x, packed, bias, N, 0, norm_weight, norm_bias, eps, added)


@linear_packed.register_fake
def _(x, packed, bias, N, norm_weight=None, norm_bias=None, eps=0.0, added=None):
    return x.new_empty(x.shape[0], N)


@torch.library.custom_op("swin::mlp_packed", mutates_args=())
def mlp_packed(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    H: int,
    N: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    residual: bool = False,
) -> Tensor:
    """`mlp` of packed weights of H and N rows, and of a layer norm of x; plus x as a ``residual``."""
    x, norm = x.contiguous(), (norm_weight, norm_bias, eps)
    return torch.ops.swin_linear.mlp_packed(x, w1, b1, w2, b2, H, N, 0, *norm, residual)


@mlp_packed.register_fake
def _(x, w1, b1, w2, b2, H, N, norm_weight=None, norm_bias=None, eps=0.0, residual=False):
    return x.new_empty(x.shape[0], N)


def _save_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    return _needed(linear_backward(grad, *ctx.saved_tensors, needs[0], needs[1] or needs[2]), needs)


@torch.library.custom_op("swin::mlp", mutates_args=())
def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> tuple[Tensor, Tensor]:
    """(M, C), (H, C), (H,), (N, H) and (N,) to (M, N), and what GELU is of, for `mlp_backward` alone.

    That is M x H numbers in the kernels' order, and room up to a multiple of 32 columns.
    """
    w1, b1, w2, b2 = (part if part is None else part.contiguous().unsqueeze(0) for part in (w1, b1, w2, b2))
    return torch.ops.swin_linear.mlp(x.contiguous(), [len(x)], w1, b1, w2, b2, True, True)


@mlp.register_fake
def _(x, w1, b1, w2, b2):
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty(x.shape[0], (w1.shape[0] + 31) // 32 * 32)


@torch.library.custom_op("swin::mlp_backward", mutates_args=())
def mlp_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, w1: Tensor, w2: Tensor, needs_x: bool, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, w1, b1, w2 and b2; of no rows where they are not needed."""
    weights = (part.contiguous().unsqueeze(0) for part in (w1, w2))
    arguments = (grad.contiguous(), x.contiguous(), hidden.contiguous(), [len(x)], *weights, True)
    grad_x, *grads = torch.ops.swin_linear.mlp_backward(*arguments, needs_x, needs_weights)
    return grad_x, *(part.flatten(0, 1) if part.ndim == 3 else part.flatten() for part in grads)


@mlp_backward.register_fake
def _(grad, x, hidden, w1, w2, needs_x, needs_weights):
    (H, C), N = w1.shape, w2.shape[0]
    H_rows, N_rows = (H, N) if needs_weights else (0, 0)
    grads = (x.new_empty(size) for size in ((H_rows, C), (H_rows,), (N_rows, H), (N_rows,)))
    return x.new_empty(x.shape[0] if needs_x else 0, C), *grads


def _save_mlp(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, _ = inputs
    ctx.save_for_backward(x, output[1], w1, w2)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_mlp(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    needs = ctx.needs_input_grad
    return _needed(mlp_backward(grad, *ctx.saved_tensors, needs[0], any(needs[1:])), needs)


def _needed(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _refuse(ctx: Any, *grads: Tensor | None) -> tuple:
    raise NotImplementedError("compiled linear layers have no second derivatives; leave out --compile")


linear.register_autograd(_differentiate_linear, setup_context=_save_linear)
linear_backward.register_autograd(_refuse)
mlp.register_autograd(_differentiate_mlp, setup_context=_save_mlp)
mlp_backward.register_autograd(_refuse)
