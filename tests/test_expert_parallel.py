"""Experts over real processes, by gloo: Tutel's numbers, one process's results, uneven batches, and processes that die.

Functions named ``on_...`` run in every process of a `Team`.
"""

import copy
import os
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import golden
from moe_golden import check_layer, check_model, golden_layer, golden_model, wave
from team import SECONDS, Team
from torch.nn.parallel import DistributedDataParallel

import distributed
from models.expert_parallel import (
    ExpertGroups,
    as_groups,
    expert_groups,
    expert_parameters,
    global_grad_norm,
    parameter_counts,
    sync_expert_gradients,
)
from models.moe import MoELayer, collect_statistics
from models.swin_transformer_moe import SwinTransformerMoE

CASES = golden("moe")["parts"]
LAYERS = [(part, name) for part in ("ep2", "ep2s", "ep4s") for name in CASES[part]]


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    """``team(size)``: processes that stay between tests."""
    teams: dict[int, Team] = {}

    def get(size: int) -> Team:
        if size not in teams or not teams[size].alive:
            teams[size] = Team(size, tmp_path_factory.mktemp(f"team{size}"))
        return teams[size]

    yield get
    for started in teams.values():
        started.stop()


def on_golden_layer(part: str, name: str) -> None:
    cfg, expected = CASES[part][name]["cfg"], CASES[part][name]["result"][f"rank{distributed.rank()}"]
    layer = golden_layer(cfg, cfg["num_local_experts"])
    check_layer(layer, wave(f"x.rank{distributed.rank()}", (2, 20, 24)).requires_grad_(), expected)


@pytest.mark.parametrize(("part", "name"), LAYERS)
def test_layers_over_processes_are_tutels(part, name, team):
    team(CASES[part][name]["cfg"]["world"]).run(on_golden_layer, part, name)


def on_golden_model(name: str) -> None:
    cfg, rank = CASES["model_ep2"][name]["cfg"], distributed.rank()
    model = golden_model(cfg)

    def sync(model):
        sync_expert_gradients(model)
        own = {id(parameter) for parameter in expert_parameters(model).values()}
        for parameter in model.parameters():
            if id(parameter) not in own:  # what DDP does
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    images = wave(f"{cfg['image']}.rank{rank}", (2, 3, 32, 32))
    check_model(model, images, CASES["model_ep2"][name]["result"][f"rank{rank}"], sync)


@pytest.mark.parametrize("name", CASES["model_ep2"])
def test_models_over_processes_are_official(name, team):
    team(2).run(on_golden_model, name)


