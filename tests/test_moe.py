"""The mixture-of-experts layer: Tutel's numbers, an oracle that goes token by token, routers, errors, compilation."""

import copy
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import golden, make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_golden import check_layer, check_model, golden_layer, golden_model, wave
from torch import Tensor, nn

from models import build_model, experts, moe
from models.arguments import model_arguments
from models.expert_parallel import expert_parameters, global_grad_norm, parameter_counts, sync_expert_gradients
from models.experts import local_experts, takes_grouped_product, total_experts
from models.moe import MoELayer, collect_statistics
from models.routing import Choices, assign_slots, limited_choices, product_choices
from models.swin_transformer_moe import MoEMlp, SwinTransformerMoE
from optimizer import decay_groups
from utils import get_grad_norm

CASES = golden("moe")["parts"]
# Two stages on 16x16 images, with experts in the second block of each.
SMALL = {
    **{"img_size": 16, "patch_size": 2, "num_classes": 5, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)},
    **{"window_size": 4, "pretrained_window_sizes": (0, 0), "moe_blocks": ((1,), (1,)), "drop_path_rate": 0.0},
    **{"num_local_experts": 4, "init_std": 0.2},
}


def small_layer(*arguments, seed: int = 0, **named) -> MoELayer:
    torch.manual_seed(seed)
    named = {"gate_noise": 0.0, "init_std": 0.3, **named}
    return MoELayer(8, 16, *arguments, **named)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[True, False], ids=["kept", "slots"])
def both_ways(request, monkeypatch):
    """Without empty slots, as on a CPU, and with all of them, as on a device."""
    if not request.param:
        monkeypatch.setattr(moe, "_reads_freely", lambda x: False)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CASES["layer"])
def test_layer_is_tutels(name, monkeypatch):
    cfg, expected = CASES["layer"][name]["cfg"], CASES["layer"][name]["result"]
    layer = golden_layer(cfg)
    x = wave("x", tuple(cfg.get("xshape", (2, 20, 24)))).requires_grad_()
    noise = wave("noise.0", (x.shape[0] * x.shape[1], layer.num_experts))
    monkeypatch.setattr(torch, "randn_like", lambda z: noise)
    check_layer(layer, x, expected, exact=copy.deepcopy(layer).double())


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("name", CASES["model"])
def test_model_is_the_official_one(name, monkeypatch):
    cfg, expected = CASES["model"][name]["cfg"], CASES["model"][name]["result"]
    model = golden_model(cfg)
    assert {k: list(p.shape) for k, p in model.named_parameters()} == CASES["model"][name]["global_shapes"]
    names = iter(f"noise.{i}" for i in range(9))
    monkeypatch.setattr(torch, "randn_like", lambda z: wave(next(names), tuple(z.shape)))
    check_model(model, wave(cfg["image"], (2, 3, 32, 32)), expected)


