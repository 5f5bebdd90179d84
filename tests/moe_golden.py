"""How the golden numbers of tests/golden/moe.json are made and compared, for one process and for many."""

import zlib
from typing import Any

import torch
import torch.nn.functional as F
from conftest import golden
from torch import Tensor, nn

from models.expert_parallel import expert_modules
from models.moe import MoELayer, collect_statistics
from models.swin_transformer_moe import SwinTransformerMoE

CLOSE = 1e-4  # relative


def wave(name: str, shape: tuple[int, ...], scale: float = 1.0, offset: float = 0.0) -> Tensor:
    """The golden formula."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    phase = 0.11 * (zlib.crc32(name.encode()) % 1000)
    return (offset + scale * torch.sin(0.37 * i + phase)).float().view(shape)


def take_part(layer: MoELayer, key: str, value: Tensor) -> Tensor:
    """This process's part of the global tensor ``value`` of all experts, under its name in the layer."""
    experts = layer.experts
    rank, shard = layer.processes.rank, layer.processes.rank % experts.shards
    if not key.startswith("experts."):
        return value
    value = value[experts.first : experts.first + experts.num_local]
    if experts.shards == 1:
        return value
    assert experts.first == rank // experts.shards
    if key.endswith("fc2_bias"):
        width = -(-value.shape[1] // experts.shards)
        return F.pad(value, (0, width * experts.shards - value.shape[1])).split(width, dim=1)[shard]
    return value.split(experts.hidden, dim=1)[shard]


@torch.no_grad()
def fill_layer(layer: MoELayer, scales: dict[str, Any], prefix: str = "") -> None:
    experts, shapes = layer.experts, {}
    for key, parameter in layer.named_parameters():
        shapes[key] = list(parameter.shape)
        if key.startswith("experts."):
            shapes[key][0] = layer.num_experts
            shapes[key][1] = layer.experts.dim if key.endswith("fc2_bias") else experts.hidden * experts.shards
    for key, parameter in layer.named_parameters():
        scale, offset = scales[key]
        parameter.copy_(take_part(layer, key, wave(prefix + key, tuple(shapes[key]), scale, offset)))


def golden_layer(cfg: dict[str, Any], num_local: int | None = None, **arguments) -> MoELayer:
    """A layer of 24 channels and 32 hidden units with golden weights."""
    layer = MoELayer(
        24,
        32,
        num_local or cfg.get("E", 4),
        cfg["k"],
        cfg["cf"],
        cosine_router=cfg["router"] == "cosine",
        normalize_gate=cfg["normalize_gate"],
        use_bpr=cfg["bpr"],
        is_gshard_loss=cfg["gshard"],
        gate_noise=cfg["gate_noise"],
        cosine_router_dim=8,
        **arguments,
    )
    scales = dict(golden("moe")["meta"]["layer_scales_[scale,offset]"])
    if "temperature" in cfg:
        scales["gates.0.temperature"] = [0.0, cfg["temperature"]]
    fill_layer(layer, scales)
    return layer.train(cfg.get("train", False))


def close(value: Tensor, expected: Any, tiny: float = 1e-6) -> None:
    """Relative to the largest expected number."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    largest = max(expected.abs().max().item(), tiny)
    torch.testing.assert_close(value.detach().double(), expected, rtol=0.0, atol=CLOSE * largest)


def check_layer(layer: MoELayer, x: Tensor, expected: dict[str, Any], exact: MoELayer | None = None) -> None:
    """Outputs, auxiliary loss, routing counts and gradients of one forward pass.

    Args:
        exact: the layer in float64. The gradients of the auxiliary loss may be nearer to its than the golden ones are,
            which lose up to 2e-4 to rounding, instead of close to those.
    """
    with collect_statistics(layer):
        y, loss = layer(x)
    numbers = y.detach().flatten()
    assert y.shape == x.shape and y.dtype == torch.float32 and numbers.numel() == expected["y"]["numel"]
    close(numbers[:16], expected["y"]["first"])
    close(numbers.norm(), expected["y"]["l2"])
    close(numbers.std(correction=0), expected["y"]["std_pop"])
    close(numbers.mean() / numbers.std(), expected["y"]["mean"] / expected["y"]["std_pop"], tiny=1.0)
    close(loss, expected["l_aux"])
    assert (y.flatten(0, -2) == 0).all(1).sum() == expected["all_zero_output_rows"]
    check_routing(layer, expected["routing"])
    names = [name for name, _ in layer.named_parameters()]
    parameters = list(layer.parameters())
    grads = torch.autograd.grad(loss, [x, *parameters], retain_graph=True, allow_unused=True)
    assert all(grad is None or not name.startswith("experts.") for name, grad in zip(["x", *names], grads, strict=True))
    exacts = [None] * len(grads)
    if exact is not None:
        double = x.detach().double().requires_grad_()
        exacts = torch.autograd.grad(exact(double)[1], [double, *exact.parameters()], allow_unused=True)
    for name, grad, true in zip(["x", *names], grads, exacts, strict=True):
        if name in expected["grad_l2_of_l_aux"]:
            wanted = expected["grad_l2_of_l_aux"][name]
            if true is None or abs(grad.norm() - true.norm()) > abs(wanted - true.norm()):
                close(grad.norm(), wanted, tiny=1e-2)
    grads = torch.autograd.grad((y * wave("grad_out", tuple(y.shape))).sum(), [x, *parameters], allow_unused=True)
    norms, firsts = (expected[f"grad_{kind}_of_sum_y_times_grad_out"] for kind in ("l2", "first4"))
    assert set(norms) == {"x", *names}
    for name, grad in zip(["x", *names], grads, strict=True):
        close(grad.norm(), norms[name], tiny=1e-2)
        close(grad.flatten()[:4], firsts[name], tiny=max(norms[name] / grad.numel() ** 0.5, 1e-2))


def check_routing(layer: MoELayer, expected: dict[str, Any]) -> None:
    seen = layer.statistics
    assert seen.tokens_per_expert.tolist() == torch.tensor(expected["routed_per_slot"]).sum(0).tolist()
    kept = sum(map(sum, expected["kept_per_slot"]))
    assert int(seen.tokens_per_expert.sum() - seen.dropped) == kept
    assert int(seen.tokens) == expected["tokens"] and layer.top_value == expected["k"]
    own, _ = layer.capacities(expected["tokens"], seen.tokens_per_expert)
    assert own == expected["capacity"]


@torch.no_grad()
def golden_model(cfg: dict[str, Any]) -> nn.Module:
    """A model with golden weights."""
    skipped = ("world", "train", "image")
    model = SwinTransformerMoE(**{key: value for key, value in cfg.items() if key not in skipped})
    layers = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    for name, parameter in model.named_parameters():
        scale, offset = _model_scale(name, parameter)
        prefix = next((prefix for prefix in layers if name.startswith(prefix)), None)
        if prefix is None or ".experts." not in name:
            parameter.copy_(wave(name, tuple(parameter.shape), scale, offset))
            continue
        layer = layers[prefix]
        shape = (layer.num_experts, *parameter.shape[1:])
        value = wave(name, shape, scale, offset) if parameter.requires_grad else torch.zeros(shape)
        parameter.copy_(take_part(layer, name.removeprefix(prefix), value))
    return model.train(cfg["train"])


def _model_scale(name: str, parameter: Tensor) -> tuple[float, float]:
    if name.endswith("temperature"):
        return 0.0, 0.6931471805599453
    if parameter.ndim == 1 and name.endswith("weight"):
        return 0.1, 1.0
    if parameter.ndim == 1 or name.endswith("_bias"):
        return 0.05, 0.0
    if "gates." in name or "cpb_mlp" in name:
        return 0.5, 0.0
    return (0.2, 0.0) if name == "head.weight" else (0.3, 0.0)


def check_model(model: nn.Module, images: Tensor, expected: dict[str, Any], sync=lambda model: None) -> None:
    """Logits, losses, routing, and the norms of gradients after ``sync``."""
    with collect_statistics(model) as layers:
        logits, auxiliary = model(images)
    close(logits, expected["logits"])
    close(auxiliary, expected["aux_times_weight"])
    loss = F.cross_entropy(logits, torch.tensor([1, 3])) + auxiliary
    close(loss, expected["loss"])
    for layer, routing in zip(layers.values(), expected.get("routing") or [], strict=True):
        check_routing(layer, routing)
    loss.backward()
    sync(model)
    for name, parameter in model.named_parameters():
        norm = expected["grad_l2"][name]
        assert (parameter.grad is None) == (norm is None), name
        if norm is not None:
            close(parameter.grad.norm(), norm, tiny=1e-4)
    assert {name for name, _ in expert_modules(model)} == {f"{name}.experts" for name in layers}
