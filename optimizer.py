"""Optimizers by name, and their parameter groups: no weight decay on vectors, lower rates for lower layers."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.optim import Lamb
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

# Settings that tell optimizers apart: SGD, Adam and LAMB.
KIND_KEYS = {"momentum", "nesterov", "betas", "bias_correction"}
# What a saved state must not decide: how the optimizer computes on the device that it runs on now.
IMPLEMENTATION_KEYS = ("fused", "foreach", "capturable", "differentiable", "maximize")
FUSED_DEVICES = ("cuda", "xpu", "mps", "cpu")  # one pass over a parameter and its moments, not eight


def _sgd(groups: list[dict], lr: float, weight_decay: float, settings: Any, fused: bool | None) -> Optimizer:
    optimizer = SGD(groups, lr=lr, momentum=settings.MOMENTUM, nesterov=True, weight_decay=weight_decay, fused=fused)
    _fill_buffers(optimizer)
    return optimizer


def _adamw(groups: list[dict], lr: float, weight_decay: float, settings: Any, fused: bool | None) -> Optimizer:
    return AdamW(groups, lr=lr, betas=settings.BETAS, eps=settings.EPS, weight_decay=weight_decay, fused=fused)


def _fused_lamb(groups: list[dict], lr: float, weight_decay: float, settings: Any, fused: bool | None) -> Optimizer:
    return Lamb(groups, lr=lr, betas=settings.BETAS, eps=settings.EPS, weight_decay=weight_decay)


def _fill_buffers(optimizer: Optimizer) -> None:
    """Momentum's first values: a fused step that is skipped on the device would leave them uninitialised."""
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def _fuses(parameter: nn.Parameter) -> bool | None:
    """Whether a step is one kernel; None leaves it to PyTorch.

    Not where FSDP2 keeps slices on the CPU of a model that runs elsewhere: whether all gradients are finite is known
    there, and a CPU's kernel does not wait for it.
    """
    mesh = getattr(parameter, "device_mesh", None)
    offloaded = mesh is not None and mesh.device_type != parameter.device.type
    return True if parameter.device.type in FUSED_DEVICES and not offloaded else None


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "fused_adam": _adamw,  # apex's name
    "fused_lamb": _fused_lamb,
}


def build_optimizer(config: Any, model: nn.Module, simmim: bool = False, is_pretrain: bool = False) -> Optimizer:
    """The optimizer of ``TRAIN.OPTIMIZER`` (official ``optimizer.py``).

    SimMIM fine-tuning (``simmim`` without ``is_pretrain``) has one pair of groups for each layer.

    Raises ``ValueError`` for an unknown name.
    """
    settings = config.TRAIN.OPTIMIZER
    name = settings.NAME.lower()
    if name not in OPTIMIZERS:
        raise ValueError(f"TRAIN.OPTIMIZER.NAME={settings.NAME!r}; choose from {sorted(OPTIMIZERS)}")
    if simmim and not is_pretrain:
        depths = config.MODEL[config.MODEL.TYPE.upper()].DEPTHS
        groups = layer_groups(model, config.TRAIN.BASE_LR, config.TRAIN.WEIGHT_DECAY, depths, config.TRAIN.LAYER_DECAY)
    else:
        groups = decay_groups(model)
    fused = _fuses(next(model.parameters()))
    return OPTIMIZERS[name](groups, config.TRAIN.BASE_LR, config.TRAIN.WEIGHT_DECAY, settings, fused)


def needs_no_decay(name: str, parameter: torch.Tensor, skip: Iterable[str], keywords: Iterable[str]) -> bool:
    """Vectors, biases, and whatever the model names: weight decay is for matrices."""
    return parameter.ndim == 1 or name.endswith(".bias") or name in skip or any(word in name for word in keywords)


def decay_groups(model: nn.Module) -> list[dict]:
    """Two groups: parameters with weight decay, then those without."""
    decay, no_decay = [], []
    for _, parameter, exempt in _trainable(model):
        (no_decay if exempt else decay).append(parameter)
    return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]


def layer_groups(
    model: nn.Module, lr: float, weight_decay: float, depths: Iterable[int], layer_decay: float
) -> list[dict]:
    """Groups by layer and weight decay; each layer's rate is ``layer_decay`` times that of the layer above it.

    The groups hold the scaled rate and, for information, ``lr_scale`` (official SimMIM fine-tuning).
    """
    num_layers = sum(depths) + 2
    groups: dict[str, dict] = {}
    for name, parameter, exempt in _trainable(model):
        layer = layer_of(name, list(depths))
        key = f"layer_{layer}_{'no_decay' if exempt else 'decay'}"
        scale = layer_decay ** (num_layers - 1 - layer)
        group = groups.setdefault(
            key,
            {
                "group_name": key,
                "weight_decay": 0.0 if exempt else weight_decay,
                "params": [],
                "lr": lr * scale,
                "lr_scale": scale,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, depths: list[int]) -> int:
    """0 for the patches, then a number for each block, which the merging after it shares, then one for the rest."""
    if name == "mask_token" or name.startswith("patch_embed"):
        return 0
    if name.startswith("layers."):
        stage, kind, block = [*name.split("."), ""][1:4]
        before = sum(depths[: int(stage)])
        return before + (int(block) + 1 if kind == "blocks" else depths[int(stage)])
    return sum(depths) + 1


def _trainable(model: nn.Module) -> Iterable[tuple[str, nn.Parameter, bool]]:
    skip = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    keywords = model.no_weight_decay_keywords() if hasattr(model, "no_weight_decay_keywords") else ()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, needs_no_decay(name, parameter, skip, keywords)


def load_optimizer_state(optimizer: Optimizer, state: dict) -> None:
    """Load a saved state, but keep how this optimizer computes (fused or not) on the device that it runs on.

    Raises ``ValueError`` where the state is of another kind of optimizer or of other groups.
    """
    kinds = [sorted(KIND_KEYS & set(groups[0])) for groups in (state["param_groups"], optimizer.param_groups)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"it has the settings {kinds[0]}, this one {kinds[1]}; choose the optimizer by --optim")
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        groups.append({**saved, **{key: own[key] for key in IMPLEMENTATION_KEYS if key in own}})
    groups += state["param_groups"][len(groups) :]  # a wrong number of groups is PyTorch's error to raise
    optimizer.load_state_dict({**state, "param_groups": groups})
    _fill_buffers(optimizer)