def oracle(layer: MoELayer, x: Tensor) -> tuple[Tensor, int]:
    """Output (T, C) and the number of dropped choices of a flat linear router, token by token, in float64."""
    T, E, k, factor = len(x), layer.num_experts, layer.top_value, layer.capacity_factor
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    w1, w2, b1, b2 = (weights[f"experts.batched_{name}"] for name in ("fc1_w", "fc2_w", "fc1_bias", "fc2_bias"))
    p = torch.softmax(x.double() @ weights["gates.0.wg.weight"].T, 1)
    chosen = [sorted(range(E), key=lambda e, t=t: -p[t, e])[:k] for t in range(T)]
    order = sorted(range(T), key=lambda t: -p[t].max()) if layer.use_bpr else range(T)
    share = math.ceil(T / E)
    if factor > 0:
        capacity = k * int(factor * share)
    else:
        capacity = max(sum(e in experts for experts in chosen) for e in range(E))
        capacity = min(capacity, k * int(-factor * share)) if factor < 0 else capacity
    y, taken, dropped = torch.zeros(T, x.shape[1]).double(), [0] * E, 0
    for j in range(k):
        for t in order:
            e = chosen[t][j]
            taken[e] += 1
            if taken[e] > max(capacity, 1):
                dropped += 1
                continue
            gate = p[t, e] / (sum(p[t, i] for i in chosen[t]) if layer.normalize_gate and k > 1 else 1)
            y[t] += gate * (F.gelu(x[t].double() @ w1[e].T + b1[e]) @ w2[e] + b2[e])
    return y, dropped


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 25),
    E=st.integers(1, 5),
    k=st.integers(1, 3),
    factor=st.sampled_from([-1.25, -0.5, 0.0, 0.1, 0.5, 1.0, 1.25, 3.0]),
    bpr=st.booleans(),
    normalize=st.booleans(),
)
def test_layer_is_what_it_says_token_by_token(T, E, k, factor, bpr, normalize):
    layer = small_layer(E, min(k, E), factor, use_bpr=bpr, normalize_gate=normalize, seed=T)
    with torch.no_grad():
        layer.experts.batched_fc1_bias.normal_()
        layer.experts.batched_fc2_bias.normal_()
    x = tokens(T, 8)
    with collect_statistics(layer):
        y, _ = layer(x)
    expected, dropped = oracle(layer, x)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    assert layer.statistics.dropped == dropped and layer.statistics.tokens_per_expert.sum() == T * min(k, E)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("width", [8, 6])  # rows of 6 floats are not aligned as a grouped product wants them
def test_dropless_is_capacity_that_suffices(k, width, monkeypatch):
    monkeypatch.setattr(experts, "GROUPED_DEVICES", ("cpu",))
    torch.manual_seed(0)
    layer = MoELayer(width, 16, 5, k, 0.0, gate_noise=0.0, init_std=0.5, path="capacity")
    dropless = MoELayer(width, 16, 5, k, 0.01, gate_noise=0.0, path="dropless")
    dropless.load_state_dict(layer.state_dict())
    assert takes_grouped_product(torch.zeros(3, width), 16) == (width == 8)
    results = []
    for module in (layer, dropless):
        x = tokens(3, 7, width).requires_grad_()
        y, loss = module(x)
        grads = torch.autograd.grad(y.square().sum() + loss, [x, *module.parameters()])
        results.append([y, loss, *grads])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_differences():
    layer = small_layer(4, 2, 0.75, normalize_gate=True).double()
    x = tokens(9, 8).double().requires_grad_()
    choices = layer.route(x.detach().float()).choices
    slots = assign_slots(choices.experts, layer.num_experts)
    gates = choices.gates.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda x, g: layer.run_capacity(x, Choices(choices.experts, g), slots)[0], (x, gates))
    torch.autograd.gradcheck(lambda x, g: layer.run_dropless(x, Choices(choices.experts, g), slots), (x, gates))


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("k", [1, 2])
def test_infinite_tokens_stay_alone(value, k):
    """Other tokens, and experts that do not take it, meet what they met beside a finite one in its place."""
    layer = small_layer(6, k, 0.5, use_bpr=False)
    for bad in range(10):
        others = torch.arange(10) != bad
        x = tokens(10, 8).index_fill_(0, torch.tensor(bad), value).requires_grad_()
        y, _ = layer(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *layer.experts.parameters()])
        experts = layer.route(x.detach()).choices.experts
        slots = assign_slots(experts, 6)
        kept = slots.positions < layer.capacities(10, slots.counts)[0]
        finite = x.detach().index_fill(0, torch.tensor(bad), 1.0).requires_grad_()
        gates = layer.route(finite).p.gather(1, experts)
        answers = layer.experts(finite.expand(6, -1, -1))  # E, T, C: all tokens through all experts
        expected = ((gates * kept)[:, :, None] * answers[experts, torch.arange(10)[:, None]]).sum(1)
        assert not kept[others].all() and (slots.counts == 0).any()
        torch.testing.assert_close(y[others], expected[others])
        assert kept[bad].any() or not y[bad].any()
        exact = torch.autograd.grad(expected[others].square().sum(), [finite, *layer.experts.parameters()])
        untouched = torch.ones(6, dtype=torch.bool).index_fill(0, experts[bad][kept[bad]], False)
        for grad, other, rows in zip(grads, exact, [others, *[untouched] * 4], strict=True):
            torch.testing.assert_close(grad[rows], other[rows])


