"""Experts: small MLPs, each for the tokens that were sent to it, as batched or grouped products.

E experts in all, of which this process holds El; n tokens, C channels, h hidden units of an expert here, H in all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import linear as kernel

from . import memory
from .expert_parallel import ExpertGroups, gather_shards
from .linear import is_hooked, product, takes_kernel
from .routers import draw

GROUPED_DEVICES = ("cuda",)  # where a grouped product is quicker than a loop; on the CPU it is a loop itself


class Experts(nn.Module):
    """This process's experts, or its shard of one: C to h channels, GELU, dropout, back to C.

    A shard is a slice of an expert's hidden units, and of its last bias. The processes that share an expert gather its
    weights and each computes a part of its tokens: an expert of the official models has fewer numbers than its tokens.

    Args:
        num_experts: E; as many to each process, or as many processes to each.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        drop: float = 0.0,
        fc2_bias: bool = True,
        groups: ExpertGroups | None = None,
    ):
        super().__init__()
        self.expert_groups = groups = groups or ExpertGroups()
        local = local_experts(num_experts, groups.size)
        self.num_experts = num_experts
        self.num_local = max(local, 1)
        self.shards = max(-local, 1)
        self.dim = dim
        if hidden % self.shards:
            raise ValueError(
                f"MODEL.SWIN_MOE.EXPERT_PARALLEL: {self.shards} processes cannot share the {hidden} hidden units of an "
                "expert; choose fewer, or another MODEL.SWIN_MOE.MLP_RATIO"
            )
        self.hidden = hidden // self.shards
        self.batched_fc1_w = nn.Parameter(torch.empty(self.num_local, self.hidden, dim))
        self.batched_fc2_w = nn.Parameter(torch.empty(self.num_local, self.hidden, dim))
        self.batched_fc1_bias = nn.Parameter(torch.empty(self.num_local, self.hidden))
        self.batched_fc2_bias = nn.Parameter(
            torch.empty(self.num_local, -(-dim // self.shards)), requires_grad=fc2_bias
        )
        for parameter in self.parameters():
            parameter.skip_allreduce = True  # Tutel's mark of parameters that differ between processes
        self.drop = nn.Dropout(drop)

    @property
    def first(self) -> int:
        """The number of this process's first expert among all."""
        return self.expert_groups.rank * self.num_local // self.shards

    @torch.no_grad()
    def reset_parameters(self, std: float, seed: int) -> None:
        """Draw each expert by a generator of its own, so that it is the same on any number of processes."""
        for i in range(self.num_local):
            generator = torch.Generator().manual_seed(seed + 1 + self.first + i)
            shard = self.expert_groups.rank % self.shards * self.hidden
            for weight in (self.batched_fc1_w, self.batched_fc2_w):
                draw(weight[i], std, generator, rows=slice(shard, shard + self.hidden), of=self.hidden * self.shards)
        nn.init.zeros_(self.batched_fc1_bias)
        nn.init.zeros_(self.batched_fc2_bias)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Whole experts: fc1 (El, H, C) and its bias (El, H), fc2 (El, H, C) and its bias (El, C)."""
        parts = (self.batched_fc1_w, self.batched_fc1_bias, self.batched_fc2_w, self.batched_fc2_bias)
        if self.shards == 1:
            return parts
        flat = torch.cat([part.flatten() for part in parts])
        gathered = gather_shards(self.expert_groups, flat, self.shards)  # s, n
        w1, b1, w2, b2 = gathered.split([part.numel() for part in parts], dim=1)
        w1, w2 = (w.reshape(1, -1, self.dim) for w in (w1, w2))
        return w1, b1.reshape(1, -1), w2, b2.reshape(1, -1)[:, : self.dim]

    def forward(self, x: Tensor) -> Tensor:
        """(El, n, C) to (El, n, C): n tokens of each expert."""
        w1, b1, w2, b2 = self.weights()
        if self.takes_kernel(x, w1):
            return kernel.experts(x, [x.shape[1]] * len(x), w1, b1, w2, b2).view(*x.shape[:2], -1)
        x = torch.baddbmm(b1[:, None], x, w1.transpose(1, 2))  # El, n, H
        return torch.baddbmm(b2[:, None], self.drop(F.gelu(x)), w2)

    def grouped(self, x: Tensor, counts: Tensor) -> Tensor:
        """(n, C) to (n, C): rows sorted by expert, ``counts`` (El,) of each."""
        w1, b1, w2, b2 = (weight.to(x.dtype) for weight in self.weights())
        # A compiler must know shapes, so it is given no loop.
        loops = x.device.type not in GROUPED_DEVICES and not torch.compiler.is_compiling()
        if loops or not takes_grouped_product(x, w1.shape[1]):
            memory.keep_some()  # all experts' values lie in one block
            if self.takes_kernel(x, w1):
                return kernel.experts(x, counts.tolist(), w1, b1, w2, b2)
            return self.loop(x, (w1, b1, w2, b2), counts.tolist())
        offsets = counts.to(x.device).cumsum(0)
        expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device), right=True)
        member = F.one_hot(expert, self.num_local).to(x.dtype)  # n, El: its product with biases has a quick gradient
        offsets = offsets.to(torch.int32)
        x = torch.addmm(F.grouped_mm(x, w1.transpose(1, 2), offs=offsets), member, b1)
        return torch.addmm(F.grouped_mm(self.drop(F.gelu(x)), w2, offs=offsets), member, b2)

    def takes_kernel(self, x: Tensor, weight: Tensor) -> bool:
        """Whether all of an expert is one call of the kernels for CPUs; compilers do not know its operator."""
        if torch.compiler.is_compiling():
            return False
        drops = is_hooked(self.drop) or (self.drop.training and self.drop.p > 0)
        return not drops and takes_kernel(x, weight)

    def loop(self, x: Tensor, weights: Sequence[Tensor], counts: list[int]) -> Tensor:
        """As `grouped`, expert by expert. Without gradients GELU is in place: to ask for memory costs time."""
        products, gelu = expert_products, torch.ops.aten.gelu_
        if torch.is_grad_enabled():
            products, gelu = _ExpertProducts.apply, F.gelu
        w1, b1, w2, b2 = weights
        x = self.drop(gelu(products(x, w1.transpose(1, 2), b1, counts)))
        return products(x, w2, b2, counts)

    def extra_repr(self) -> str:
        shard = f", {self.shards} processes to each" if self.shards > 1 else ""
        return f"dim={self.dim}, hidden={self.hidden}, experts={self.num_local} of {self.num_experts}{shard}"


def expert_products(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    """Rows (n, K) sorted by expert, ``counts`` of each, times its weight (El, K, N), plus its bias: (n, N).

    In a loop, without gradients. Results are written where they belong, so nothing is put together.
    """
    y = x.new_empty(len(x), weight.shape[2])
    for i, (rows, result) in enumerate(zip(x.split(counts), y.split(counts), strict=True)):
        product(rows, weight[i], bias[i], result)
    return y


class _ExpertProducts(torch.autograd.Function):
    """`expert_products` with gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return expert_products(x, weight, bias, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_bias = grad.new_empty(weight.shape[0], weight.shape[2])
        parts = (part.split(ctx.counts) for part in (x, grad, grad_x))
        for i, (rows, grad_rows, result) in enumerate(zip(*parts, strict=True)):
            product(grad_rows, weight[i].t(), out=result)
            product(rows.t(), grad_rows, out=grad_weight[i])
            torch.sum(grad_rows, 0, out=grad_bias[i])
        return grad_x, grad_weight, grad_bias, None


def takes_grouped_product(x: Tensor, hidden: int) -> bool:
    """Whether ``F.grouped_mm`` takes rows ``x`` (n, C): its kernels want aligned rows, and on CUDA bfloat16."""
    if not hasattr(F, "grouped_mm") or not len(x) or any(n * x.element_size() % 16 for n in (x.shape[1], hidden)):
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16)


def local_experts(total: int, processes: int) -> int:
    """Experts of each process, as NUM_LOCAL_EXPERTS says it: n > 0 experts, or n < 0 for -n processes to each.

    Raises ``ValueError`` where neither divides the other.
    """
    if total > 0 and total % processes == 0:
        return total // processes
    if total > 0 and processes % total == 0:
        return -(processes // total)
    raise ValueError(
        f"MODEL.SWIN_MOE.NUM_EXPERTS={total}: so many experts do not divide over {processes} process(es), nor those "
        "over the experts; choose another number of experts or of processes, or MODEL.SWIN_MOE.EXPERT_PARALLEL"
    )


def total_experts(local: int, processes: int) -> int:
    """All experts, where NUM_LOCAL_EXPERTS is ``local``: the inverse of `local_experts`."""
    if local > 0:
        return local * processes
    if local == 0 or processes % -local:
        raise ValueError(
            f"MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS={local}: "
            + ("give at least 1, or -n for n processes to each expert" if local == 0 else "")
            + (f"{processes} process(es) are not groups of {-local}" if local else "")
        )
    return processes // -local