# Two stages of one block with experts each, on 8x8 images.
SMALL = {
    **{"img_size": 8, "patch_size": 1, "num_classes": 5, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 4)},
    **{"window_size": 4, "pretrained_window_sizes": (0, 0), "moe_blocks": ((0,), (0,)), "drop_path_rate": 0.0},
    **{"num_experts": 4, "init_std": 0.1, "gate_noise": 0.0, "aux_loss_weight": 0.1},
}
BATCH = 8  # images of all processes together


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    labels = torch.randint(5, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, 8, 8, generator=generator) + labels[:, None, None, None], labels


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, experts of all processes together."""
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in expert_parameters(model).items():
        module = model.get_submodule(name.rsplit(".", 1)[0])
        groups, shards = module.expert_groups, module.shards
        if groups.size == 1:
            continue
        parts = [torch.empty_like(parameter) for _ in range(groups.size)]
        dist.all_gather(parts, parameter.detach(), group=groups.ep_group)
        joined = [torch.cat(parts[i : i + shards], dim=1) for i in range(0, groups.size, shards)]
        state[name] = torch.cat(joined)[:, : module.dim] if name.endswith("fc2_bias") else torch.cat(joined)
    return state


def on_training(steps: int, clip: float, optimizer: str, chunks: int, **arguments) -> tuple[dict, list[float], float]:
    """Train as the engine does; ``chunks`` parts of the batch, one for each process, or after each other on one."""
    model = SwinTransformerMoE(**{**SMALL, **arguments})
    world, rank = distributed.world_size(), distributed.rank()
    replica = DistributedDataParallel(model) if world > 1 else model
    if optimizer == "adamw":
        chosen = torch.optim.AdamW(model.parameters(), lr=1e-2)
    else:
        chosen = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    norms, loss = [], None
    for step in range(steps):
        images, labels = batch(step)
        parts = range(chunks) if world == 1 else [rank]
        for part in parts:
            own = slice(part * BATCH // chunks, (part + 1) * BATCH // chunks)
            logits, auxiliary = replica(images[own])
            loss = F.cross_entropy(logits, labels[own]) + auxiliary
            (loss / len(parts)).backward()
        sync_expert_gradients(model)
        norms.append(global_grad_norm(model))
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), clip, norms[-1])
        chosen.step()
        chosen.zero_grad()
    return whole(model), torch.stack(norms).tolist(), loss.item()


def alone(*arguments, **named):
    torch.manual_seed(0)  # as the first process of a team
    return on_training(*arguments, **named)


# Capacity and auxiliary losses are those of each process's tokens, so one process takes the same parts in turn. Where
# nothing is dropped and no auxiliary loss counts, it may as well take the whole batch.
TRAINING = {
    "capacity": (True, {"top_value": 2, "capacity_factor": 1.0, "normalize_gate": True}),
    "busiest": (True, {"top_value": 1, "capacity_factor": -1.0}),
    "load-importance": (True, {"is_gshard_loss": False, "gate_noise": 1e-9, "mlp_fc2_bias": False}),
    "dropless": (True, {"top_value": 2, "path": "dropless", "cosine_router": True, "cosine_router_dim": 4}),
    "limited": (True, {"router": "limited", "groups": 2, "normalize_gate": True}),
    "whole batch": (False, {"top_value": 2, "path": "dropless", "aux_loss_weight": 0.0}),
    "whole batch, capacity": (False, {"top_value": 1, "capacity_factor": 0.0, "aux_loss_weight": 0.0}),
}
WORLDS = [(2, {}), (4, {}), (4, {"expert_parallel": 2}), (4, {"num_experts": 2}), (2, {"expert_parallel": 1})]


QUICK = [("capacity", 0), ("load-importance", 3), ("dropless", 2), ("whole batch", 1), ("busiest", 4)]


@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        pytest.param(name, *world, marks=[] if (name, i) in QUICK else pytest.mark.slow)
        for name in TRAINING
        for i, world in enumerate(WORLDS)
    ],
)
def test_training_equals_that_of_one_process(name, size, layout, team):
    in_parts, arguments = TRAINING[name]
    arguments = {**arguments, **layout}
    results = team(size).run(partial(on_training, 20, 1.0, "sgd", size, **arguments))
    arguments.pop("expert_parallel", None)
    expected, norms, _ = alone(20, 1.0, "sgd", size if in_parts else 1, **arguments)
    for state, found, _ in results:
        assert found == results[0][1]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-4, atol=0)
        assert state.keys() == expected.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [{}, {"expert_parallel": 2}])
def test_weights_of_all_processes_stay_equal(layout, team):
    """Bit by bit, after 50 clipped steps; the experts of copies too."""
    arguments = {"top_value": 2, "gate_noise": 1.0, "is_gshard_loss": False, **layout}
    results = team(4).run(partial(on_training, 50, 0.05, "adamw", 4, **arguments))
    first, norms, _ = results[0]
    assert min(norms) > 0.05
    for state, found, _ in results[1:]:
        assert found == norms and all(torch.equal(state[key], first[key]) for key in first)


def on_uneven(counts: list[int], training: bool, **arguments) -> None:
    world, rank = distributed.world_size(), distributed.rank()
    total = arguments.pop("total", 4)
    local = total // world if total >= world else -(world // total)
    layer = MoELayer(8, 16, local, 2, gate_noise=0.0, init_std=0.5, **arguments).train(training)
    reference = MoELayer(8, 16, total, 2, gate_noise=0.0, group=ExpertGroups(), **arguments).train(training)
    reference.load_state_dict({**layer.state_dict(), **whole(layer)})
    for attempt in range(2):  # the second round moves the many tokens to other processes
        x = torch.randn(counts[(rank + attempt) % world], 8, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_(training)
        y, loss = layer(x)
        expected, expected_loss = reference(x)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss, expected_loss)
        if not training:
            continue
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        grad = torch.autograd.grad((y * weight).sum() + loss, [x, *layer.parameters()])[0]
        torch.testing.assert_close(grad, torch.autograd.grad((expected * weight).sum() + expected_loss, x)[0])


UNEVEN = {
    "capacity": {},
    "busiest": {"capacity_factor": 0.0},
    "bounded": {"capacity_factor": -0.5, "use_bpr": False},
    "dropless": {"path": "dropless"},
    "shards": {"total": 2},
    "shards, dropless": {"total": 2, "path": "dropless"},
}


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize(("counts", "training"), [([7, 20, 1, 3], True), ([5, 0, 33, 0], True), ([0, 0, 0, 0], False)])
def test_processes_may_have_different_numbers_of_tokens(name, counts, training, team):
    team(4).run(partial(on_uneven, counts, training, **UNEVEN[name]))


def on_evaluation() -> None:
    torch.manual_seed(0)
    model = SwinTransformerMoE(**SMALL).eval()
    torch.manual_seed(0)
    reference = SwinTransformerMoE(**SMALL, expert_parallel=1).eval()
    images, _ = batch(0)
    for counts in ((3, 2), (1, 0), (0, 4)):
        with torch.inference_mode():
            own = images[: counts[distributed.rank()]]
            logits, loss = model(own)
            assert logits.shape == (len(own), 5)
            again, _ = reference(own)
            torch.testing.assert_close(logits, again)
    assert loss.shape == ()


def test_evaluation_takes_batches_of_any_size_and_none(team):
    team(2).run(on_evaluation)


def on_checkpointing(**arguments) -> None:
    arguments = {**SMALL, "moe_drop": 0.1, "drop_path_rate": 0.2, "top_value": 2, **arguments}
    arguments |= {"is_gshard_loss": False, "gate_noise": 1.0}
    model, saving = SwinTransformerMoE(**arguments), SwinTransformerMoE(**arguments, use_checkpoint=True)
    saving.load_state_dict(model.state_dict())
    images, labels = batch(distributed.rank())
    results = []
    for one in (model, saving):
        torch.manual_seed(distributed.rank())
        replica = DistributedDataParallel(one)
        logits, loss = replica(images)
        (F.cross_entropy(logits, labels) + loss).backward()
        sync_expert_gradients(one)
        results.append([p.grad for p in one.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("arguments", [{}, {"path": "dropless"}, {"capacity_factor": 0.0}])
def test_recomputation_repeats_exchanges_and_noise(arguments, team):
    team(2).run(partial(on_checkpointing, **arguments))


def on_start(**layout) -> dict:
    model = SwinTransformerMoE(**SMALL, **layout)
    return {key: value for key, value in whole(model).items() if "_moe_layer" in key}


def test_experts_start_the_same_on_any_number_of_processes(team):
    torch.manual_seed(0)
    expected = on_start()
    for size, layout in ((2, {}), (4, {}), (4, {"expert_parallel": 2}), (2, {"expert_parallel": 1})):
        for state in team(size).run(partial(on_start, **layout)):  # their own generators differ
            assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def on_groups() -> list:
    found = []
    for size in (0, 4, 2, 1):
        groups = expert_groups(size)
        members = [
            None if group is None else dist.get_process_group_ranks(group)
            for group in (groups.ep_group, groups.dp_group)
        ]
        found.append((*members, groups.size, groups.rank, groups.copies))
        assert expert_groups(size) is groups and as_groups(groups.ep_group or groups).size == groups.size
    assert copy.deepcopy(groups) is groups
    backend = expert_groups(2).ep_group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=SECONDS)  # that of the default group
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.EXPERT_PARALLEL=3 .* 4 process.*\[1, 2, 4\]"):
        expert_groups(3)
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.NUM_EXPERTS=6: .* 4 process"):
        SwinTransformerMoE(**{**SMALL, "num_experts": 6})
    with pytest.raises(ValueError, match=r"MODEL\.SWIN_MOE\.NUM_LOCAL_EXPERTS=-3: 4 process"):
        MoELayer(8, 16, -3, 1)
    return found


def test_groups(team):
    every = list(range(4))
    for rank, found in enumerate(team(4).run(on_groups)):
        pair, column = every[rank // 2 * 2 :][:2], [rank % 2, rank % 2 + 2]
        assert found == [
            (every, None, 4, rank, 1),
            (every, None, 4, rank, 1),
            (pair, column, 2, rank % 2, 2),
            (None, every, 1, 0, 4),
        ]


def on_counts() -> tuple:
    model = SwinTransformerMoE(**SMALL)
    with collect_statistics(model) as layers, torch.no_grad():
        model(batch(distributed.rank())[0])
    sums = [layer.statistics.summed() for layer in layers.values()]
    return parameter_counts(model), [part.tolist() for total in sums for part in total]


def test_counts_and_statistics_of_all_processes(team):
    (counts, sums), (others, other_sums) = team(2).run(on_counts)
    assert counts == others == parameter_counts(SwinTransformerMoE(**SMALL)) and sums == other_sums
    tokens = 2 * BATCH * 64
    assert sum(sums[0]) == sums[4] == tokens and sums[9] == tokens // 4


def on_own_group() -> None:
    group = dist.new_group([0, 1])
    layer = MoELayer(8, 16, 2, 1, group=group)
    assert layer.num_experts == 4 and layer.experts.first == 2 * distributed.rank()
    layer(torch.randn(3, 8))[0].sum().backward()
    sync_expert_gradients(layer)


def test_a_group_of_the_callers_own(team):
    team(2).run(on_own_group)


def on_failing(way: str) -> str:
    """Process 1 ends, or sleeps, between two exchanges of a training step."""
    dist.barrier()  # both are ready: on a busy machine they start seconds apart
    expert_groups(timeout=timedelta(seconds=6))
    model = SwinTransformerMoE(**SMALL)
    images, _ = batch(0)
    model(images)
    if distributed.rank() == 1:
        last = model.layers[1].blocks[0].mlp._moe_layer.experts

        def fail(*_):
            if way == "ends":
                os._exit(3)
            time.sleep(600)

        if way == "ends in the backward pass":
            way = "ends"
            last.register_full_backward_hook(fail)
        else:
            last.register_forward_hook(fail)
    try:
        logits, loss = model(images)
        (logits.sum() + loss).backward()
    except ConnectionError as err:
        return str(err)
    return "nothing happened"


@pytest.mark.parametrize("way", ["ends", "sleeps", pytest.param("ends in the backward pass", marks=pytest.mark.slow)])
def test_no_process_waits_for_a_dead_one(way, tmp_path):
    team = Team(2, tmp_path)
    try:
        team.send(on_failing, way)
        message = team.answer(0)
        assert "a process that shares experts with this one has ended, or has not answered in time" in message
        assert "\n" not in message
    finally:
        team.stop()