@pytest.mark.parametrize("path", ["capacity", "dropless"])
def test_two_runs_give_the_same_bits(path):
    layer = small_layer(4, 2, 1.0, path=path)
    runs = []
    for _ in range(2):
        x = tokens(4, 50, 8).requires_grad_()
        y, loss = layer(x)
        runs.append([y, *torch.autograd.grad(y.sum() + loss, [x, *layer.parameters()])])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@settings(max_examples=30, deadline=None)
@given(T=st.integers(0, 9), G=st.integers(1, 4), M=st.integers(1, 4), data=st.data())
def test_two_level_choices(T, G, M, data):
    kg = data.draw(st.integers(1, G))
    ke = data.draw(st.integers(1, M))
    p = tokens(T, G * M, seed=T + 10 * G).softmax(1)
    p_group = tokens(T, G, seed=T).softmax(1)
    found = product_choices(p, p_group, kg * ke, kg)
    limited = limited_choices(p, kg * ke, G, kg)
    for t in range(T):
        row = p[t].tolist()
        groups = sorted(range(G), key=lambda g, t=t: -p_group[t, g])[:kg]
        picked = [e for g in groups for e in sorted(range(g * M, g * M + M), key=lambda e: -row[e])[:ke]]
        picked.sort(key=lambda e: -row[e])
        assert found.experts[t].tolist() == picked and found.gates[t].tolist() == [row[e] for e in picked]
        best = sorted(range(G), key=lambda g: -sum(sorted(row[g * M : g * M + M])[-2:]))[:kg]
        picked = sorted((e for g in best for e in range(g * M, g * M + M)), key=lambda e: -row[e])[: kg * ke]
        assert limited.experts[t].tolist() == picked and limited.gates[t].tolist() == [row[e] for e in picked]


