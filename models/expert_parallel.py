"""Experts over processes: the groups that share them, exchanges with gradients, their gradients' means and norm.

W processes share E experts. With E = n W each holds n whole experts; with W = s E each holds one of s shards of an
expert, a slice of its hidden units. Blocks of W processes hold all experts again: copies, for data parallelism.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

import distributed


@dataclass(frozen=True, eq=False)
class ExpertGroups:
    """Where this process stands among those that share experts; by default it holds all of them.

    Args:
        ep_group: the processes that share one set of experts; None where it is this process alone.
        dp_group: the processes that hold the same experts as this one; None where it is this process alone.
        control: the processes of ``ep_group``, for numbers that stay on the CPU.
        size, rank: of ``ep_group``.
        copies: processes of ``dp_group``.
    """

    ep_group: ProcessGroup | None = None
    dp_group: ProcessGroup | None = None
    control: ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    copies: int = 1

    def __deepcopy__(self, memo: dict) -> "ExpertGroups":
        return self  # process groups cannot be copied, and a model's copy has the same ones

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest value of each number over the group's processes. No device is read or waited for."""
        if self.size == 1:
            return list(numbers)
        return _largest(self, list(numbers))

    def agreed(self, number: int) -> int:
        """The number of the very first process, on all processes of all copies."""
        for group in (self.ep_group, self.dp_group):  # first within each copy, then across them
            if group is not None:
                holder = [number]
                dist.broadcast_object_list(holder, group=group, group_src=0)
                number = holder[0]
        return number


_made: dict[tuple[ProcessGroup, int], ExpertGroups] = {}


def expert_groups(size: int = 0, timeout: timedelta | None = None) -> ExpertGroups:
    """Groups of ``size`` consecutive processes that share experts; made once. Every process must call it.

    Args:
        size: 0 takes all processes.
        timeout: of the exchanges; by default that of the default process group.

    Raises ``ValueError`` where ``size`` does not divide the processes.
    """
    world = distributed.world_size()
    size = size or world
    check_group_size(size, world)
    if world == 1:
        return ExpertGroups()
    key = (dist.group.WORLD, size)
    if key not in _made:
        _made[key] = _make_groups(size, world, timeout or _timeout(dist.group.WORLD))
    return _made[key]


def check_group_size(size: int, world: int) -> None:
    if size < 1 or world % size:
        raise ValueError(
            f"MODEL.SWIN_MOE.EXPERT_PARALLEL={size} does not divide the {world} process(es); "
            f"choose from {[n for n in range(1, world + 1) if world % n == 0]}, or 0 for all"
        )


def _make_groups(size: int, world: int, timeout: timedelta) -> ExpertGroups:
    blocks = [list(range(first, first + size)) for first in range(0, world, size)]
    columns = [list(range(first, world, size)) for first in range(size)]
    ep_group = _new_group(blocks, timeout) if size > 1 else None
    dp_group = _new_group(columns, timeout) if size < world else None
    control = ep_group
    if ep_group is not None and dist.get_backend(ep_group) not in ("gloo", "fake"):
        control = _new_group(blocks, timeout, "gloo")
    return ExpertGroups(ep_group, dp_group, control, size, dist.get_rank() % size, world // size)


def _new_group(members: list[list[int]], timeout: timedelta, backend: str | None = None) -> ProcessGroup:
    """This process's group of ``members``; all of them are made, by all processes, in one order."""
    groups = [dist.new_group(ranks, timeout=timeout, backend=backend) for ranks in members]
    return next(group for ranks, group in zip(members, groups, strict=True) if dist.get_rank() in ranks)


def _timeout(group: ProcessGroup) -> timedelta | None:
    """That of a group; a new group would otherwise wait for half an hour whatever was configured."""
    device = torch.device("cpu") if dist.get_backend(group) == "gloo" else torch.accelerator.current_accelerator()
    try:
        return group._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):  # not public: another release or backend may not have it
        return None


def as_groups(group: "ProcessGroup | ExpertGroups | None") -> ExpertGroups:
    """The `ExpertGroups` of a process group that shares experts; None stands for all processes."""
    if group is None:
        return expert_groups()
    if isinstance(group, ExpertGroups):
        return group
    for groups in _made.values():
        if groups.ep_group is group:
            return groups
    size = dist.get_world_size(group)
    if size == 1:
        return ExpertGroups(copies=distributed.world_size())
    return ExpertGroups(group, None, group, size, dist.get_rank(group), distributed.world_size() // size)


@contextmanager
def _told() -> Iterator[None]:
    """Say what the failure of an exchange means."""
    try:
        yield
    except RuntimeError as err:
        raise ConnectionError(f"a process that shares experts with this one {distributed.has_ended(err)}") from err


@torch.compiler.disable
def _largest(groups: ExpertGroups, numbers: list[int]) -> list[int]:
    tensor = torch.tensor(numbers, device=_control_device(groups))
    with _told():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=groups.control)
    return tensor.tolist()


