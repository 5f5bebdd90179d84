"""FSDP2: every process keeps a slice of all parameters, gradients and optimizer states, and gathers a block to run it.

Rajbhandari et al., "ZeRO", https://arxiv.org/abs/1910.02054 (stage 3); Zhao et al., "PyTorch FSDP",
https://arxiv.org/abs/2304.11277. All but experts is sliced, along the first dimension; experts stay as expert
parallelism has split them. States come out whole and are taken whole, so checkpoints are those of any other run.

Parameters stay float32 and autocast casts what products use, as without slices: FSDP2's own mixed precision would
also round routers, norms and position biases, and results would no longer be those of DDP. It would halve the traffic
of the dense part, which is the smaller part of the models that need slices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

import distributed
from models.blocks import Block
from models.expert_parallel import expert_modules, expert_parameters, sync_expert_gradients
from models.simmim import SimMIM
from optimizer import OPTIMIZERS


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def check_settings(config: Any) -> None:
    """Raise ``ValueError`` where a configuration's sharding contradicts its other keys."""
    train = config.TRAIN
    if train.SHARDING == "ddp":
        if train.CPU_OFFLOAD:
            raise ValueError("TRAIN.CPU_OFFLOAD=True moves slices of parameters: it needs TRAIN.SHARDING fsdp2")
        return
    name = train.OPTIMIZER.NAME.lower()
    if name == "fused_lamb":  # its steps depend on norms of whole parameters
        others = sorted(set(OPTIMIZERS) - {name})
        raise ValueError(f"TRAIN.SHARDING='fsdp2': {name} does not work on slices; choose the optimizer from {others}")


def shard(model: nn.Module, device: torch.device, cpu_offload: bool = False) -> None:
    """Slice ``model``, which lies on ``device``, over all processes, block by block; make the optimizer afterwards.

    Weights are those of the main process, as with DDP. From here on every process must take part in each pass, and in
    each ``state_dict()``, which gathers whole tensors on the CPU; ``load_state_dict`` takes whole tensors.

    Args:
        cpu_offload: keep slices, their gradients and their optimizer state on the CPU.
    """
    own = set(expert_parameters(model).values())
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor not in own:
                dist.broadcast(tensor, 0)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    offload = CPUOffloadPolicy() if cpu_offload and device.type != "cpu" else OffloadPolicy()
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, offload_policy=offload, ignored_params=own)
    # The root too goes back to slices after each pass, so that names and parameters stay the same between passes.
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=own, reshard_after_forward=True)
    if isinstance(model, SimMIM):
        register_fsdp_forward_method(model, "reconstruct")
    model.register_state_dict_post_hook(_gather_weights)
    model.register_load_state_dict_pre_hook(_slice_weights)


def numbers_here(model: nn.Module) -> tuple[int, int]:
    """How many numbers of the sliced parameters this process keeps, and how many there are."""
    sliced = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return sum(parameter.to_local().numel() for parameter in sliced), sum(parameter.numel() for parameter in sliced)


def local(parameter: Tensor) -> Tensor:
    """What this process has of a parameter, sharing its memory: a slice, or all of it. To be asked for each time."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """What `local` gives, of another tensor of the parameter's shape."""
    return _slice(whole, parameter) if isinstance(parameter, DTensor) else whole