@pytest.mark.parametrize("cosine", [False, True])
def test_two_level_routers(cosine):
    layer = small_layer(6, 2, 2.0, cosine, router="product", groups=3, top_groups=2, cosine_router_dim=4).eval()
    x = tokens(20, 8)
    routed = layer.route(x)
    torch.testing.assert_close(routed.p.sum(1), torch.ones(20))
    logits, group_logits = layer.gates[0](x)
    p_group = group_logits.softmax(1)
    within = torch.stack([logits[:, 2 * g : 2 * g + 2].softmax(1) * p_group[:, g : g + 1] for g in range(3)], 1)
    torch.testing.assert_close(routed.p, within.flatten(1))
    first = routed.choices.experts[:, 0]
    share = torch.bincount(first, minlength=6) / 20
    group_share = torch.bincount(first // 2, minlength=3) / 20
    expected = 6 * (routed.p.mean(0) * share).sum() + 3 * (p_group.mean(0) * group_share).sum()
    torch.testing.assert_close(routed.loss, expected)
    limited = small_layer(6, 2, 2.0, cosine, router="limited", groups=3, top_groups=1, cosine_router_dim=4)
    experts = limited.route(x).choices.experts
    assert (experts[:, 0] // 2 == experts[:, 1] // 2).all()  # one group only
    (y, loss), parameters = layer(x), list(layer.parameters())
    grads = torch.autograd.grad(y.square().sum() + loss, parameters, allow_unused=True)
    assert all(grad is not None and grad.isfinite().all() for grad in grads)


WRONG = {
    "TOP_VALUE=5": {"top_value": 5},
    "TOP_VALUE=0": {"top_value": 0},
    "GATE_NOISE=0.0": {"is_gshard_loss": False, "gate_noise": 0.0},
    "GATE_NOISE=-1.0": {"is_gshard_loss": False, "gate_noise": -1.0},
    "NUM_EXPERTS=1": {"is_gshard_loss": False, "num_local_experts": 1},
    "NUM_LOCAL_EXPERTS=0": {"num_local_experts": 0},
    "NUM_LOCAL_EXPERTS=-2": {"num_local_experts": -2},
    "PATH='fast'": {"path": "fast"},
    "ROUTER='tree'": {"router": "tree"},
    "BACKEND='other'": {"backend": "other"},
    "GROUPS=3": {"router": "product", "groups": 3},
    "TOP_GROUPS=3": {"router": "limited", "groups": 2, "top_groups": 3},
    "TOP_VALUE=1": {"router": "product", "groups": 2, "top_groups": 2},
    "TOP_VALUE=3": {"router": "limited", "groups": 2, "top_groups": 1, "top_value": 3},
    "ROUTER='limited'": {"router": "limited", "groups": 2, "is_gshard_loss": False},
}


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_the_key_and_its_value(message):
    settings = {"num_local_experts": 4, "top_value": 1, **WRONG[message]}
    with pytest.raises(ValueError, match=rf"^MODEL\.SWIN_MOE\.{message}") as error:
        MoEMlp(8, 16, **settings)
    assert "\n" not in str(error.value)


def test_models_name_the_key_and_its_value():
    with pytest.raises(ValueError, match=r"stage 2 has blocks 0 to 1.*") as error:
        SwinTransformerMoE(**{**SMALL, "moe_blocks": ((1,), (2,))})
    assert "MODEL.SWIN_MOE.MOE_BLOCKS" in str(error.value)
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.EXPERT_PARALLEL=2"):
        SwinTransformerMoE(**SMALL, expert_parallel=2)


def test_experts_of_each_process():
    for total, processes, local in ((32, 32, 1), (32, 8, 4), (8, 32, -4), (1, 2, -2), (6, 1, 6)):
        assert local_experts(total, processes) == local and total_experts(local, processes) == total
    for total, processes in ((6, 4), (4, 6), (0, 2)):
        with pytest.raises(ValueError, match=rf"MODEL\.SWIN_MOE\.NUM_EXPERTS={total}"):
            local_experts(total, processes)


@pytest.mark.parametrize("path", ["capacity", "dropless"])
def test_routing_is_in_float32_under_autocast(path):
    layer = small_layer(4, 2, 0.75, path=path, normalize_gate=True)
    x = tokens(2, 40, 8).requires_grad_()
    with collect_statistics(layer):
        y, loss = layer(x)
        expected = layer.statistics
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low, low_loss = layer(x)
    assert torch.equal(low_loss, loss) and low.dtype == torch.bfloat16
    assert torch.equal(layer.statistics.tokens_per_expert, expected.tokens_per_expert)
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.02)
    grads = torch.autograd.grad(low.float().square().sum(), [x, *layer.parameters()])
    exact = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    for grad, other in zip(grads, exact, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=0.1, atol=0.05 * other.abs().max().item())


def test_statistics():
    layer = small_layer(4, 2, 0.5)
    x = tokens(1, 30, 8)
    layer(x)
    assert layer.statistics is None and not layer.collect
    model = nn.Sequential(layer)
    with collect_statistics(model) as layers:
        _, loss = layer(x)
    seen = layers["0"].statistics
    assert not layer.collect and not any(part.requires_grad for part in seen)
    p = (x[0] @ layer.gates[0].wg.weight.T).softmax(1)
    assert seen.tokens_per_expert.tolist() == torch.bincount(p.topk(2).indices.flatten(), minlength=4).tolist()
    torch.testing.assert_close(seen.router_entropy, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(seen.auxiliary_loss, loss.detach())
    lost = (seen.tokens_per_expert - 2 * 4).clamp(min=0).sum() / 60
    torch.testing.assert_close(seen.dropped_share, lost)
    assert lost > 0 and torch.equal(seen.summed().dropped_share.float(), seen.dropped_share)


@pytest.mark.parametrize("shape", [(0, 20, 8), (0, 8)])
@pytest.mark.parametrize("path", ["capacity", "dropless"])
@pytest.mark.parametrize("gshard", [False, True])
def test_no_tokens(shape, path, gshard):
    layer = small_layer(4, 2, path=path, is_gshard_loss=gshard, gate_noise=1.0)
    x = torch.zeros(shape, requires_grad=True)
    with collect_statistics(layer):
        y, loss = layer(x)
    assert y.shape == shape and loss == 0 and layer.statistics.router_entropy == 0
    grads = torch.autograd.grad(y.sum() + loss, list(layer.parameters()), allow_unused=True)
    assert all(grad is None or not grad.any() for grad in grads)


def test_models_take_no_images():
    model = SwinTransformerMoE(**SMALL).eval()
    with torch.inference_mode():
        logits, loss = model(torch.zeros(0, 3, 16, 16))
    assert logits.shape == (0, 5) and loss == 0
    with pytest.raises(ValueError, match="a batch without images"):
        model(torch.zeros(0, 3, 16, 16))


def step(model: nn.Module, images: Tensor, seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(seed)
    logits, loss = model(images)
    loss = logits.square().mean() + loss
    return loss, torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    arguments = {**SMALL, "is_gshard_loss": False, "moe_drop": 0.1, "drop_path_rate": 0.2, "aux_loss_weight": 1.0}
    model = SwinTransformerMoE(**arguments)
    saving = SwinTransformerMoE(**arguments, use_checkpoint=True)
    saving.load_state_dict(model.state_dict())
    images = tokens(3, 3, 16, 16)
    (loss, grads), (other, others) = step(model, images), step(saving, images)
    assert torch.equal(loss, other) and all(torch.equal(*pair) for pair in zip(grads, others, strict=True))
    assert not torch.equal(step(model, images, seed=4)[0], loss)  # noise and dropout are there


COMPILED = [
    pytest.param("capacity", "aot_eager", False),
    pytest.param("capacity", "aot_eager", True, marks=pytest.mark.slow),
    pytest.param("dropless", "aot_eager", True, marks=pytest.mark.slow),
    pytest.param("capacity", "inductor", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("path", "backend", "gshard"), COMPILED)
def test_compiled_layers_are_the_same(path, backend, gshard):
    layer = small_layer(4, 2, 0.75, is_gshard_loss=gshard, gate_noise=1.0, path=path).eval()
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for module in (layer, compiled):
        x = tokens(3, 7, 8).requires_grad_()
        y, loss = module(x)
        results.append([y, loss, *torch.autograd.grad(y.square().sum() + loss, [x, *layer.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_models_are_the_same():
    torch.manual_seed(0)
    model = SwinTransformerMoE(**SMALL, is_gshard_loss=False, top_value=2).eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = tokens(2, 3, 16, 16)
    (loss, grads), (other, others) = step(model, images), step(compiled, images)
    torch.testing.assert_close(other, loss)
    for one, two in zip(grads, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_initial_weights():
    model = SwinTransformerMoE(**{**SMALL, "embed_dim": 16}, cosine_router=True, mlp_fc2_bias=False)
    layer = model.layers[1].blocks[1].mlp._moe_layer
    experts, gate = layer.experts, layer.gates[0]
    for weight in (experts.batched_fc1_w, experts.batched_fc2_w, gate.cosine_projector.weight):
        assert weight.std().item() == pytest.approx(0.2, rel=0.05) and abs(weight.mean().item()) < 0.02
    assert gate.sim_matrix.std().item() == pytest.approx(0.01, rel=0.1)
    assert gate.temperature.item() == pytest.approx(math.log(2))
    assert not any(p.any() for p in (experts.batched_fc1_bias, experts.batched_fc2_bias, gate.cosine_projector.bias))
    assert not experts.batched_fc2_bias.requires_grad and experts.batched_fc1_bias.requires_grad
    assert not torch.equal(experts.batched_fc1_w[0], experts.batched_fc1_w[1])
    assert model.layers[1].blocks[0].mlp.fc2.bias is None


def test_one_draw_of_the_global_generator_decides_all_experts():
    torch.manual_seed(5)
    few, after_few = small_layer_state(4), torch.rand(())
    torch.manual_seed(5)
    many, after_many = small_layer_state(8), torch.rand(())
    assert torch.equal(few, many[:4]) and torch.equal(after_few, after_many)


def small_layer_state(count: int) -> Tensor:
    layer = MoELayer(8, 16, count, 1)
    layer.reset_parameters()
    return layer.experts.batched_fc1_w.detach()


def test_weight_decay():
    model = SwinTransformerMoE(**SMALL, cosine_router=True, router="product", groups=2)
    names = {parameter: name.rsplit("_moe_layer.", 1)[-1] for name, parameter in model.named_parameters()}
    decayed = {names[p] for p in decay_groups(model)[0]["params"] if "experts" in names[p] or "gates" in names[p]}
    assert decayed == {"experts.batched_fc1_w", "experts.batched_fc2_w"}
    linear = SwinTransformerMoE(**SMALL)
    wg = linear.layers[0].blocks[1].mlp._moe_layer.gates[0].wg.weight
    assert any(p is wg for p in decay_groups(linear)[0]["params"])


def test_counts_and_helpers_on_one_process():
    model = SwinTransformerMoE(**SMALL)
    dense = SwinTransformerMoE(**{**SMALL, "moe_blocks": ((-1,), (-1,))})
    single, whole = parameter_counts(model)
    routers = 4 * 8 + 4 * 16
    assert single == sum(p.numel() for p in dense.parameters()) + routers
    assert whole == sum(p.numel() for p in model.parameters())
    mlps = sum(2 * side * side * width * width * 4 for side, width in ((8, 8), (4, 16)))
    assert model.flops() - dense.flops() == pytest.approx(0.25 * mlps)
    assert all(p.skip_allreduce for p in expert_parameters(model).values()) and len(expert_parameters(model)) == 8
    assert set(expert_parameters(model)) <= set(model._ddp_params_and_buffers_to_ignore)
    logits, loss = model(tokens(2, 3, 16, 16))
    (logits.sum() + loss).backward()
    before = [p.grad.clone() for p in model.parameters()]
    sync_expert_gradients(model)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before, strict=True))
    torch.testing.assert_close(global_grad_norm(model), get_grad_norm(model.parameters()))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens(2, 3, 16, 16))[0].isfinite(), logits.isfinite())


def test_stages_of_models_with_experts():
    model = SwinTransformerMoE(**SMALL).eval()
    images = tokens(2, 3, 16, 16)
    features, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(features, model.forward_features(images)[0])
    assert [tuple(one.shape) for one in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]
    assert len(model.as_feature_backbone()(images)) == 2


def test_configuration():
    cfg = "configs/swinmoe/swin_moe_small_patch4_window12_192_16expert_32gpu_22k.yaml"
    assert model_arguments(make_config(cfg))["num_experts"] == 16
    opts = ["MODEL.TYPE", "swin_moe", "MODEL.NAME", "mine", "MODEL.SWIN_MOE.NUM_LOCAL_EXPERTS", 3, "DATA.IMG_SIZE", 32]
    opts += ["MODEL.SWIN_MOE.DEPTHS", [1, 1], "MODEL.SWIN_MOE.NUM_HEADS", [1, 2], "MODEL.SWIN_MOE.EMBED_DIM", 8]
    opts += ["MODEL.SWIN_MOE.WINDOW_SIZE", 4, "MODEL.SWIN_MOE.MOE_BLOCKS", [[-1], [0]], "MODEL.NUM_CLASSES", 4]
    model = build_model(make_config(None, *opts))
    assert model.layers[1].blocks[0].mlp._moe_layer.num_experts == 3
    named = build_model(make_config(None, *opts, "MODEL.NAME", "swin_moe_6expert_2gpu"))
    assert named.layers[1].blocks[0].mlp._moe_layer.num_experts == 6


def test_tutel_is_refused_where_it_is_wrong_or_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tutel", None)
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.BACKEND='tutel'.*pip install.*native"):
        MoEMlp(8, 16, 4, 1, backend="tutel")
    for factor in (0.0, -1.25):
        with pytest.raises(ValueError, match=rf"CAPACITY_FACTOR={factor} with MODEL\.SWIN_MOE\.USE_BPR"):
            MoEMlp(8, 16, 4, 1, factor, backend="tutel")
    for wrong in ({"path": "dropless"}, {"router": "product"}):
        with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.BACKEND='tutel' has neither"):
            MoEMlp(8, 16, 4, 1, backend="tutel", **wrong)


def test_tutel_is_called_as_officially(monkeypatch):
    class Layer(nn.Module):
        def __init__(self, **arguments):
            super().__init__()
            self.arguments = arguments
            self.experts = nn.Module()
            for name, shape in (
                ("fc1_w", (4, 16, 8)),
                ("fc2_w", (4, 16, 8)),
                ("fc1_bias", (4, 16)),
                ("fc2_bias", (4, 8)),
            ):
                self.experts.register_parameter(f"batched_{name}", nn.Parameter(torch.ones(shape)))
            for name, parameter in self.experts.named_parameters():
                arguments["scan_expert_func"](name, parameter)

        def forward(self, x):
            y = x + 1
            y.l_aux = torch.tensor(7.0)
            return y

    module = ModuleType("tutel.moe")
    module.moe_layer = Layer
    monkeypatch.setitem(sys.modules, "tutel", SimpleNamespace(moe=module))
    monkeypatch.setitem(sys.modules, "tutel.moe", module)
    mlp = MoEMlp(8, 16, 4, 2, 1.5, True, True, mlp_fc2_bias=False, moe_drop=0.5, backend="tutel")
    seen, experts = mlp._moe_layer.arguments, mlp._moe_layer.experts
    gate = {"type": "cosine_top", "k": 2, "capacity_factor": 1.5, "gate_noise": 1.0, "fp32_gate": True}
    assert seen["gate_type"] == {**gate, "proj_dim": 256, "init_t": 0.5} and seen["model_dim"] == 8
    assert (seen["seeds"], seen["batch_prioritized_routing"]) == ((1, 1, 1), True)
    assert (seen["normalize_gate"], seen["is_gshard_loss"], seen["group"]) == (True, True, None)
    assert (seen["experts"]["count_per_node"], seen["experts"]["hidden_size_per_expert"]) == (4, 16)
    activation = seen["experts"]["activation_fn"]
    assert (activation(torch.ones(1000)) == 0).any() and not (mlp.eval(), activation(torch.ones(1000)) == 0)[1].any()
    assert not experts.batched_fc1_bias.any() and not experts.batched_fc2_bias.requires_grad
    assert 0 < experts.batched_fc1_w.std() < 0.03
    y, loss = mlp(torch.zeros(2, 8))
    assert y.eq(1).all() and loss == 7
    assert all(parameter.skip_allreduce for parameter in expert_parameters(mlp).values())
    assert parameter_counts(mlp) == (2 * 16 * 8 + 16, 4 * (2 * 16 * 8 + 16))


@pytest.mark.gpu
@pytest.mark.parametrize("path", ["capacity", "dropless"])
def test_layers_on_an_accelerator(path):
    layer = MoELayer(32, 64, 4, 2, 1.0, gate_noise=0.0, init_std=0.3, path=path)
    device = torch.accelerator.current_accelerator()
    moved = copy.deepcopy(layer).to(device)
    x = tokens(2, 100, 32)
    y, loss = layer(x)
    torch.testing.assert_close(moved(x.to(device))[0].cpu(), y, rtol=1e-3, atol=1e-4)
    if device.type == "cuda" and path == "capacity":
        x = x.to(device).requires_grad_()
        torch.cuda.set_sync_debug_mode("error")  # nothing below waits for the device
        try:
            y, loss = moved(x)
            (y.square().sum() + loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
