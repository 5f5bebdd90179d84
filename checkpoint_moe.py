"""Experts of Swin-MoE over processes, as pure functions: state dict in, state dict out.

Every process holds the shared weights and its own experts. Here the states of any number of processes become the state
of one process among any other number; one process of one holds the whole. `expert_files` reads files.

W processes, E experts in all, El of them on a process, s processes to an expert, C channels, H hidden channels. Where s
is 1 process r holds the experts from r El on; else El is 1 and it holds the hidden slice r % s, of H / s, of expert
r // s, and of fc2's bias the slice r % s, of ceil(C / s), the last of which are padded by zeros.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from checkpoint import State, is_rebuilt, strict_state

EXPERT = re.compile(r"(.*\._moe_layer\.)experts\.(batched_fc[12]_(?:w|bias))")
PARAMETERS = ("batched_fc1_w", "batched_fc2_w", "batched_fc1_bias", "batched_fc2_bias")
COUNTER = "_num_global_experts"  # files before mid-2022 lack it
OptimizerState = Mapping[str, Any]


@dataclass(frozen=True)
class ExpertLayer:
    """The sizes of one layer's experts: E, s, H and C."""

    experts: int
    shards: int
    hidden: int
    channels: int

    def length(self, parameter: str) -> int:
        """Of the dimension 1 of a whole parameter, which shards divide among them."""
        return self.channels if parameter == "batched_fc2_bias" else self.hidden

    def shards_over(self, processes: int) -> int:
        """s on so many processes. Raises ``ValueError`` where experts, or their hidden channels, do not divide."""
        if processes < 1 or (self.experts % processes and processes % self.experts):
            raise ValueError(
                f"{self.experts} experts do not divide over {processes} process(es): choose a divisor or a multiple "
                f"of {self.experts}"
            )
        shards = max(processes // self.experts, 1)
        if self.hidden % shards:
            raise ValueError(
                f"{self.hidden} hidden channels of an expert do not divide over {shards} processes; choose fewer than "
                f"{processes} processes"
            )
        return shards


def is_expert(name: str) -> bool:
    """Whether a parameter is of experts: it differs between processes."""
    return EXPERT.fullmatch(name) is not None


def prefix_of(name: str) -> str:
    """How the names of the layer begin that an expert parameter is of."""
    return EXPERT.fullmatch(name)[1]


def gather_experts(states: Sequence[State], files: Sequence[str] = ()) -> dict[str, Tensor]:
    """The whole state of the states of all processes, by rank. Shared weights are those of the first.

    Biases become 2-D, [E, H] and [E, C], and each layer gets its counter of experts.

    Args:
        files: names of the states for errors; ``rank 0``, ``rank 1``, … if not given.

    Raises ``ValueError`` where the states do not belong together.
    """
    return process_state(states, 0, 1, files)


def split_experts(whole: State, processes: int) -> list[dict[str, Tensor]]:
    """The inverse of `gather_experts`: the state of each process.

    Raises ``ValueError`` where the experts do not divide over so many processes.
    """
    return [process_state([whole], rank, processes) for rank in range(processes)]


def process_state(states: Sequence[State], rank: int, processes: int, files: Sequence[str] = ()) -> dict[str, Tensor]:
    """The state of process ``rank`` of ``processes``, out of the states of as many others as there are.

    Of experts only what it needs is touched, so that states may be mapped from files. Raises as `gather_experts`.
    """
    layers = expert_layers(states, files)
    shared = states[0]
    result = {
        name: _cut([state[name] for state in states], name, layers, rank, processes) if is_expert(name) else value
        for name, value in shared.items()
    }
    for prefix, layer in layers.items():
        result[prefix + COUNTER] = torch.tensor(layer.experts)
    return result


def process_optimizer(
    optimizers: Sequence[OptimizerState], layers: Mapping[str, ExpertLayer], rank: int, processes: int
) -> dict[str, Any]:
    """As `process_state` for optimizer states by name: moments follow their parameters, plain numbers are the first's.

    Args:
        layers: of `expert_layers` for the same processes.
    """
    first = optimizers[0]
    state = {}
    for name, entry in first["state"].items():
        if not is_expert(name):
            state[name] = entry
            continue
        entries = [optimizer["state"].get(name, {}) for optimizer in optimizers]
        if lacking := [number for number, other in enumerate(entries) if other.keys() != entry.keys()]:
            raise ValueError(f"optimizer state of {name} is not of the same kind in ranks 0 and {lacking[0]}")
        state[name] = {
            key: _cut([other[key] for other in entries], name, layers, rank, processes)
            if isinstance(value, Tensor) and value.ndim
            else value
            for key, value in entry.items()
        }
    return {**first, "state": state}


def _cut(pieces: Sequence[Tensor], name: str, layers: Mapping[str, ExpertLayer], rank: int, processes: int) -> Tensor:
    """What process ``rank`` of ``processes`` holds of an expert parameter (or a moment of it) that lies in pieces."""
    prefix, parameter = EXPERT.fullmatch(name).groups()
    layer = layers[prefix]
    shards, length = layer.shards_over(processes), layer.length(parameter)
    local, piece = layer.experts * shards // processes, -(-length // shards)
    expert, column = rank // shards * local, rank % shards * piece
    if parameter.endswith("bias"):
        pieces = [part.flatten(1) for part in pieces]
    rows = [pieces[i : i + layer.shards] for i in range(0, len(pieces), layer.shards)]  # of the same experts
    per_row = layer.experts // len(rows)
    parts = []
    for i, row in enumerate(rows):
        start, stop = max(expert, i * per_row), min(expert + local, (i + 1) * per_row)
        if start < stop:
            chosen = [part.narrow(0, start - i * per_row, stop - start) for part in row]
            parts.append(_columns(chosen, column, min(column + piece, length)))
    whole = torch.cat(parts)
    missing = piece - whole.shape[1]  # only of fc2's bias
    return torch.cat([whole, whole.new_zeros(len(whole), missing)], 1) if missing else whole


def _columns(pieces: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Columns from ``start`` to ``stop``, without it, of pieces that lie side by side; none where there are none."""
    parts, offset = [pieces[0][:, :0]], 0
    for piece in pieces:
        width = piece.shape[1]
        low, high = max(start - offset, 0), min(stop - offset, width)
        if low < high:
            parts.append(piece[:, low:high])
        offset += width
    return torch.cat(parts, 1)


def expert_layers(states: Sequence[State], files: Sequence[str] = ()) -> dict[str, ExpertLayer]:
    """The sizes of each layer of experts, by how its names begin, as the states of all processes have them.

    E is the gate's. Raises ``ValueError`` where names, shapes or the number of states do not fit together.
    """
    files = list(files) or [f"rank {rank}" for rank in range(len(states))]
    _check_alike(states, files)
    prefixes = dict.fromkeys(match[1] for name in states[0] if (match := EXPERT.fullmatch(name)))
    return {prefix: _layer(states[0], prefix, len(states), files) for prefix in prefixes}


def _check_alike(states: Sequence[State], files: Sequence[str]) -> None:
    """Raise ``ValueError`` where the states do not have the same names, shapes and types."""
    first = {name: _form(name, value) for name, value in states[0].items() if not is_rebuilt(name)}
    for state, file in zip(states[1:], files[1:], strict=True):
        other = {name: _form(name, value) for name, value in state.items() if not is_rebuilt(name)}
        for name in [*first, *other]:
            if name not in other or name not in first:
                holder, lacking = (files[0], file) if name in first else (file, files[0])
                raise ValueError(f"{name} is in {holder}, not in {lacking}; they are not of the same run")
            if first[name] != other[name]:
                raise ValueError(
                    f"{name} is {_words(first[name])} in {files[0]}, {_words(other[name])} in {file}; "
                    "one is of another run or number of processes: move it away"
                )


def _form(name: str, value: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    flat = is_expert(name) and name.endswith("bias") and value.ndim > 1
    return tuple(value.flatten(1).shape if flat else value.shape), value.dtype


def _words(form: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{'x'.join(map(str, form[0])) or 'scalar'} {str(form[1]).removeprefix('torch.')}"


def _layer(state: State, prefix: str, processes: int, files: Sequence[str]) -> ExpertLayer:
    """The sizes of one layer, from the first of ``processes`` like states; see `expert_layers`."""
    names = {parameter: f"{prefix}experts.{parameter}" for parameter in PARAMETERS}
    for name in names.values():
        if name not in state:
            raise ValueError(f"{name} is missing in {files[0]}")
    weight = state[names["batched_fc1_w"]]
    if weight.ndim != 3 or not weight.numel():
        raise ValueError(f"{names['batched_fc1_w']} in {files[0]} is {_words(_form('', weight))}, not experts of h x C")
    local, hidden, channels = weight.shape
    experts = gate_experts(state, prefix, files[0])
    shards = processes // experts if local == 1 and processes > experts else 1
    if local * processes != experts * shards:
        raise ValueError(
            f"{prefix}experts: {processes} state(s) ({files[0]} …) hold {local} each, their gate has {experts}; "
            "files are missing, or some are of another number of processes"
        )
    layer = ExpertLayer(experts, shards, hidden * shards, channels)
    for parameter, name in names.items():
        first = -(-layer.length(parameter) // shards)
        wanted = (local, first) if parameter.endswith("bias") else (local, hidden, channels)
        if (found := _form(name, state[name])[0]) != wanted:
            raise ValueError(
                f"{name} in {files[0]} is {'x'.join(map(str, found))}, expected {'x'.join(map(str, wanted))} for "
                f"{processes} process(es); files are missing, or some are of another number of processes"
            )
    return layer


def gate_experts(state: State, prefix: str, file: str) -> int:
    """E as a layer's gate has it, or its counter."""
    if (gate := state.get(f"{prefix}gates.0.wg.weight")) is not None:
        return gate.shape[0]
    if (gate := state.get(f"{prefix}gates.0.sim_matrix")) is not None:
        return gate.shape[1]
    if (counter := state.get(prefix + COUNTER)) is not None:
        return int(counter)
    raise ValueError(f"{prefix}gates is missing in {file}: it alone says how many experts there are")


def merge_master(states: Sequence[State], master: State, master_file: str) -> list[dict[str, Tensor]]:
    """The complete states of an official run's end: ``.rank`` files hold experts alone, ``.master`` the rest.

    ``.master`` may hold a fc2 bias of experts that was not trained, of rank 0's shape: zeros, on every process.

    Raises ``ValueError`` where that is not zero, or where ``.master`` holds other weights of experts.
    """
    for name in filter(is_expert, master):
        if not name.endswith("fc2_bias"):
            raise ValueError(f"{name} is in {master_file}, which holds no experts")
        if master[name].any():
            raise ValueError(f"{name} in {master_file} is not zero, but other processes' parts of it are not kept")
    return [{**master, **state} for state in states]


# Optimizers number parameters in the order of their groups. By name, experts can be found, and PyTorch loads it too.


def optimizer_by_name(state: OptimizerState, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """An optimizer's state with names in place of numbers.

    Args:
        names: of the parameters of each group, in order.

    Raises ``ValueError`` where the groups have other numbers of parameters.
    """
    groups = state["param_groups"]
    _check_sizes(groups, names)
    name_of = {
        number: name
        for group, own in zip(groups, names, strict=True)
        for number, name in zip(group["params"], own, strict=True)
    }
    return {
        **state,
        "state": {name_of[number]: entry for number, entry in state["state"].items()},
        "param_groups": [{**group, "params": list(own)} for group, own in zip(groups, names, strict=True)],
    }


def optimizer_by_position(state: OptimizerState, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The inverse of `optimizer_by_name`, for an optimizer whose groups may have the same names in another order.

    Raises ``ValueError`` where its groups are not of the same names.
    """
    groups = state["param_groups"]
    _check_sizes(groups, names)
    for i, (group, own) in enumerate(zip(groups, names, strict=True)):
        if differing := sorted(set(group["params"]) ^ set(own)):
            raise ValueError(f"its group {i} and this one differ in {', '.join(differing[:3])}")
    number_of = {name: number for number, name in enumerate(name for own in names for name in own)}
    return {
        **state,
        "state": {number_of[name]: entry for name, entry in state["state"].items()},
        "param_groups": [
            {**group, "params": [number_of[name] for name in own]} for group, own in zip(groups, names, strict=True)
        ],
    }


def _check_sizes(groups: Sequence[Mapping], names: Sequence[Sequence[str]]) -> None:
    theirs, ours = [len(group["params"]) for group in groups], [len(own) for own in names]
    if theirs != ours:
        raise ValueError(f"its groups have {theirs} parameters, not {ours}")


def names_in_groups(state: State, optimizer: OptimizerState, exempt: Callable[[str, Tensor], bool]) -> list[list[str]]:
    """The names that the numbers of an official optimizer state stand for, from the weights beside it.

    Parameters stand in the order of the state dict: first the group with weight decay, then the one without. A fc2 bias
    of experts that is not trained (``MLP_FC2_BIAS`` False) has no number; the counts tell.

    Args:
        exempt: whether a parameter has no weight decay, by name and value.

    Raises ``ValueError`` where neither reading fits the counts and the shapes.
    """
    names = [name for name in state if not is_rebuilt(name) and not name.endswith(COUNTER)]
    for trained in (names, [name for name in names if not (is_expert(name) and name.endswith("fc2_bias"))]):
        groups = [[name for name in trained if exempt(name, state[name]) is free] for free in (False, True)]
        if [len(own) for own in groups] == [len(group["params"]) for group in optimizer["param_groups"]]:
            _check_moments(state, optimizer_by_name(optimizer, groups))
            return groups
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    raise ValueError(f"its optimizer state has groups of {sizes} parameters, not those of its {len(names)} weights")


def _check_moments(state: State, optimizer: OptimizerState) -> None:
    """Raise ``ValueError`` where a moment has another shape than its parameter."""
    for name, entry in optimizer["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != state[name].shape:
                raise ValueError(
                    f"its optimizer state {key} of {name} is {_words(_form('', value))}, the weight "
                    f"{_words(_form('', state[name]))}"
                )


# Upcycling: a dense model's MLPs become experts.


def upcycle(
    dense: State,
    expected: State,
    noise: float = 0.0,
    unchanged: int = 0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """A dense Swin-MoE's state as that of a model whose experts all begin as the dense MLPs.

    With top-k gates that are normalised over more than one choice, and no dropped tokens, it gives the dense logits.

    Args:
        expected: the whole state of the target, from which gates are taken.
        noise: standard deviation of what is added to each expert's weights, relative to that of the weight.
        unchanged: this many experts, the first ones, get no noise.
        generator: draws the noise.

    Raises ``ValueError`` where the dense model is of another family, or of other sizes.
    """
    _check_family(dense, expected)
    layers = expert_layers([expected], ["the model"])
    if not layers:
        raise ValueError("the model has no experts to make: MODEL.SWIN_MOE.MOE_BLOCKS names no blocks")
    state, used = {}, set()
    for prefix, layer in layers.items():
        if not 0 <= unchanged <= layer.experts:
            raise ValueError(f"{unchanged} of {layer.experts} experts cannot be kept unchanged")
        mlp = prefix.removesuffix("_moe_layer.")
        used.update(name for name in dense if name.startswith(mlp))
        state.update(_upcycled_layer(dense, mlp, prefix, layer, noise, unchanged, generator))
        gates = (name for name in expected if name.startswith(prefix) and not is_expert(name))
        state.update({name: expected[name] for name in gates})
    state.update({name: value for name, value in dense.items() if name not in used})
    return strict_state(state, expected)


def _check_family(dense: State, expected: State) -> None:
    for family, ending in (("Swin V1", "relative_position_bias_table"), ("SwinV2", "logit_scale")):
        if any(name.endswith(ending) for name in dense) and not any(name.endswith(ending) for name in expected):
            raise ValueError(
                f"it is a {family}, whose position bias is not Swin-MoE's; begin with a dense model of MODEL.TYPE "
                "swin_moe (configs/swinmoe/*densebaseline*)"
            )
    if any(is_expert(name) for name in dense):
        raise ValueError("it has experts already; upcycling begins with a dense model")


def _upcycled_layer(
    dense: State,
    mlp: str,
    prefix: str,
    layer: ExpertLayer,
    noise: float,
    unchanged: int,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Experts [E, …] of one dense MLP: fc1 as it is, fc2 transposed. A fc2 without bias gives zeros."""
    for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
        if mlp + name not in dense:
            raise ValueError(f"{mlp}{name} is missing: it is not a dense Swin-MoE with this block")
    fc1, fc2 = dense[f"{mlp}fc1.weight"], dense[f"{mlp}fc2.weight"].T
    bias = dense.get(f"{mlp}fc2.bias", fc2.new_zeros(fc2.shape[1]))
    values = dict(zip(PARAMETERS, (fc1, fc2, dense[f"{mlp}fc1.bias"], bias), strict=True))
    state = {}
    for parameter, value in values.items():
        experts = value.expand(layer.experts, *value.shape).clone(memory_format=torch.contiguous_format)
        if noise and value.ndim == 2:
            drawn = torch.randn(layer.experts - unchanged, *value.shape, generator=generator)
            experts[unchanged:] += (noise * value.float().std() * drawn).to(experts)
        state[f"{prefix}experts.{parameter}"] = experts
    return state