def _control_device(groups: ExpertGroups) -> torch.device:
    if dist.get_backend(groups.control) == "gloo":
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator())


@torch.compiler.disable
def exchange_counts(groups: ExpertGroups, counts: Tensor) -> Tensor:
    """Row w of ``counts`` (W, n) goes to process w; row w of the result, on the CPU, is what w sent."""
    if groups.size == 1:
        return counts.cpu()
    counts = counts.to(_control_device(groups))
    received = torch.empty_like(counts)
    with _told():
        dist.all_to_all_single(received, counts.contiguous(), group=groups.control)
    return received.cpu()


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, sent: list[int] | None, received: list[int] | None) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        rows = len(x) if received is None else sum(received)
        result = x.new_empty(rows, *x.shape[1:])
        with _told():
            dist.all_to_all_single(result, x.contiguous(), received, sent, group=group)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.group, ctx.received, ctx.sent), None, None, None


@torch.compiler.disable
def exchange(
    groups: ExpertGroups, x: Tensor, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Rows of ``x`` to their processes, and theirs to here, source by source; gradients go the other way.

    Args:
        sent, received: rows to and from each process; None cuts ``x`` into W equal parts.

    Raises ``ConnectionError`` where a process has ended or does not answer within the group's timeout.
    """
    return x if groups.size == 1 else _Exchange.apply(x, groups.ep_group, sent, received)


def gather_shards(groups: ExpertGroups, x: Tensor, shards: int) -> Tensor:
    """A vector (n,) of this process to (s, n), those of all processes with a shard of the same expert.

    Its gradient is the sum of theirs: each of them works with the whole expert.
    """
    first = groups.rank - groups.rank % shards
    rows = [int(first <= rank < first + shards) for rank in range(groups.size)]
    return exchange(groups, x.expand(shards, -1), rows, rows)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold this process's experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "expert_groups", None), ExpertGroups):
            yield name, module


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that differ between processes, by name."""
    return {
        f"{name}.{key}".removeprefix("."): parameter
        for name, module in expert_modules(model)
        for key, parameter in module.named_parameters(recurse=False)
    }


def exclude_from_ddp(model: nn.Module) -> None:
    """Tell DDP, before it wraps ``model``, to leave experts alone: it would make them equal on all processes."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameters(model)))


@torch.no_grad()
def sync_expert_gradients(model: nn.Module) -> None:
    """Turn experts' gradients into what DDP makes of the others: the mean over all processes.

    To be called once before an update, on every process. An expert has met the tokens of all processes that share it,
    so its gradient is their sum already.
    """
    pending = []
    for _, module in expert_modules(model):
        groups = module.expert_groups
        if groups.copies > 1 and groups.dp_group is None:
            raise ValueError("experts on some of the processes: give their layers groups made by expert_groups()")
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # all copies must take part below
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.div_(groups.size * groups.copies)
            if groups.dp_group is not None:
                pending.append(dist.all_reduce(parameter.grad, group=groups.dp_group, async_op=True))
    with _told():
        for work in pending:
            work.wait()


@torch.no_grad()
def global_grad_norm(model: nn.Module, norm_type: float = 2.0) -> Tensor:
    """The norm of the whole model's gradients, on their device: parameters that all processes have count once, experts
    of all processes that share them count together. The same bits on every process, after `sync_expert_gradients`.
    """
    own = {id(parameter) for parameter in expert_parameters(model).values()}
    shared = _norm((p for p in model.parameters() if id(p) not in own), norm_type, model)
    groups = next((module.expert_groups for _, module in expert_modules(model)), None)
    if groups is None:
        return shared
    local = _norm(expert_parameters(model).values(), norm_type, model)
    parts = [local]
    if groups.size > 1:  # gathered, then summed in one order: a reduction may round differently on each process
        parts = [torch.empty_like(local) for _ in range(groups.size)]
        with _told():
            dist.all_gather(parts, local, group=groups.ep_group)
    return torch.linalg.vector_norm(torch.stack([shared, *parts]), norm_type)


def _norm(parameters: Iterable[nn.Parameter], norm_type: float, model: nn.Module) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.nn.utils.get_total_norm(grads, norm_type)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(single, whole) trainable parameters: with one expert in each layer, and with all of them.

    They are the official log's ``number of params single`` and ``whole`` where a process holds at most one expert.
    """
    own = {id(parameter) for parameter in expert_parameters(model).values()}
    shared = sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in own)
    single = whole = shared
    for _, module in expert_modules(model):
        one = sum(p[0].numel() for p in module.parameters(recurse=False) if p.requires_grad) * module.shards
        single += one
        whole += one * module.num_experts
    return single, whole
