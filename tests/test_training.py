"""Optimizers, schedules and the loop against thirty official iterations."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fill, golden, golden_images, make_config
from test_sizes import every_family, small
from torch import nn

import engine
import launch
from config import to_dict
from lr_scheduler import build_scheduler
from models import build_model
from optimizer import OPTIMIZERS, _fuses, build_optimizer, load_optimizer_state
from supervised import SupervisedLoss

LR = golden("lr")["lr"]
TRAIN = golden("train")
SCHEDULE_FILES = {
    "multistep": "configs/simmim/simmim_pretrain__swin_base__img192_window6__800ep.yaml",
    "finetune_cosine": "configs/simmim/simmim_finetune__swin_base__img224_window7__800ep.yaml",
}


@pytest.mark.parametrize("name", LR)
def test_learning_rates_are_the_official_ones(name):
    case = LR[name]
    config = make_config(SCHEDULE_FILES.get(name), *(case["opts"] or []))
    base = config.TRAIN.BASE_LR
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": base * scale, "lr_scale": scale} for scale in (1, 0.5)]
    optimizer = torch.optim.AdamW(groups, lr=base)
    scheduler = build_scheduler(config, optimizer, case["n_iter_per_epoch"])
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(case["initial_lr"], rel=1e-12)
    for t, *expected in case["points"]:
        scheduler.step_update(t)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(expected, rel=1e-9), t


class Batches(list):
    """Batches as a loader: with a sampler that an epoch can be set on."""

    @property
    def sampler(self):
        return self

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.start = start


def official_run(case: dict, tmp_path, **changes):
    config = make_config(
        case["config"],
        *case["opts"],
        *("DATA.BATCH_SIZE", case["batch"], "TRAIN.ACCUMULATION_STEPS", case["accumulation_steps"]),
        *("TRAIN.CLIP_GRAD", case["clip_grad"], "MODEL.NUM_CLASSES", 10, "PRINT_FREQ", 1, "OUTPUT", str(tmp_path)),
        *[part for pair in changes.items() for part in pair],
    )
    return launch.session(config)


def official_epoch(case: dict, epoch: int) -> Batches:
    first, batches = epoch * case["iterations_per_epoch"], Batches()
    for k in range(first, first + case["iterations_per_epoch"]):
        labels = torch.from_numpy(np.random.RandomState(51000 + k).randint(0, 10, size=case["batch"]))
        batches.append((golden_images(1000 + k, case["batch"], 32), labels))
    return batches


@pytest.mark.parametrize("name", TRAIN)
def test_thirty_iterations_are_the_official_ones(name, tmp_path, monkeypatch):
    """Through the engine: losses, gradient norms, learning rates and the final weights."""
    case = TRAIN[name]
    rows = []
    with official_run(case, tmp_path) as session:
        model = fill(build_model(session.config))
        make_optimizer = partial(build_optimizer, simmim="simmim" in name)
        run = engine.prepare(session, model, official_epoch(case, 0), make_optimizer=make_optimizer)

        class Recorder(engine.EpochMeters):
            def add(self, loss, norm, values):
                rows.append([loss.item(), norm])
                super().add(loss, norm, values)

            def read(self, step):
                rows[-1].append(run.optimizer.param_groups[0]["lr"])
                return super().read(step)

        monkeypatch.setattr(engine, "EpochMeters", Recorder)
        for epoch in range(session.config.TRAIN.EPOCHS):
            run.loader_train = official_epoch(case, epoch)
            run.progress.epoch, run.progress.samples = epoch, 0
            engine.train_one_epoch(run, SupervisedLoss(None, label_smoothing=0.1))
    assert len(rows) == len(case["steps"])
    for (loss, norm, lr), (k, *expected) in zip(rows, case["steps"], strict=True):
        assert loss == pytest.approx(expected[0], abs=1e-4), k
        assert (norm is None) == (len(expected) == 1)
        if norm is not None:
            assert norm.item() == pytest.approx(expected[1], rel=1e-3), k
            assert lr == pytest.approx(expected[2], rel=1e-6), k
    weights = torch.stack([p.detach().norm() for p in model.parameters()]).norm().item()
    assert weights == pytest.approx(case["final_weight_norm"], rel=1e-5)


def quadratic(name: str, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    config = make_config(None, "TRAIN.OPTIMIZER.NAME", name, "TRAIN.BASE_LR", 0.01)
    return model, build_optimizer(config, model)


def take_steps(model, optimizer, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(8, 4, generator=generator)).square().sum().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["adamw", "fused_adam", "sgd"])
def test_fused_steps_are_those_of_single_operations(name):
    (model, fused), (twin, plain) = quadratic(name), quadratic(name)
    assert all(group["fused"] for group in fused.param_groups)
    plain.param_groups[:] = [{**group, "fused": False, "foreach": False} for group in plain.param_groups]
    for a, b in zip(take_steps(model, fused), take_steps(twin, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_resumes(name):
    model, optimizer = quadratic(name)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]
    images = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    before = model(images).square().sum().item()
    take_steps(model, optimizer, 20)
    assert model(images).square().sum().item() < before

    twin, other = quadratic(name)
    twin.load_state_dict(model.state_dict())
    load_optimizer_state(other, copy.deepcopy(optimizer.state_dict()))
    for a, b in zip(take_steps(model, optimizer), take_steps(twin, other), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_without_momentum_is_filled():
    """One that was saved before any step, or where a parameter had no gradient; the next step may be skipped."""
    model, optimizer = quadratic("sgd")
    saved = optimizer.state_dict()
    for state in ({}, {0: {"momentum_buffer": None}}):
        load_optimizer_state(optimizer, {**saved, "state": state})
        assert not any(optimizer.state[parameter]["momentum_buffer"].any() for parameter in model.parameters())


def test_slices_on_the_cpu_of_a_gpu_s_model_have_no_fused_step():
    """They would not wait for the GPU to say whether all gradients are finite."""
    parameter = nn.Parameter(torch.zeros(2))
    assert _fuses(parameter)
    for kind in ("cpu", "cuda"):
        parameter.device_mesh = SimpleNamespace(device_type=kind)
        assert bool(_fuses(parameter)) == (kind == "cpu")


@every_family
def test_gradients_lie_as_their_parameters_do(family):
    """Fused steps on CPUs take that for granted."""
    model = small(family)
    out = model(golden_images(0, 2, 32))
    sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(p.grad.stride() == p.stride() for p in model.parameters())


def test_loaded_state_does_not_choose_the_implementation():
    (_, ours), (_, other) = quadratic("adamw"), quadratic("adamw")
    saved = other.state_dict()
    for group in saved["param_groups"]:
        group["fused"] = False
    load_optimizer_state(ours, saved)
    assert all(group["fused"] for group in ours.param_groups)


@pytest.mark.parametrize("key, value", [("TRAIN.OPTIMIZER.NAME", "adam"), ("TRAIN.LR_SCHEDULER.NAME", "cosin")])
def test_unknown_names_list_the_known_ones(key, value):
    config = make_config(None, key, value)
    with pytest.raises(ValueError, match=f"{key}='{value}'; choose from"):
        build_scheduler(config, build_optimizer(config, nn.Linear(2, 2)), 10)


def test_config_survives_as_plain_data():
    plain = to_dict(make_config())
    assert type(plain) is dict and type(plain["MODEL"]) is dict and plain["TRAIN"]["OPTIMIZER"]["BETAS"] == [0.9, 0.999]