class ShardedStep:
    """Gradients, norm and update of a model that `shard` has sliced.

    The optimizer's parameters are the model's, except within a step: there they are plain tensors, this process's
    slices, as experts are. So fused and other optimizers that work number by number need not know of slices, and take
    slices and experts together. Their states are plain slices too, which ``optimizer.state_dict()`` gathers.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        sliced = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
        self.slices = {p: nn.Parameter(p.to_local().detach(), p.requires_grad) for p in sliced}
        self.experts = list(expert_parameters(model).values())
        self.experts_over = next((module.expert_groups.size for _, module in expert_modules(model)), 0)
        self.swapped = False
        for state in optimizer.state.values():
            state.update({key: value.to_local() for key, value in state.items() if isinstance(value, DTensor)})
        optimizer.register_state_dict_post_hook(_gather_state)
        optimizer.register_load_state_dict_pre_hook(_slice_state)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What a step works on. A process may have none of a small parameter."""
        return [*(part for part in self.slices.values() if part.numel()), *self.experts]

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Around passes on a batch, and after the ``last`` one before an update around the step."""
        self.model.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            if self.swapped:
                self._swap({part: whole for whole, part in self.slices.items()})
                for part in self.slices.values():
                    part.grad = None

    @torch.no_grad()
    def combine(self) -> Tensor:
        """Hand gradients to the optimizer; their norm over all processes, the same bits on each."""
        sync_expert_gradients(self.model)
        for whole, part in self.slices.items():
            part.data = whole.to_local()
            part.grad = None if whole.grad is None else whole.grad.to_local()
            whole.grad = None
        self._swap(self.slices)
        return self._norm()

    def _swap(self, new: dict[nn.Parameter, nn.Parameter]) -> None:
        state = list(self.optimizer.state.items())
        self.optimizer.state.clear()
        self.optimizer.state.update({new.get(parameter, parameter): entry for parameter, entry in state})
        for group in self.optimizer.param_groups:
            group["params"] = [new.get(parameter, parameter) for parameter in group["params"]]
        self.swapped = not self.swapped

    def _norm(self) -> Tensor:
        device = next(iter(self.slices)).device_mesh.device_type
        norms = [_norm_of(part, device) for part in (self.slices.values(), self.experts)]
        own = torch.stack(norms)
        parts = [torch.empty_like(own) for _ in range(distributed.world_size())]
        dist.all_gather(parts, own)  # and summed in one order: a reduction may round differently on each process
        experts = [part[1] for part in parts[: self.experts_over]]  # others hold copies
        return torch.linalg.vector_norm(torch.stack([*(part[0] for part in parts), *experts]))


def _norm_of(parameters: Any, device: str) -> Tensor:
    return get_total_norm([p.grad for p in parameters if p.grad is not None]).to(device)


def _whole(part: Tensor, parameter: DTensor) -> Tensor:
    """The tensor, on the CPU, of which every process gives the slice that it has of ``parameter``."""
    mesh, layout = parameter.device_mesh, {"shape": parameter.shape, "stride": parameter.stride()}
    part = part.detach().to(mesh.device_type)
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, **layout).full_tensor().cpu()


def _slice(whole: Tensor, parameter: DTensor) -> Tensor:
    """The inverse of `_whole`, without communication."""
    mesh = parameter.device_mesh
    parts, place = whole.chunk(mesh.size()), mesh.get_local_rank()
    return parts[place] if place < len(parts) else whole[:0]


def _gather_weights(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name, value in state.items():
        if isinstance(value, DTensor):
            state[name] = _whole(value.to_local(), value)


def _slice_weights(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    for name, parameter in module.named_parameters():
        whole = state.get(name)
        if isinstance(parameter, DTensor) and whole is not None and whole.shape == parameter.shape:
            mesh, layout = parameter.device_mesh, {"shape": whole.shape, "stride": parameter.stride()}
            part = _slice(whole, parameter).contiguous()
            state[name] = DTensor.from_local(part, mesh, parameter.placements, run_check=False, **layout)


def _gather_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def whole(value: Any, parameter: Tensor) -> Any:
        sliced = isinstance(parameter, DTensor) and isinstance(value, Tensor)
        return _whole(value, parameter) if sliced and value.shape == parameter.to_local().shape else value

    entries = {
        i: {key: whole(value, parameters[i]) for key, value in entry.items()} for i, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _slice_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    names = [name for group in state["param_groups"] for name in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_name = dict(zip(names, parameters, strict=False))  # another number of them is the optimizer's error to raise

    def part(value: Any, parameter: Tensor | None) -> Any:
        sliced = isinstance(parameter, DTensor) and isinstance(value, Tensor)
        return _slice(value, parameter).clone() if sliced and value.shape == parameter.shape else value

    entries = {
        name: {key: part(value, by_name.get(name)) for key, value in entry.items()}
        for name, entry in state["state"].items()
    }
    return {**state, "state": entries}
