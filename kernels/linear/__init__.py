"""Linear layers and MLPs on CPUs by the extension ``swin_linear`` (``csrc/``): in float32, forward and backward; where
`BFLOATS` says so, in bfloat16 without gradients, of weights and biases in float32.

M rows of C channels, H hidden units. An MLP's values between its two products stay in the cache, but for those of few
rows: GELU is computed there, forward and backward, and only what it is of is kept for the backward pass. Gradients are
the same bits for any number of threads. Second derivatives are PyTorch's.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import operators

INSTALL = "pip install ./kernels/linear --no-build-isolation"
VERSION = 6  # of the extension: it takes bfloat16, norms and residuals

try:
    import swin_linear  # noqa: F401 - loads the operators

    PROBLEM = ""
    _like = torch.empty(0, device="cpu")
    if torch.ops.swin_linear.lanes(_like) < 8:
        PROBLEM = "for this processor and compiler it has plain code alone, slower than PyTorch's"
    elif not hasattr(torch.ops.swin_linear, "version") or torch.ops.swin_linear.version(_like) < VERSION:
        PROBLEM = f"the extension for linear layers is of an older version of this code; {INSTALL}"
except (ImportError, OSError) as err:  # OSError: a library that this PyTorch cannot load
    PROBLEM = f"the extension for linear layers is not built: {' '.join(str(err).split())}; {INSTALL}"

# Numbers of a tile register of this processor, which says what packed weights are like; 0 where there are none.
BFLOATS = 0 if PROBLEM else torch.ops.swin_linear.lanes(torch.empty(0, dtype=torch.bfloat16, device="cpu"))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` on a CPU: (..., C), (N, C) and (N,) to (..., N)."""
    if torch.compiler.is_compiling():
        return _compiled_linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])
    rows, weight = _rows(x), weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    if _has_gradient(rows, weight, bias):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = torch.ops.swin_linear.forward(rows, weight, bias)
    return y.view(*x.shape[:-1], len(weight))


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)`` on a CPU: (..., C) to (..., N).

    Args:
        w1: (H, C).
        w2: (N, H).
    """
    if torch.compiler.is_compiling():
        return _compiled_mlp(x.reshape(-1, x.shape[-1]), w1, b1, w2, b2).view(*x.shape[:-1], w2.shape[0])
    rows = _rows(x)
    weights = (part if part is None else part.unsqueeze(0) for part in (w1, b1, w2, b2))
    return _mlps(rows, [len(rows)], *weights, across=True).view(*x.shape[:-1], len(w2))


def residual_mlp(x: Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """``x + fc2(F.gelu(fc1(norm(x))))`` on a CPU, without gradients: (..., C) to (..., C)."""
    rows = _rows(x)
    if torch.compiler.is_compiling():
        packed = _packed(fc1.weight, rows), fc1.bias, _packed(fc2.weight, rows), fc2.bias
        sizes = fc1.weight.shape[0], fc2.weight.shape[0]
        y = operators.mlp_packed(rows, *packed, *sizes, norm.weight, norm.bias, norm.eps, residual=True)
    else:
        parts = (norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
        y = torch.ops.swin_linear.residual_mlp(rows, *_contiguous(*parts))
    return y.view(x.shape)


def joined_linear(x: Tensor, norm: nn.LayerNorm | None, layer: nn.Linear, residual: Tensor | None = None) -> Tensor:
    """``residual + layer(norm(x))`` on a CPU, without gradients: (..., C) to (..., N); either may be missing."""
    rows = _rows(x)
    joined = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    joined = (*joined, None if residual is None else _rows(residual))
    if torch.compiler.is_compiling():
        y = operators.linear_packed(rows, _packed(layer.weight, rows), layer.bias, layer.weight.shape[0], *joined)
    else:
        y = torch.ops.swin_linear.forward(rows, *_contiguous(layer.weight, layer.bias), 0, *_contiguous(*joined))
    return y.view(*x.shape[:-1], layer.weight.shape[0])


def _contiguous(*parts: Any) -> Iterator[Any]:
    return (part.contiguous() if isinstance(part, Tensor) else part for part in parts)


def experts(x: Tensor, counts: list[int], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """E MLPs of float32 on a CPU, ``F.gelu(x @ w1.T + b1) @ w2 + b2`` each, for their rows: (M, C) to (M, N).

    Args:
        x: rows sorted by expert.
        counts: E, how many of them are whose.
        w1: (E, H, C), with biases (E, H).
        w2: (E, H, N), with biases (E, N).
    """
    return _mlps(_rows(x), counts, w1, b1, w2, b2, across=False)


def _compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return operators.linear(rows, weight, bias)
    return operators.linear_packed(rows, _packed(weight, rows), bias, weight.shape[0])


def _compiled_mlp(rows: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return operators.mlp(rows, w1, b1, w2, b2)[0]
    packed = _packed(w1, rows), b1, _packed(w2, rows), b2
    return operators.mlp_packed(rows, *packed, w1.shape[0], w2.shape[0])


def _packed(weight: Tensor, rows: Tensor) -> Tensor:
    """As products with ``rows`` read it."""
    lanes = BFLOATS if rows.dtype == torch.bfloat16 else 0
    return operators.pack_weight(weight, lanes, operators.packed_width(weight.shape[1], lanes))


def _mlps(
    rows: Tensor, counts: list[int], w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, across: bool
) -> Tensor:
    w1, b1, w2, b2 = (part if part is None else part.contiguous() for part in (w1, b1, w2, b2))
    if _has_gradient(rows, w1, b1, w2, b2):
        return _Mlps.apply(rows, w1, b1, w2, b2, counts, across)
    return torch.ops.swin_linear.mlp(rows, counts, w1, b1, w2, b2, across, False)[0]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _has_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.swin_linear.forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # second derivatives
            return _gradients(grad, x, weight, ctx.needs_input_grad)
        grad_x, *others = torch.ops.swin_linear.backward(grad.contiguous(), x, weight, needs_x, any(needs))
        return grad_x if needs_x else None, *_needed(others, needs)


class _Mlps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        counts: list[int],
        across: bool,
    ) -> Tensor:
        y, hidden = torch.ops.swin_linear.mlp(x, counts, w1, b1, w2, b2, across, True)
        ctx.save_for_backward(x, hidden, w1, b1, w2, b2)
        ctx.counts, ctx.across = counts, across
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, w1, b1, w2, b2 = ctx.saved_tensors
        needs_x, *needs = needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # second derivatives
            with torch.enable_grad():
                y = _plain_mlps((x, w1, b1, w2, b2), ctx.counts, ctx.across)
            inputs = [part for part, wanted in zip((x, w1, b1, w2, b2), needed, strict=True) if wanted]
            grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
            return *(next(grads) if wanted else None for wanted in needed), None, None
        arguments = (grad.contiguous(), x, hidden, ctx.counts, w1, w2, ctx.across, needs_x, any(needs))
        grad_x, *others = torch.ops.swin_linear.mlp_backward(*arguments)
        return grad_x if needs_x else None, *_needed(others, needs), None, None


def _plain_mlps(parts: tuple[Tensor | None, ...], counts: list[int], across: bool) -> Tensor:
    x, *weights = parts
    results = []
    for i, rows in enumerate(x.split(counts)):
        w1, b1, w2, b2 = (part if part is None else part[i] for part in weights)
        results.append(F.linear(F.gelu(F.linear(rows, w1, b1)), w2 if across else w2.t(), b2))
    return torch.cat(results)


def _gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Those of x, weight and bias, by operations that have gradients themselves."""
    needs_x, needs_weight, needs_bias = needs
    return (
        grad @ weight if needs_x else None,
        grad.t() @ x if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


def _needed(grads: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]
