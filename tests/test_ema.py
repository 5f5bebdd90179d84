"""The moving average of the weights: its numbers, skipped updates, resuming, evaluation, several processes."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import assert_same_state, make_config, small_run, weights, write_stopping_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import READS, Fixed, log_of, prepared, start
from test_moe_scripts import MODEL as MOE
from test_moe_scripts import run_of
from torch import nn

import ema
import engine
import supervised
from models import build_model
from models.expert_parallel import ExpertGroups, expert_modules
from supervised import SupervisedLoss

DECAY = ["TRAIN.EMA_DECAY", 0.75]


def averages(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model_ema"]


@pytest.mark.parametrize("chunk", [1, 7, 2**24])
def test_the_average_is_that_of_the_formula(monkeypatch, chunk):
    """In float64, over ten updates, of which some are skipped; weights of half precision too."""
    monkeypatch.setattr(ema, "CHUNK", chunk)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).bfloat16(), nn.BatchNorm1d(2))
    average = ema.MovingAverage(model, 0.9)
    expected = [p.detach().double() for p in model.parameters()]
    for step in range(10):
        skipped = step in (2, 3, 7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(torch.tensor([math.inf, -math.inf, math.nan][step % 3] if skipped else 1.0))
        if not skipped:
            expected = [0.9 * e + 0.1 * p.detach().double() for e, p in zip(expected, model.parameters(), strict=True)]
    for name, value in zip(dict(model.named_parameters()), expected, strict=True):
        assert average.averages[name].dtype == torch.float32
        torch.testing.assert_close(average.averages[name].double(), value, rtol=1e-5, atol=1e-6)
    assert average.state_dict().keys() == model.state_dict().keys()


def test_the_model_has_the_average_only_within_its_block():
    model = nn.Linear(2, 2)
    average = ema.MovingAverage(model, 0.5)
    own = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    average.averages["weight"].fill_(3.0)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert model.state_dict()["weight"].eq(3.0).all()
        assert all(parameter is own[name] for name, parameter in model.named_parameters())
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adam"])
def test_one_step_for_each_update_that_was_not_skipped(image_folder, tmp_path, monkeypatch, optimizer):
    """Seven batches in groups of two make four updates; the second has a batch that is not finite."""
    seen, update = [], ema.MovingAverage.update

    def noted(self, norm):
        seen.append([p.detach().clone() for p in self.model.parameters()])
        update(self, norm)

    monkeypatch.setattr(ema.MovingAverage, "update", noted)
    opts = [*DECAY, "TRAIN.EPOCHS", 1, "TRAIN.ACCUMULATION_STEPS", 2, "TRAIN.OPTIMIZER.NAME", optimizer]
    with start(image_folder, tmp_path, *opts, "TRAIN.BASE_LR", 0.05) as session:
        run, _ = prepared(session)
        expected = [p.detach().clone() for p in run.model.parameters()]
        engine.fit(run, Fixed(bad={3}))
    assert len(seen) == 4 and torch.equal(seen[0][0], seen[1][0]) and not torch.equal(seen[1][0], seen[2][0])
    for number in (0, 2, 3):
        expected = [0.75 * e + 0.25 * p for e, p in zip(expected, seen[number], strict=True)]
    saved = averages(Path(session.config.OUTPUT) / "ckpt_epoch_0.pth")
    for (name, _), value in zip(run.model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-7)


def test_averaging_reads_no_device_value(image_folder, tmp_path, monkeypatch):
    opts = [*DECAY, "TRAIN.OPTIMIZER.NAME", "fused_adam", "PRINT_FREQ", 3, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    reads, counts = [], []
    with start(image_folder, tmp_path, *opts) as session:
        run, _ = prepared(session)
        run.average = ema.MovingAverage(run.model, 0.75)
        update = run.average.update

        def counted(norm):
            before = len(reads)
            update(norm)
            counts.append(len(reads) - before)

        run.average.update = counted
        for name in READS:
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda *a, _f=original, _n=name, **k: (reads.append(_n), _f(*a, **k))[1]
            )
        engine.train_one_epoch(run, SupervisedLoss(None, 0.1))
    assert counts == [0] * 7 and reads


def test_each_epoch_validates_both_and_the_better_is_kept(image_folder, tmp_path):
    with start(image_folder, tmp_path, *DECAY, "SAVE_BEST", True, "TRAIN.BASE_LR", 0.05) as session:
        run, mixup = prepared(session)
        best = engine.fit(run, SupervisedLoss(mixup, 0.1))
    folder = Path(session.config.OUTPUT)
    events = EventAccumulator(str(folder)).Reload()
    own, averaged = ([e.value for e in events.Scalars(f"val/{name}")] for name in ("accuracy", "ema_accuracy"))
    assert len(own) == len(averaged) == 2 and {"val/ema_loss", "val/ema_accuracy_top5"} <= set(events.Tags()["scalars"])
    assert [e.value for e in events.Scalars("val/loss")] != [e.value for e in events.Scalars("val/ema_loss")]
    assert best == pytest.approx(max(own + averaged))
    log = log_of(session)
    assert log.count("the average of the weights, TRAIN.EMA_DECAY 0.75:") == 2
    kept = torch.load(folder / "ckpt_best.pth", weights_only=True)
    assert kept["max_accuracy"] == pytest.approx(best)
    saved = torch.load(folder / f"ckpt_epoch_{kept['epoch']}.pth", weights_only=True)
    source = saved["model" if own[kept["epoch"]] == pytest.approx(best) else "model_ema"]
    assert all(torch.equal(value, source[name]) for name, value in kept["model"].items())


def test_the_average_alone_can_be_the_best(image_folder, tmp_path, monkeypatch):
    results = iter([(10.0, 100.0, 1.0), (20.0, 100.0, 1.0)])
    with start(image_folder, tmp_path, *DECAY, "SAVE_BEST", True, "TRAIN.EPOCHS", 1) as session:
        run, mixup = prepared(session)
        monkeypatch.setattr(engine, "validate", lambda *arguments: next(results))
        assert engine.fit(run, SupervisedLoss(mixup, 0.1)) == 20.0
    folder = Path(session.config.OUTPUT)
    best, average = weights(folder / "ckpt_best.pth"), averages(folder / "ckpt_epoch_0.pth")
    assert all(torch.equal(best[name], value) for name, value in average.items())
    assert not torch.equal(best["head.weight"], weights(folder / "ckpt_epoch_0.pth")["head.weight"])


@pytest.mark.parametrize(
    "script, number, processes",
    [
        ("main", 9, 1),
        pytest.param("main", 15, 2, marks=pytest.mark.slow),
        pytest.param("main_moe", 15, 1, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_resumes_to_the_same_average(image_folder, tmp_path, run_script, script, number, processes):
    torchrun = processes if processes > 1 else 0
    opts = [
        *DECAY,
        "SAVE_STEPS",
        2,
        "DATA.BATCH_SIZE",
        4 // processes,
        "TRAIN.ACCUMULATION_STEPS",
        2,
        "TRAIN.EPOCHS",
        1,
    ]
    arguments = (run_of if script == "main_moe" else small_run)(image_folder, *opts)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script(f"{script}.py", *arguments, "--output", whole, torchrun=torchrun)
    loss = {"main": "supervised.SupervisedLoss", "main_moe": "main_moe.ExpertLoss"}[script]
    stopping = write_stopping_script(tmp_path, script, loss, "__call__")
    environment = {"SIGNAL": str(number), "STOP_AT": "4", "GROUP": ""}
    stopped = run_script(stopping, *arguments, "--output", parts, torchrun=torchrun, check=False, env=environment)
    assert stopped.returncode != 0 and not (parts / "small/default/ckpt_epoch_0.pth").exists()
    resumed = run_script(f"{script}.py", *arguments, "--output", parts, torchrun=torchrun)
    assert "auto resuming" in resumed.stdout
    one, two = (root / "small/default/ckpt_epoch_0.pth" for root in (whole, parts))
    assert_same_state(one, two)
    assert all(torch.equal(value, averages(two)[name]) for name, value in averages(one).items())
    assert not torch.equal(averages(one)["head.weight"], weights(one)["head.weight"])


def test_eval_takes_the_average_that_was_validated(image_folder, tmp_path):
    with start(image_folder, tmp_path, *DECAY, "TRAIN.EPOCHS", 1, "TRAIN.BASE_LR", 0.05) as session:
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
    losses = re.findall(r"Test: \[2/3\].*Loss [\d.]+ \(([\d.]+)\)", log_of(session))
    assert len(losses) == 2 and losses[0] != losses[1]
    saved = f"{session.config.OUTPUT}/ckpt_epoch_0.pth"

    def evaluate(*opts):
        with start(image_folder, tmp_path, "EVAL_MODE", True, *opts, "TAG", "evaluation") as session:
            supervised.evaluate(session, supervised.Task())
        return re.findall(r"Test: \[2/3\].*Loss [\d.]+ \(([\d.]+)\)", log_of(session))[-1]

    for key in ("MODEL.RESUME", "MODEL.PRETRAINED"):
        assert [evaluate(key, saved, "TEST.EMA", use) for use in (False, True)] == losses
    content = torch.load(saved, weights_only=True)
    del content["model_ema"]
    torch.save(content, tmp_path / "without.pth")
    with pytest.raises(ValueError, match=r"without.pth: holds no averaged weights"):
        evaluate("MODEL.RESUME", str(tmp_path / "without.pth"), "TEST.EMA", True)


def test_turning_it_on_or_off_midway_says_so(image_folder, tmp_path):
    for epochs, decay, text in (
        (1, 0.0, None),
        (2, 0.75, "holds no averaged weights: the average of TRAIN.EMA_DECAY begins at its weights"),
        (3, 0.0, "holds averaged weights, which end here: TRAIN.EMA_DECAY is 0"),
    ):
        with start(image_folder, tmp_path, "TRAIN.EMA_DECAY", decay, "TRAIN.EPOCHS", epochs) as session:
            run, mixup = prepared(session)
            if epochs > 1:
                engine.restore(run, engine.find_checkpoint(session))
            engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert text is None or text in log_of(session)
        assert (run.average is not None) == (decay > 0)


def test_experts_of_several_processes_are_refused_in_one_line():
    config = make_config(None, *MOE, *DECAY)
    model = build_model(config)
    engine.check_average(config, model)
    for _, module in expert_modules(model):
        module.expert_groups = ExpertGroups(size=2)
    with pytest.raises(ValueError, match=r"TRAIN.EMA_DECAY=0.75: experts that several processes share"):
        engine.check_average(config, model)
    engine.check_average(make_config(None, *MOE), model)
