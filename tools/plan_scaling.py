"""Plan a Swin-MoE on many processes: parameters, memory and traffic of one of them, by a dry run that computes nothing.

python tools/plan_scaling.py --cfg configs/demo/swin_moe_10b_6x16expert.yaml --processes 48 --batch-size 64

The first of the processes builds its part of the model on the meta device, whose tensors have shapes and no content,
and runs a training forward pass. What it has, keeps for the backward pass and exchanges is added up. docs/scaling.md
explains the figures. Attention matrices are listed apart: fused attention does not keep them.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import models.moe
import models.swin_transformer_moe
from config import OFFICIAL_CLASSES, get_config
from models import build_model
from models.blocks import Block
from models.expert_parallel import ExpertGroups, check_group_size, expert_parameters, parameter_counts
from models.moe import MoELayer

FLOAT = 4  # bytes of a float32 number; gradients and each of AdamW's two moments have as many
GIB = 2**30


class Planned(ExpertGroups):
    """Processes that are not there."""

    def largest(self, numbers: Any) -> list[int]:
        return list(numbers)  # all have as many tokens


@dataclass
class Exchange:
    """One pass of a MoE layer's tokens to the experts, or back."""

    layer: str
    tokens: int
    slots: int  # of each expert
    bytes: int


@dataclass
class DryRun:
    """What a forward pass on the meta device shows."""

    kept: dict[str, int] = field(default_factory=dict)  # bytes for the backward pass, by block; "" outside of blocks
    attention: dict[str, int] = field(default_factory=dict)  # of these, attention matrices
    inputs: dict[str, int] = field(default_factory=dict)  # bytes of the block's input, all that checkpointing keeps
    exchanges: list[Exchange] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration of a Swin-MoE")
    parser.add_argument("--processes", type=int, required=True, help="one for each GPU")
    parser.add_argument("--batch-size", type=int, required=True, help="images of each process and step")
    parser.add_argument("--per-node", type=int, default=8, help="processes of each node (default: 8)")
    parser.add_argument("--opts", metavar=("KEY", "VALUE"), nargs="+", help="keys to override, as KEY VALUE pairs")
    args = parser.parse_args()
    try:
        sys.stdout.write(plan(get_config(args), args.processes, args.batch_size, args.per_node))
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def plan(config: Any, processes: int, batch: int, per_node: int = 8) -> str:
    """The plan as Markdown tables. Raises ``ValueError`` for models without experts and processes that cannot be."""
    settings = config.MODEL.get("SWIN_MOE")
    if config.MODEL.TYPE != "swin_moe" or settings.PATH != "capacity":
        raise ValueError(
            f"MODEL.TYPE={config.MODEL.TYPE!r}, MODEL.SWIN_MOE.PATH={settings.PATH!r}: only the exchanges of swin_moe "
            "with path 'capacity' are known beforehand"
        )
    share = settings.EXPERT_PARALLEL or processes
    check_group_size(share, processes)
    groups = Planned(size=share, rank=0, copies=processes // share)
    model = meta_model(config, groups)
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    runs = {name: dry_run(model, batch, dtype) for name, dtype in dtypes.items()}
    title = f"{config.MODEL.NAME}: {processes} processes, {per_node} to a node, {batch} images each"
    sections = (
        ["", "Parameters", *_parameters(model, processes)],
        ["", "Memory of a process, GiB: weights and optimizer", *_states(model, processes)],
        ["", "Memory of a process, GiB: for the backward pass", *_activations(runs)],
        ["", "All-to-all in bfloat16, MB sent by a process", *_exchanges(runs["bfloat16"], share, per_node)],
        ["", "Gradients and weights, MB sent by a process in a step", *_reductions(model, processes, groups)],
    )
    return "\n".join([title, *(line for section in sections for line in section)]) + "\n"


def meta_model(config: Any, groups: ExpertGroups) -> nn.Module:
    """The model of the first of the processes of ``groups``, on the meta device."""
    config = config.clone()
    config.defrost()
    if config.MODEL.NUM_CLASSES_FROM_DATA:
        config.MODEL.NUM_CLASSES = OFFICIAL_CLASSES.get(config.DATA.DATASET, config.MODEL.NUM_CLASSES)
    config.TRAIN.USE_CHECKPOINT = False  # the dry run says what it would save
    with torch.device("meta"), patch.object(models.swin_transformer_moe, "expert_groups", lambda size: groups):
        model = build_model(config)
    if not any(isinstance(module, MoELayer) for module in model.modules()):
        raise ValueError(f"MODEL.SWIN_MOE.MOE_BLOCKS={config.MODEL.SWIN_MOE.MOE_BLOCKS}: no block has experts")
    return model


def dry_run(model: nn.Module, batch: int, dtype: torch.dtype) -> DryRun:
    """A training forward pass of ``batch`` images, with all numbers but the routers' of ``dtype``."""
    model.to(dtype).train()
    device = next(model.parameters()).device
    run, where = DryRun(), [""]
    names = {module: name for name, module in model.named_modules()}
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # keeps them, so that no number is given twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own and storage not in seen:
            seen[storage] = tensor
            size = tensor.untyped_storage().nbytes()
            run.kept[where[0]] = run.kept.get(where[0], 0) + size
            if where[0] and tensor.ndim >= 4 and tensor.shape[-1] == tensor.shape[-2]:  # a window's tokens by tokens
                run.attention[where[0]] = run.attention.get(where[0], 0) + size
        return tensor

    def enter(module: nn.Module, inputs: tuple) -> None:
        where[0] = names[module]
        run.inputs[where[0]] = inputs[0].numel() * inputs[0].element_size()

    def leave(*_: Any) -> None:
        where[0] = ""

    def note(groups: ExpertGroups, x: Tensor, *_: Any) -> Tensor:
        layer = model.get_submodule(f"{where[0]}.mlp._moe_layer")
        tokens = run.inputs[where[0]] // dtype.itemsize // x.shape[1]
        run.exchanges.append(Exchange(where[0], tokens, len(x) // layer.num_experts, x.numel() * x.element_size()))
        return x

    with ExitStack() as stack:
        for module in names:
            if isinstance(module, Block):
                for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                    stack.callback(handle.remove)
        stack.enter_context(patch.object(models.moe, "exchange", note))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
        size = (batch, model.patch_embed.in_chans, *model.patch_embed.img_size)
        model(torch.zeros(size, device=device, dtype=dtype))
    return run


def _parameters(model: nn.Module, processes: int) -> list[str]:
    single, whole = parameter_counts(model)
    experts, dense = _expert_numbers(model), _dense_numbers(model)
    rows = [
        ["all", f"{whole:,}"],
        ["of experts, on all processes", f"{whole - dense:,}"],
        ["of experts, on this process", f"{experts:,}"],
        ["of the rest, the dense part", f"{dense:,}"],
        ["of the dense part, a slice (fsdp2)", f"{dense / processes:,.0f}"],
        ["with one expert in each layer", f"{single:,}"],
    ]
    return _table(["parameters", "number"], rows)


def _states(model: nn.Module, processes: int) -> list[str]:
    """Of float32 weights, their gradients and AdamW's two moments."""
    experts, dense = _expert_numbers(model), _dense_numbers(model)
    blocks = [_dense_numbers(module) for module in model.modules() if isinstance(module, Block)]
    rows, sums = [], [0.0, 0.0]
    for name, ddp, fsdp2 in (
        ("weights, experts", experts, experts),
        ("weights, dense", dense, dense / processes),
        ("gradients, experts", experts, experts),
        ("gradients, dense", dense, dense / processes),
        ("AdamW, experts", 2 * experts, 2 * experts),
        ("AdamW, dense", 2 * dense, 2 * dense / processes),
        ("gathered: what is outside of blocks", 0, dense - sum(blocks)),
        ("gathered: two blocks, and the gradients of one", 0, 3 * max(blocks)),
    ):
        sums = [sums[0] + ddp, sums[1] + fsdp2]
        rows.append([name, _gib(FLOAT * ddp), _gib(FLOAT * fsdp2)])
    return _table(["", "ddp", "fsdp2"], [*rows, ["sum", *(_gib(FLOAT * number) for number in sums)]])


def _activations(runs: dict[str, DryRun]) -> list[str]:
    rows: dict[str, list[str]] = {}
    for run in runs.values():
        outside, blocks = run.kept.get("", 0), {name: size for name, size in run.kept.items() if name}
        matrices = sum(run.attention.values())
        largest = max(size - run.attention.get(name, 0) for name, size in blocks.items())
        inputs = sum(run.inputs.values())
        most = max(exchange.bytes for exchange in run.exchanges)
        for name, size in (
            ("all blocks", sum(blocks.values()) - matrices),
            ("attention matrices, unless attention is fused", matrices),
            ("outside of blocks", outside),
            ("with USE_CHECKPOINT: inputs of blocks", inputs),
            ("with USE_CHECKPOINT: the largest block", largest),
            ("with USE_CHECKPOINT: sum, and what is outside of blocks", inputs + largest + outside),
            ("all-to-all: one buffer to send and one to receive", 2 * most),
        ):
            rows.setdefault(name, []).append(_gib(size))
    return _table(["", *runs], [[name, *sizes] for name, sizes in rows.items()])


def _exchanges(run: DryRun, share: int, per_node: int) -> list[str]:
    """Of each stage with experts. A step has two exchanges forward and two backward, two more where it recomputes."""
    rows = []
    near = min(per_node, share)
    for stage in dict.fromkeys(exchange.layer.split(".blocks")[0] for exchange in run.exchanges):
        own = [exchange for exchange in run.exchanges if exchange.layer.startswith(f"{stage}.blocks")]
        one = own[0]
        layers = len({exchange.layer for exchange in own})
        within, between = (one.bytes * (count / share) for count in (near - 1, share - near))
        rows.append(
            [
                f"{stage}, {layers} layer(s)",
                *(f"{one.tokens:,}", f"{one.slots:,}", f"{one.bytes / one.tokens:,.0f}"),
                *(f"{size / 1e6:,.1f}" for size in (within, between, 4 * layers * between, 6 * layers * between)),
            ]
        )
    header = ["experts of", "tokens", "slots of an expert", "bytes of a token", "within the node", "to other nodes"]
    return _table([*header, "to other nodes, in a step", "with USE_CHECKPOINT"], rows)


def _reductions(model: nn.Module, processes: int, groups: ExpertGroups) -> list[str]:
    """By rings, in float32: an all-reduce sends each number twice, a gathering or a reduction to slices once."""
    others, copies = (processes - 1) / processes, (groups.copies - 1) / groups.copies
    dense, experts = FLOAT * _dense_numbers(model), FLOAT * _expert_numbers(model)
    rows = [
        ["ddp: all-reduce of the dense part", 2 * others * dense],
        ["fsdp2: two gatherings and a reduction of the dense part", 3 * others * dense],
        ["all-reduce over copies of experts", 2 * copies * experts],
    ]
    return _table(["", "MB"], [[name, f"{size / 1e6:,.1f}"] for name, size in rows])


def _dense_numbers(module: nn.Module) -> int:
    own = {id(parameter) for parameter in expert_parameters(module).values()}
    return sum(p.numel() for p in module.parameters() if p.requires_grad and id(p) not in own)


def _expert_numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in expert_parameters(model).values() if p.requires_grad)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))]


if __name__ == "__main__":
    main()
