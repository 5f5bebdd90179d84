"""How the kernels are launched. Windows of N tokens, nH heads of D channels."""

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .geometry import Geometry

# Programs that share out the windows. Fixed, not the card's: sums are then taken in one order on every card.
FORWARD_PROGRAMS = 4096
BACKWARD_PROGRAMS = 1024  # each writes its own sum of the bias's gradient, of one tile


class Run:
    """One call's kernels, and what all of them are given."""

    def __init__(self, qkv: Tensor, geometry: Geometry, scale: float):
        self.size = batch, H, W = qkv.shape[:3]
        self.windows = batch * triton.cdiv(H, geometry.window[0]) * triton.cdiv(W, geometry.window[1])
        self.heads, self.tokens = geometry.num_heads, geometry.tokens
        self.device, self.scale = qkv.device, scale
        self.rows, self.columns = (triton.cdiv(self.tokens, block) for block in geometry.blocks)
        self.constants = {**geometry.constants(), **geometry.options()}

    def share(self, programs: int) -> tuple[int, int]:
        """Windows, and how many programs of every head and tile share them out."""
        return self.windows, max(1, min(self.windows, programs // (self.heads * self.rows * self.columns)))

    def launch(self, kernel: triton.JITFunction, programs: int, *arguments) -> None:
        """So many programs for each head."""
        if self.windows:
            with torch.cuda.device_of(arguments[0]):
                kernel[(programs * self.heads,)](*arguments, *self.size[1:], self.scale, **self.constants)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float32, device=self.device)


def forward(
    qkv: Tensor, bias: Tensor, logit_scale: Tensor | None, geometry: Geometry, scale: float
) -> tuple[Tensor, Tensor]:
    """The output (B, H, W, C), and ``lse``, (windows, nH, N)."""
    run = Run(qkv, geometry, scale)
    out = qkv.new_empty(*run.size, qkv.shape[3] // 3)
    lse = qkv.new_empty(run.windows, run.heads, run.tokens, dtype=torch.float32)
    tensors = (qkv, bias, logit_scale, out, lse)
    if geometry.whole:
        windows, programs = run.share(FORWARD_PROGRAMS)
        run.launch(kernels.forward_whole, programs, *tensors, windows, programs)
    else:
        run.launch(kernels.forward_tiled, run.windows * run.rows, *tensors)
    return out, lse


def backward(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    out: Tensor | None,
    lse: Tensor,
    geometry: Geometry,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, of bias (nH, N, N) and of logit_scale (nH,); the last two in float32.

    Programs write sums of their own, which are added in a fixed order: no atomics, so every run gives the same bits.
    ``out`` is needed where a window is not one tile.
    """
    run = Run(qkv, geometry, scale)
    inputs, grad_qkv = (qkv, bias, logit_scale), torch.empty_like(qkv)
    windows, programs = run.share(BACKWARD_PROGRAMS)
    grad_bias = run.zeros(programs, run.heads, run.tokens, run.tokens)
    if geometry.whole:
        grad_scale = run.zeros(programs, run.heads)
        tensors = (*inputs, lse, grad, grad_qkv, grad_bias, grad_scale)
        run.launch(kernels.backward_whole, programs, *tensors, windows, programs)
    else:
        grad_scale, delta = run.zeros(run.windows * run.rows, run.heads), torch.empty_like(lse)
        tiles = run.windows * run.rows
        run.launch(kernels.backward_queries, tiles, *inputs, out, lse, grad, delta, grad_qkv, grad_scale)
        run.launch(kernels.backward_keys, tiles, *inputs, lse, grad, delta, grad_qkv)
        tiles = programs * run.rows * run.columns
        run.launch(kernels.backward_bias, tiles, *inputs, lse, grad, delta, grad_bias, windows, programs)
    return grad_qkv, grad_bias.sum(0), grad_scale.sum(0)
