"""Routers: what each token says of each expert. T tokens, E experts, G groups of them, C channels.

They start equal on all processes: their weights are drawn from a generator that all have.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_TEMPERATURE = math.log(100.0)  # cosines are multiplied by 100 at most


class Projection(nn.Linear):
    """A linear layer that a model's own initialisation leaves alone: routers start equal on all processes."""

    def reset_parameters(self) -> None:
        """`MoELayer.reset_parameters` draws the weights."""


class LinearRouter(nn.Module):
    """Logits of the experts by a linear layer without bias; of ``groups`` of experts by another, if there are any."""

    def __init__(self, dim: int, num_experts: int, groups: int = 0):
        super().__init__()
        self.wg = Projection(dim, num_experts, bias=False)
        self.group_wg = Projection(dim, groups, bias=False) if groups else None

    def reset_parameters(self, std: float, generator: torch.Generator) -> None:
        for projection in (self.wg, self.group_wg):
            if projection is not None:
                draw(projection.weight, std, generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, C) to logits of experts (T, E) and of groups (T, G), or None."""
        experts = F.linear(x, self.wg.weight.float())
        return experts, None if self.group_wg is None else F.linear(x, self.group_wg.weight.float())


class CosineRouter(nn.Module):
    """Logits by cosines of projected tokens with a learnt vector of each expert, and of each group if there are any.

    Chi et al., "On the Representation Collapse of Sparse Mixture of Experts", https://arxiv.org/abs/2204.09179, eq. 5.
    """

    def __init__(self, dim: int, num_experts: int, proj_dim: int, init_t: float, groups: int = 0):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((1,), math.log(1 / init_t)))
        self.sim_matrix = nn.Parameter(torch.empty(proj_dim, num_experts))
        self.cosine_projector = Projection(dim, proj_dim)
        self.group_sim_matrix = nn.Parameter(torch.empty(proj_dim, groups)) if groups else None

    def reset_parameters(self, std: float, generator: torch.Generator) -> None:
        draw(self.cosine_projector.weight, std, generator)
        nn.init.zeros_(self.cosine_projector.bias)
        for matrix in (self.sim_matrix, self.group_sim_matrix):
            if matrix is not None:
                draw(matrix, 0.01, generator, truncated=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(T, C) to logits of experts (T, E) and of groups (T, G), or None."""
        projector = self.cosine_projector
        x = F.normalize(F.linear(x, projector.weight.float(), projector.bias.float()), dim=1)
        x = x * self.temperature.float().clamp(max=MAX_TEMPERATURE).exp()
        experts = x @ F.normalize(self.sim_matrix.float(), dim=0)
        groups = self.group_sim_matrix
        return experts, None if groups is None else x @ F.normalize(groups.float(), dim=0)


@torch.no_grad()
def draw(
    weight: Tensor,
    std: float,
    generator: torch.Generator,
    truncated: bool = True,
    rows: slice = slice(None),
    of: int | None = None,
) -> None:
    """Fill a matrix from ``generator``, in float32 on the CPU: with ``rows`` of one that has ``of`` rows."""
    if weight.is_meta:
        return
    values = torch.empty(of or weight.shape[0], weight.shape[1], device="cpu", dtype=torch.float32)
    if truncated:
        nn.init.trunc_normal_(values, std=std, generator=generator)
    else:
        values.normal_(0.0, std, generator=generator)
    weight.copy_(values[rows])
