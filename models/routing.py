"""Which expert takes which token: choices, capacity, slots and auxiliary losses, as pure functions.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", https://arxiv.org/abs/2206.03382, whose results these are.
T tokens of this process, E experts in all, k choices of a token, p probabilities [T, E]. With groups, E = G M and
expert g M + m is the m-th of group g. Nothing here reads a value from the device.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Choices(NamedTuple):
    """The experts that each token chose, best first."""

    experts: Tensor  # T, k; int64
    gates: Tensor  # T, k; float32


def flat_choices(p: Tensor, k: int) -> Choices:
    """The k most probable experts."""
    gates, experts = p.topk(k, dim=1)
    return Choices(experts, gates)


def limited_choices(p: Tensor, k: int, groups: int, top_groups: int) -> Choices:
    """The k most probable experts within ``top_groups`` groups: those whose two best experts sum to most."""
    grouped = p.unflatten(1, (groups, -1))  # T, G, M
    score = grouped.detach().topk(min(2, grouped.shape[2]), dim=2).values.sum(2)
    allowed = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(top_groups, dim=1).indices, True)
    visible = grouped.detach().masked_fill(~allowed[:, :, None], -1.0).flatten(1)
    experts = visible.topk(k, dim=1).indices
    return Choices(experts, p.gather(1, experts))


def product_choices(p: Tensor, p_group: Tensor, k: int, top_groups: int) -> Choices:
    """The best ``top_groups`` groups by ``p_group`` (T, G), and k / top_groups experts of each; ordered by gate."""
    grouped = p.unflatten(1, (p_group.shape[1], -1))  # T, G, M
    members = grouped.shape[2]
    chosen = p_group.topk(top_groups, dim=1).indices[:, :, None]  # T, kg, 1
    within = grouped.detach().gather(1, chosen.expand(-1, -1, members)).topk(k // top_groups, dim=2).indices
    experts = (chosen * members + within).flatten(1)
    order = p.detach().gather(1, experts).argsort(dim=1, descending=True, stable=True)
    experts = experts.gather(1, order)
    return Choices(experts, p.gather(1, experts))


def normalize_gates(gates: Tensor) -> Tensor:
    """Gates (T, k) that sum to 1; one gate alone keeps its value."""
    if gates.shape[1] == 1:
        return gates
    return gates / gates.sum(1, keepdim=True).clamp(min=torch.finfo(gates.dtype).eps)


def capacity_bound(tokens: int, experts: int, k: int, factor: float) -> int:
    """The most tokens that an expert takes from a process with so many; 0 for ``factor`` does not bound them."""
    if factor == 0:
        return k * tokens
    return k * int(abs(factor) * -(-tokens // experts))


def capacity(bound: int, peak: int, shards: int) -> int:
    """Slots of each expert: ``peak``, the busiest expert's tokens, within ``bound``; 1 or more, times ``shards``."""
    return -(-max(min(bound, peak), 1) // shards) * shards


class Slots(NamedTuple):
    """The choices of all tokens, sorted by expert; within an expert first choices come first."""

    choices: Tensor  # kT: for each place in that order, t * k + j for choice j of token t
    counts: Tensor  # E: choices of each expert, before any are dropped
    starts: Tensor  # E: places before its first one
    positions: Tensor  # T, k: place of each choice among those of its expert


def assign_slots(experts: Tensor, num_experts: int, importance: Tensor | None = None) -> Slots:
    """Number the choices (T, k) of each expert: all first choices, then all second ones, and so on.

    Args:
        importance: (T,) says which tokens come first (Riquelme et al., https://arxiv.org/abs/2106.05974, section 4.1);
            equal ones, or all without it, are taken in their order.
    """
    tokens, k = experts.shape
    order = None if importance is None else importance.argsort(descending=True, stable=True)
    ranked = experts if order is None else experts.index_select(0, order)
    ids, places = ranked.t().flatten().sort(stable=True)  # first choices, then second ones, ...
    bounds = torch.searchsorted(ids, torch.arange(num_experts + 1, device=ids.device))
    starts, counts = bounds[:-1], bounds.diff()
    row, choice = places % max(tokens, 1), places // max(tokens, 1)
    if order is not None:
        row = order.index_select(0, row)
    choices = row * k + choice
    inside = torch.arange(len(ids), device=ids.device) - starts.index_select(0, ids)
    positions = torch.empty_like(inside).scatter_(0, choices, inside)
    return Slots(choices, counts, starts, positions.view(tokens, k))


def fill_slots(slots: Slots, size: int, kept: int) -> tuple[Tensor, Tensor]:
    """What lies in ``size`` slots per expert, of which the first ``kept`` may be used.

    Returns:
        choices: (E * size,); any choice in empty slots.
        used: (E * size,), bool.
    """
    place = torch.arange(size, device=slots.counts.device)
    used = place < slots.counts.clamp(max=kept)[:, None]  # E, size
    last = max(len(slots.choices) - 1, 0)
    source = (slots.starts[:, None] + place).clamp(max=last).flatten()
    return take_rows(slots.choices, source), used.flatten()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x``; zeros where it has none at all."""
    return x.index_select(0, index) if len(x) else x.new_zeros(len(index), *x.shape[1:])


class _Route(torch.autograd.Function):
    """Rows from one order to another; the gradient gathers as well, which is quick and the same every time.

    What is left out is filled with zeros, in place: 0 times a row would not be 0 where that is infinite.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: Tensor, back: Tensor, taken: Tensor | None, kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, kept)
        rows = take_rows(x, source)
        return rows if taken is None else rows.masked_fill_(~taken[:, None], 0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back, kept = ctx.saved_tensors
        rows = take_rows(grad, back.flatten()).unflatten(0, back.shape)  # n, r, C
        if kept is not None:
            rows = rows.masked_fill_(~kept[:, :, None], 0)
        return rows.sum(1) if back.shape[1] > 1 else rows.squeeze(1), None, None, None, None


def move_rows(
    x: Tensor, source: Tensor, back: Tensor, taken: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """``x[source]`` for rows of ``x`` (n, C): (m, C).

    Args:
        back: (n, r), the places where each row of ``x`` went.
        taken: (m,), whether a row of the result is really there, and not zeros; None says they all are.
        kept: (n, r), whether a row of ``x`` really went to that place; None says it did everywhere.
    """
    return _Route.apply(x, source, back, taken, kept)


def weigh_choices(rows: Tensor, weights: Tensor) -> Tensor:
    """Sum over choices: rows (T * k, C) with weights (T, k) to (T, C)."""
    tokens, k = weights.shape
    weighed = rows.unflatten(0, (tokens, k)) * weights[:, :, None]  # float32 where weights are
    return (weighed.sum(1) if k > 1 else weighed.squeeze(1)).to(rows.dtype)


def gshard_loss(p: Tensor, first: Tensor) -> Tensor:
    """E sum_e mean(p_e) f_e, f_e the share of tokens whose first choice is e.

    Lepikhin et al., https://arxiv.org/abs/2006.16668, algorithm 1. At least 1 where both are even; 0 without tokens.
    """
    tokens, count = p.shape
    share = F.one_hot(first, count).to(p.dtype).sum(0) / max(tokens, 1)
    return count * (p.sum(0) / max(tokens, 1) * share).sum()


def load_importance_loss(p: Tensor, threshold: Tensor, deviation: float) -> Tensor:
    """Mean of the squared coefficients of variation of importance and load.

    Shazeer et al., https://arxiv.org/abs/1701.06538, appendix A. As the released models were trained, probabilities
    meet a logit.

    Args:
        p: probabilities without noise.
        threshold: (T,), the noisy logit of each token's last choice.
        deviation: of the noise; above 0.
    """
    load = torch.special.ndtr((p - threshold[:, None]) / deviation).sum(0)
    return (_squared_variation(p.sum(0)) + _squared_variation(load)) / 2


def _squared_variation(values: Tensor) -> Tensor:
    return values.var() / (values.mean() ** 2 + 1e-10)


def entropy(p: Tensor) -> Tensor:
    """Of each token's probabilities, in nats: (T,)."""
    return torch.special.entr(p).sum(1)
