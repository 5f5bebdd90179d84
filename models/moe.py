"""The mixture-of-experts layer: a router sends each token to k of E experts, small MLPs, and adds what they answer.

Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", https://arxiv.org/abs/2206.03382. Results, parameter names
and auxiliary losses are those of Tutel in June 2022, which the released Swin-MoE models were trained with.
T tokens of this process, E experts in all, of which it holds El, C channels, h hidden units; W processes share experts.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from . import routing
from .expert_parallel import ExpertGroups, as_groups, exchange, exchange_counts
from .experts import Experts, total_experts
from .routers import CosineRouter, LinearRouter
from .routing import Choices, Slots, move_rows

ROUTERS = ("flat", "product", "limited")
PATHS = ("capacity", "dropless")


class Routing(NamedTuple):
    """What the router says of T tokens."""

    choices: Choices
    p: Tensor  # T, E: probabilities, with noise in training
    loss: Tensor  # the auxiliary loss


class Statistics(NamedTuple):
    """What a layer did in its last forward pass, as sums over tokens, so that those of processes can be added."""

    tokens_per_expert: Tensor  # E; of all choices, before any are dropped
    dropped: Tensor  # choices that found no slot
    entropy: Tensor  # of the router's probabilities, in nats
    loss: Tensor  # the auxiliary loss, times tokens
    tokens: Tensor

    @property
    def dropped_share(self) -> Tensor:
        return self.dropped / self.tokens_per_expert.sum().clamp(min=1)

    @property
    def router_entropy(self) -> Tensor:
        return self.entropy / self.tokens.clamp(min=1)

    @property
    def auxiliary_loss(self) -> Tensor:
        return self.loss / self.tokens.clamp(min=1)

    def summed(self) -> "Statistics":
        """Over all processes. Every process must call it."""
        flat = torch.cat([part.reshape(-1).float() for part in self])
        if dist.is_initialized():
            dist.all_reduce(flat)
        return Statistics(flat[:-4], *flat[-4:])


class MoELayer(nn.Module):
    """Experts with their router: (..., C) to (..., C) and the auxiliary loss.

    Args:
        num_local_experts: of each of the ``group``'s processes; -n says that n processes share one.
        top_value: experts that each token goes to.
        capacity_factor: an expert takes this many times its even share of a process's tokens, for each choice; 0 takes
            all, and less than 0 takes all within that bound. Other tokens pass by.
        cosine_router: route by cosines, in ``cosine_router_dim`` dimensions, from a temperature
            ``cosine_router_init_t``.
        normalize_gate: gates of a token's choices sum to 1.
        use_bpr: tokens whose router is surest come first where capacity ends.
        is_gshard_loss: GShard's auxiliary loss, else the load-importance loss.
        gate_noise: deviation of the noise on logits in training, times E.
        moe_drop: dropout after GELU.
        init_std: of weights.
        mlp_fc2_bias: experts' second layers have a bias; else it is there, but stays 0.
        path: "capacity", with static shapes, or "dropless", where every choice is kept.
        router: "flat", or by groups of experts, "product" or "limited": see `routing.product_choices` and
            `routing.limited_choices`.
        groups, top_groups: how many groups there are, and how many a token goes to.
        group: the processes that share the experts; None takes all.

    Raises:
        ValueError: for settings that contradict each other, naming the key of ``MODEL.SWIN_MOE``.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_local_experts: int,
        top_value: int,
        capacity_factor: float = 1.25,
        cosine_router: bool = False,
        normalize_gate: bool = False,
        use_bpr: bool = True,
        is_gshard_loss: bool = True,
        gate_noise: float = 1.0,
        cosine_router_dim: int = 256,
        cosine_router_init_t: float = 0.5,
        moe_drop: float = 0.0,
        init_std: float = 0.02,
        mlp_fc2_bias: bool = True,
        path: str = "capacity",
        router: str = "flat",
        groups: int = 1,
        top_groups: int = 1,
        group: ProcessGroup | ExpertGroups | None = None,
    ):
        super().__init__()
        self.processes = processes = as_groups(group)
        self.num_experts = total_experts(num_local_experts, processes.size)
        self.top_value = top_value
        self.capacity_factor = capacity_factor
        self.normalize_gate = normalize_gate
        self.use_bpr = use_bpr
        self.is_gshard_loss = is_gshard_loss
        self.gate_noise = gate_noise
        self.path = path
        self.router = router
        self.groups = groups
        self.top_groups = top_groups
        self.init_std = init_std
        self.collect = False
        self.statistics: Statistics | None = None
        check_settings(self)
        group_logits = groups if router == "product" else 0
        if cosine_router:
            gate = CosineRouter(in_features, self.num_experts, cosine_router_dim, cosine_router_init_t, group_logits)
        else:
            gate = LinearRouter(in_features, self.num_experts, group_logits)
        self.experts = Experts(in_features, hidden_features, self.num_experts, moe_drop, mlp_fc2_bias, processes)
        self.gates = nn.ModuleList([gate])
        self.register_buffer("_num_global_experts", torch.tensor(self.num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights: the same router on all processes, the same experts on any number of them.

        One number of the global generator decides them, that of the first process.
        """
        seed = self.processes.agreed(int(torch.randint(2**62, (), device="cpu")))
        self.gates[0].reset_parameters(self.init_std, torch.Generator().manual_seed(seed))
        self.experts.reset_parameters(self.init_std, seed)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.reshape(-1, x.shape[-1])  # T, C
        with _full_precision(x.device):
            routed = self.route(tokens.float())
        slots = routing.assign_slots(
            routed.choices.experts, self.num_experts, routed.p.detach().amax(1) if self.use_bpr else None
        )
        tokens = tokens.to(_compute_dtype(tokens))
        if self.path == "dropless":
            y, kept = self.run_dropless(tokens, routed.choices, slots), None
        else:
            y, kept = self.run_capacity(tokens, routed.choices, slots)
        if self.collect:
            self.record(routed, slots, kept)
        return y.view(*x.shape[:-1], y.shape[-1]), routed.loss

    def route(self, x: Tensor) -> Routing:
        """Choices and auxiliary loss for tokens (T, C), in float32."""
        logits, group_logits = self.gates[0](x)
        noisy = self.add_noise(logits)
        if self.router == "product":
            within = noisy.unflatten(1, (self.groups, -1)).softmax(2)  # T, G, M
            p_group = self.add_noise(group_logits).softmax(1)
            p = (p_group[:, :, None] * within).flatten(1)
            choices = routing.product_choices(p, p_group, self.top_value, self.top_groups)
        elif self.router == "limited":
            p = noisy.softmax(1)
            p_group = p.unflatten(1, (self.groups, -1)).sum(2)
            choices = routing.limited_choices(p, self.top_value, self.groups, self.top_groups)
        else:
            p = noisy.softmax(1)
            choices = routing.flat_choices(p, self.top_value)
        first = choices.experts[:, 0]
        if not self.is_gshard_loss:
            threshold = noisy.gather(1, choices.experts[:, -1:]).squeeze(1)
            loss = routing.load_importance_loss(logits.softmax(1), threshold, self.gate_noise / self.num_experts)
        elif self.router == "flat":
            loss = routing.gshard_loss(p, first)
        else:
            members = self.num_experts // self.groups
            loss = routing.gshard_loss(p, first) + routing.gshard_loss(p_group, first // members)
        if self.normalize_gate:
            choices = choices._replace(gates=routing.normalize_gates(choices.gates))
        return Routing(choices, p, loss)

    def add_noise(self, logits: Tensor) -> Tensor:
        if not self.training or self.gate_noise <= 0:
            return logits
        return logits + self.gate_noise / logits.shape[1] * torch.randn_like(logits)

    def run_capacity(self, x: Tensor, choices: Choices, slots: Slots) -> tuple[Tensor, Tensor]:
        """Tokens (T, C) through slots of their experts, as many of each; also which choices were kept (T, k)."""
        own, size = self.capacities(len(x), slots.counts)
        k = self.top_value
        if self.processes.size == 1 and _reads_freely(x):
            return self.run_kept(x, choices, slots, own)
        chosen, used = routing.fill_slots(slots, size, own)  # E * size
        kept = slots.positions < own
        places = choices.experts * size + slots.positions.clamp(max=size - 1)  # T, k
        sent = move_rows(x, chosen // k, places, used if torch.is_grad_enabled() else None, kept)
        answers = self.run_experts(sent)
        rows = move_rows(answers, places.flatten(), chosen[:, None], kept.flatten(), used[:, None])
        return routing.weigh_choices(rows, choices.gates.masked_fill(~kept, 0)), kept

    def run_kept(self, x: Tensor, choices: Choices, slots: Slots, own: int) -> tuple[Tensor, Tensor]:
        """As `run_capacity`, without empty slots: shapes follow from values, which cost nothing to read on a CPU."""
        counts = slots.counts.clamp(max=own)
        kept = slots.positions < own
        chosen = slots.choices[kept.flatten()[slots.choices]]
        places = (counts.cumsum(0) - counts)[choices.experts] + slots.positions.clamp(max=own - 1)
        places = places.clamp(max=max(len(chosen) - 1, 0))
        mask = None if len(chosen) == kept.numel() else kept
        sent = move_rows(x, chosen // self.top_value, places, kept=mask)
        answers = self.experts.grouped(sent, counts)
        rows = move_rows(answers, places.flatten(), chosen[:, None], None if mask is None else mask.flatten())
        return routing.weigh_choices(rows, choices.gates.masked_fill(~kept, 0)), kept

    def capacities(self, tokens: int, counts: Tensor) -> tuple[int, int]:
        """(own, size): slots that each expert has for this process's tokens, and how many of any process are computed.

        With a positive capacity factor both follow from the numbers of tokens alone, so that shapes are static and no
        device is read. On the CPU, where reading is free, slots beyond the busiest expert's tokens are left out.
        """
        factor, shards = self.capacity_factor, self.experts.shards
        bound = routing.capacity_bound(tokens, self.num_experts, self.top_value, factor)
        free = counts.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
        peak = int(counts.max()) if factor <= 0 or free else bound
        peak, most = self.processes.largest([peak, bound])
        own = routing.capacity(bound, bound if factor > 0 else peak, shards)
        return own, routing.capacity(most, peak, shards)

    def run_experts(self, x: Tensor) -> Tensor:
        """Slots (E * size, C) of this process's tokens to the experts, wherever they are, and their answers back."""
        processes, local = self.processes, self.experts.num_local
        if processes.size == 1:
            return self.experts(x.unflatten(0, (local, -1))).flatten(0, 1)
        x = exchange(processes, x).unflatten(0, (processes.size, local, -1))  # W, El, n, C
        answers = self.experts(x.transpose(0, 1).flatten(1, 2))  # El, W * n, C
        answers = answers.unflatten(1, (processes.size, -1)).transpose(0, 1)
        return exchange(processes, answers.flatten(0, 2))

    def run_dropless(self, x: Tensor, choices: Choices, slots: Slots) -> Tensor:
        """Tokens (T, C) through their experts, all choices kept."""
        places = slots.starts.index_select(0, choices.experts.flatten()).view_as(slots.positions) + slots.positions
        rows = move_rows(x, slots.choices // self.top_value, places)  # kT, C; sorted by expert
        if self.processes.size == 1:
            answers = self.experts.grouped(rows, slots.counts)
        else:
            answers = self.run_remote(rows, slots.counts)
        return routing.weigh_choices(move_rows(answers, places.flatten(), slots.choices[:, None]), choices.gates)

    def run_remote(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, ``counts`` (E,) of each, to the experts, wherever they are, and their answers back."""
        processes, shards = self.processes, self.experts.shards
        counts = counts.cpu()
        parts = counts[:, None] // shards + (torch.arange(shards) < counts[:, None] % shards)  # E, s
        sent = parts.view(processes.size, -1)  # W, El
        received = exchange_counts(processes, sent)  # W, El: from each process, for each of the experts here
        splits = sent.sum(1).tolist(), received.sum(1).tolist()
        x = exchange(processes, rows, *splits)
        order = torch.arange(received.shape[1]).repeat(processes.size).repeat_interleave(received.flatten())
        order = order.argsort(stable=True).to(x.device)  # by expert; they came by process
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        answers = self.experts.grouped(move_rows(x, order, back[:, None]), received.sum(0))
        return exchange(processes, move_rows(answers, back, order[:, None]), splits[1], splits[0])

    @torch.no_grad()
    def record(self, routed: Routing, slots: Slots, kept: Tensor | None) -> None:
        tokens = len(routed.p)
        dropped = slots.counts.new_zeros(()) if kept is None else (~kept).sum()
        self.statistics = Statistics(
            slots.counts,
            dropped,
            routing.entropy(routed.p).sum(),
            routed.loss.detach() * tokens,
            dropped.new_tensor(tokens),
        )

    def extra_repr(self) -> str:
        groups = "" if self.router == "flat" else f", groups={self.groups}, top_groups={self.top_groups}"
        return (
            f"top_value={self.top_value}, capacity_factor={self.capacity_factor}, use_bpr={self.use_bpr}, "
            f"normalize_gate={self.normalize_gate}, is_gshard_loss={self.is_gshard_loss}, "
            f"gate_noise={self.gate_noise}, path={self.path}, router={self.router}{groups}"
        )


def check_settings(layer: MoELayer) -> None:
    """Raise ``ValueError`` where a layer's settings contradict each other."""
    key, count, k = "MODEL.SWIN_MOE.", layer.num_experts, layer.top_value
    if layer.path not in PATHS:
        raise ValueError(f"{key}PATH={layer.path!r}; choose from {list(PATHS)}")
    if layer.router not in ROUTERS:
        raise ValueError(f"{key}ROUTER={layer.router!r}; choose from {list(ROUTERS)}")
    if not 1 <= k <= count:
        raise ValueError(f"{key}TOP_VALUE={k}: a token goes to at least 1 and at most all {count} expert(s)")
    if not layer.is_gshard_loss:
        way_out = f"or give {key}IS_GSHARD_LOSS True"
        if layer.gate_noise <= 0:
            raise ValueError(
                f"{key}GATE_NOISE={layer.gate_noise}: the load-importance loss divides by it, in evaluation too; give "
                f"a positive number, {way_out}"
            )
        if count == 1:
            raise ValueError(f"{key}NUM_EXPERTS=1: the load-importance loss compares experts; take more, {way_out}")
        if layer.router != "flat":
            raise ValueError(f"{key}ROUTER={layer.router!r} has no load-importance loss; take 'flat', {way_out}")
    if layer.router != "flat":
        _check_groups(key, count, k, layer.router, layer.groups, layer.top_groups)


def _check_groups(key: str, count: int, k: int, router: str, groups: int, top_groups: int) -> None:
    if groups < 1 or count % groups:
        raise ValueError(f"{key}GROUPS={groups} does not divide the {count} experts")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"{key}TOP_GROUPS={top_groups}: a token goes to at least 1 and at most all {groups} group(s)")
    if router == "product" and k % top_groups:
        raise ValueError(f"{key}TOP_VALUE={k}: router 'product' takes as many of each of {key}TOP_GROUPS={top_groups}")
    if k > top_groups * (count // groups):
        raise ValueError(f"{key}TOP_VALUE={k}: {top_groups} group(s) of {count // groups} experts have not so many")


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[dict[str, MoELayer]]:
    """Let the layers of ``model`` note their `Statistics` meanwhile; gives them by name, to read them from."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    try:
        for layer in layers.values():
            layer.collect = True
        yield layers
    finally:
        for layer in layers.values():
            layer.collect = False


def _reads_freely(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _full_precision(device: torch.device) -> AbstractContextManager:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """That of matrix products with ``x``: autocast's, where it is on."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype
