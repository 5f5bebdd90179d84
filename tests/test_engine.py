"""The loop: log lines, TensorBoard, device reads, non-finite steps, evaluation, timing."""

import copy
import math
import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, make_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import engine
import evaluation
import launch
from data import build_loader
from models import build_model
from supervised import SupervisedLoss

NUMBER = r"-?[\d.]+(?:e-?\d+)?"
TRAIN_LINE = re.compile(
    rf"Train: \[\d+/\d+\]\[\d+/\d+\]\teta [\d:]+ lr {NUMBER}\t wd {NUMBER}\ttime {NUMBER} \({NUMBER}\)\t"
    rf"loss {NUMBER} \({NUMBER}\)\tgrad_norm {NUMBER} \({NUMBER}\)\tloss_scale {NUMBER} \({NUMBER}\)\t.*mem \d+MB"
)
TEST_LINE = re.compile(
    rf"Test: \[\d+/\d+\]\tTime {NUMBER} \({NUMBER}\)\tLoss {NUMBER} \({NUMBER}\)\t"
    rf"Acc@1 {NUMBER} \({NUMBER}\)\tAcc@5 {NUMBER} \({NUMBER}\)\tMem \d+MB"
)


class Fixed:
    """A compute_loss whose gradients are made non-finite at chosen steps."""

    def __init__(self, bad: set[int] = frozenset()):
        self.bad, self.step = bad, -1

    def __call__(self, model, batch):
        self.step += 1
        images, targets = batch
        loss = F.cross_entropy(model(images), targets)
        return (loss * math.inf if self.step in self.bad else loss), {}


def start(folder, tmp_path, *opts):
    config = make_config(None, *SMALL, "OUTPUT", str(tmp_path / "out"), "DATA.DATA_PATH", str(folder), *opts)
    return launch.session(config)


def prepared(session):
    dataset, _, loader_train, loader_val, mixup = build_loader(session.config)
    torch.manual_seed(0)
    return engine.prepare(session, build_model(session.config), loader_train, loader_val, dataset.classes), mixup


def log_of(session) -> str:
    from pathlib import Path

    return (Path(session.config.OUTPUT) / "log_rank0.txt").read_text()


def test_log_lines_are_those_that_people_parse(image_folder, tmp_path):
    with start(image_folder, tmp_path) as session:
        run, mixup = prepared(session)
        engine.describe(session, run.model)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
    log = log_of(session)
    printed = [int(step) for step in re.findall(r"Train: \[0/2\]\[(\d+)/7\]", log)]
    assert printed == [0, 2, 4, 6]
    for line in log.splitlines():
        assert "Train: [" not in line or TRAIN_LINE.search(line), line
        assert "Test: [" not in line or TEST_LINE.search(line), line
    for text in (
        "Creating model:swin/small",
        "number of params: ",
        "number of GFLOPs: ",
        "Start training",
        "EPOCH 0 training takes 0:",
        "Accuracy of the network on the 11 test images: ",
        "ckpt_epoch_1.pth saved !!!",
        "Training time 0:",
        "Full config saved to",
    ):
        assert text in log, text
    assert re.search(r" \* Acc@1 [\d.]+ Acc@5 100.000", log)
    assert re.search(r"Max accuracy: [\d.]+%", log)


@pytest.mark.parametrize("mixed", [False, True])
def test_tensorboard_scalars(image_folder, tmp_path, mixed):
    opts = [] if mixed else ["AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    with start(image_folder, tmp_path, *opts) as session:
        run, mixup = prepared(session)
        best = engine.fit(run, SupervisedLoss(mixup, 0.1))
    events = EventAccumulator(session.config.OUTPUT)
    events.Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"loss", "learning_rate", "grad_norm", "images_per_second", "memory_mb"}
    assert {f"train/{name}" for name in expected} | {"val/loss", "val/accuracy"} <= tags
    assert ("train/accuracy" in tags) == (not mixed)  # soft targets have no accuracy
    assert max(event.value for event in events.Scalars("val/accuracy")) == pytest.approx(best)
    assert [event.step for event in events.Scalars("val/loss")] == [7, 14]  # by updates


def test_no_progress_bar_in_files(image_folder, run_script):
    from conftest import small_run

    result = run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 1))
    assert "\r" not in result.stdout + result.stderr and " left" not in result.stderr


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__")


@pytest.mark.parametrize("mixed", [False, True])
def test_no_device_value_is_read_between_prints(image_folder, tmp_path, monkeypatch, mixed):
    """With an optimizer that skips on the device, as on accelerators, where each read would make the host wait."""
    opts = ["TRAIN.OPTIMIZER.NAME", "fused_adam", "PRINT_FREQ", 3]
    opts += [] if mixed else ["AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    reads, counts = [], []
    with start(image_folder, tmp_path, *opts) as session:
        run, mixup = prepared(session)
        batches = type("Batches", (list,), {"sampler": run.loader_train.sampler})(run.loader_train)
        run.loader_train = batches  # decoded beforehand: decoding reads values of its own
        loss = SupervisedLoss(mixup, 0.1)

        def counted(model, batch):
            counts.append(len(reads))
            return loss(model, batch)

        for name in READS:
            original = getattr(torch.Tensor, name)
            monkeypatch.setattr(
                torch.Tensor, name, lambda *a, _f=original, _n=name, **k: (reads.append(_n), _f(*a, **k))[1]
            )
        engine.train_one_epoch(run, counted)
    during = [after - before for before, after in pairwise(counts)]
    assert [count > 0 for count in during] == [True, False, False, True, False, False]  # steps 0 and 3 print


def weights(run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adam", "sgd", "fused_lamb"])
def test_a_non_finite_step_is_skipped_counted_and_reported(image_folder, tmp_path, optimizer):
    with start(image_folder, tmp_path, "TRAIN.OPTIMIZER.NAME", optimizer, "PRINT_FREQ", 1) as session:
        run, _ = prepared(session)
        rates, seen = [], []
        original = run.scheduler.step_update
        run.scheduler.step_update = lambda t: (seen.append(weights(run)), rates.append(t), original(t))
        state = []
        loss = Fixed(bad={2, 3})
        engine.train_one_epoch(
            run, lambda m, b: (state.append(copy.deepcopy(run.optimizer.state_dict()["state"])), loss(m, b))[1]
        )
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[3], strict=True))  # neither weights
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    for before, after in zip(state[2].values(), state[4].values(), strict=True):  # nor moments or counts
        assert all(
            torch.equal(before[k], after[k]) if torch.is_tensor(before[k]) else before[k] == after[k] for k in before
        )
    assert run.progress.skipped == 2 and run.progress.updates == 5
    assert rates == [0, 1, 2, 2, 2, 3, 4]  # the schedule waits
    log = log_of(session)
    assert "epoch 0 step 2: gradient norm" in log and "update skipped (2 in a row, 2 in all)" in log
    assert "nan" not in re.findall(r"Train: .*\[6/7\].*", log)[0]  # averages are not poisoned


def test_too_many_non_finite_steps_stop_with_the_place(image_folder, tmp_path):
    with (
        pytest.raises(FloatingPointError, match=r"3 updates in a row .* epoch 0 step 4 .*lower TRAIN.BASE_LR"),
        start(image_folder, tmp_path, "TRAIN.MAX_NONFINITE_STEPS", 3) as session,
    ):
        run, _ = prepared(session)
        engine.fit(run, Fixed(bad={2, 3, 4, 5}))


@pytest.mark.parametrize("bad_steps, stops", [({1, 2, 4, 5}, False), ({1, 2, 3}, True)])
def test_only_steps_in_a_row_stop_training(image_folder, tmp_path, bad_steps, stops):
    with start(image_folder, tmp_path, "TRAIN.MAX_NONFINITE_STEPS", 3) as session:
        run, _ = prepared(session)
        if stops:
            with pytest.raises(FloatingPointError):
                engine.train_one_epoch(run, Fixed(bad_steps))
        else:
            engine.train_one_epoch(run, Fixed(bad_steps))


def test_accumulation_equals_a_larger_batch_and_takes_the_rest(image_folder, tmp_path):
    """28 images: 7 batches of 4 in groups of 2 make 4 updates, the last of one batch."""
    common = ["MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0, "TRAIN.OPTIMIZER.NAME", "sgd"]
    results = []
    for opts in (["TRAIN.ACCUMULATION_STEPS", 2], ["DATA.BATCH_SIZE", 8]):
        with start(image_folder, tmp_path, *common, *opts, "TRAIN.BASE_LR", 0.5) as session:
            run, _ = prepared(session)
            seen = []
            original = run.scheduler.step_update
            run.scheduler.step_update = lambda t, seen=seen, run=run, step=original: (
                seen.append(weights(run)),
                step(t),
            )
            engine.train_one_epoch(run, SupervisedLoss(None, 0.1))
            results.append(seen)
    accumulated, large = results
    assert len(accumulated) == 4 and len(large) == 3
    for a, b in zip(accumulated[2], large[2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert not torch.equal(accumulated[3][0], accumulated[2][0])


def test_cutmix_alone_gives_soft_targets_a_soft_loss(image_folder, tmp_path):
    with start(image_folder, tmp_path, "AUG.MIXUP", 0, "AUG.CUTMIX", 1.0) as session:
        run, mixup = prepared(session)
        loss, values = SupervisedLoss(mixup, 0.1)(run.model, next(iter(run.loader_train)))
    assert loss.isfinite() and values == {}


def test_losses_are_timms():
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    soft = torch.rand(6, 5).softmax(1)

    def model(images):
        return logits

    hard = SupervisedLoss(None, 0.1)(model, [None, labels])[0]
    torch.testing.assert_close(hard, LabelSmoothingCrossEntropy(0.1)(logits, labels))
    mixed = SupervisedLoss(lambda images, targets: (images, soft), 0.1)(model, [None, labels])[0]
    torch.testing.assert_close(mixed, SoftTargetCrossEntropy()(logits, soft))


def test_validation_is_a_plain_mean_over_images(image_folder, tmp_path):
    with start(image_folder, tmp_path) as session:
        run, _ = prepared(session)
        acc1, acc5, loss = evaluation.validate(session, run.model, run.loader_val)
        dataset = run.loader_val.dataset
        images = torch.stack([dataset[i][0] for i in range(len(dataset))])
        targets = torch.tensor([dataset[i][1] for i in range(len(dataset))])
        with torch.no_grad():
            logits = run.model.eval()(images)
    assert acc1 == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert acc5 == 100.0  # of three classes
    assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


def test_throughput_needs_no_data(run_script):
    from conftest import EMPTY_CONFIG

    opts = ["--opts", *map(str, SMALL)]
    result = run_script("main.py", "--cfg", EMPTY_CONFIG, "--throughput", "--amp-dtype", "bf16", *opts)
    assert "throughput averaged with 30 times" in result.stdout
    assert re.search(r"batch_size 4 throughput [\d.]+", result.stdout)
    assert re.search(r"latency of a batch in ms: p50 [\d.]+ p90 [\d.]+ p99 [\d.]+", result.stdout)
    assert "peak memory" in result.stdout and "bfloat16" in result.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_trains_on_a_cpu(image_folder, tmp_path, dtype):
    with start(image_folder, tmp_path, "AMP_DTYPE", dtype) as session:
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert (run.scaler.get_scale() > 1) == (dtype == "fp16")
        assert run.progress.updates > 7 and all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.gpu
def test_training_on_the_accelerator(image_folder, tmp_path):
    with start(image_folder, tmp_path) as session:
        assert session.device.type != "cpu" and session.amp_dtype != torch.float32
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
        evaluation.throughput(session, run.model, runs=3)
        assert run.optimizer.param_groups[0]["fused"]
        assert all(p.isfinite().all() and p.device.type == session.device.type for p in run.model.parameters())


def test_progress_bar_shows_on_a_terminal_only(monkeypatch):
    import io
    import sys

    from logger import ProgressBar

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, enabled, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        bar = ProgressBar("epoch 3", 10, enabled)
        for step in range(10):
            bar.update(step + 1)
        bar.close()
        assert ("epoch 3 [==============================] 10/10 0:00:00 left" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown


@pytest.mark.parametrize(
    "opts, dtype",
    [
        ([], torch.float32),
        (["AMP_DTYPE", "bf16"], torch.bfloat16),
        (["AMP_DTYPE", "fp16"], torch.float16),
        (["AMP_DTYPE", "bf16", "AMP_ENABLE", False], torch.float32),
    ],
)
def test_precision_on_a_cpu(opts, dtype):
    assert launch.pick_amp_dtype(make_config(None, *opts), torch.device("cpu")) == dtype


def test_precision_is_bf16_where_the_accelerator_has_it(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert launch.pick_amp_dtype(make_config(), torch.device("cuda")) == dtype


def test_attention_backend_by_device_and_precision():
    from models.attention import resolve_backend

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend("auto", cpu, torch.float32, True) == "sdpa"
    assert resolve_backend("auto", cpu, torch.bfloat16, True) == "reference"
    assert resolve_backend("auto", cpu, torch.bfloat16, False) == "sdpa"
    assert resolve_backend("auto", cuda, torch.bfloat16, True, grid=65535) == "sdpa"
    assert resolve_backend("auto", cuda, torch.bfloat16, True, grid=65536) == "reference"
    assert resolve_backend("reference", cuda, torch.bfloat16, True) == "reference"


def test_flags_without_an_effect_say_so_once(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.window_process.window_process.DEVICES", ())
    with start(image_folder, tmp_path, "FUSED_LAYERNORM", True, "FUSED_WINDOW_PROCESS", True) as session:
        run, mixup = prepared(session)
        engine.describe(session, run.model)
        engine.train_one_epoch(run, SupervisedLoss(mixup, 0.1))
    log = log_of(session)
    assert log.count("--fused_layernorm: PyTorch's layer norm is already fused") == 1
    assert log.count("--fused_window_process: the extension is not built") == 1
    assert log.count("attention backend window_process: window_process in training") == 1


def test_deterministic_training_runs(image_folder, tmp_path):
    try:
        with start(image_folder, tmp_path, "DETERMINISTIC", True, "TRAIN.EPOCHS", 1) as session:
            assert torch.are_deterministic_algorithms_enabled()
            run, mixup = prepared(session)
            engine.fit(run, SupervisedLoss(mixup, 0.1))
    finally:
        torch.use_deterministic_algorithms(False)


class StopsAt(Fixed):
    """As `Fixed`; asks ``run`` to stop at a step, as a signal would."""

    def __init__(self, run, step: int, bad: set[int]):
        super().__init__(bad)
        self.run, self.at = run, step

    def __call__(self, model, batch):
        if self.step + 1 == self.at:
            self.run.stop_signal = 15
        return super().__call__(model, batch)


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_resume_is_exact_around_skipped_steps(image_folder, tmp_path, stop_at):
    """The schedule takes skipped updates out of its count at the same steps, stopped in between or not."""
    common = ["PRINT_FREQ", 5, "AUG.MIXUP", 0, "AUG.CUTMIX", 0, "TRAIN.BASE_LR", 0.5]
    bad = {1, 3}
    with start(image_folder, tmp_path / "whole", *common) as session:
        whole, _ = prepared(session)
        engine.fit(whole, Fixed(bad))
    with start(image_folder, tmp_path / "parts", *common) as session:
        run, _ = prepared(session)
        with pytest.raises(launch.Stopped):
            engine.fit(run, StopsAt(run, stop_at, bad))
        run, _ = prepared(session)
        engine.restore(run, engine.find_checkpoint(session))
        rest = Fixed({step - stop_at - 1 for step in bad})
        engine.fit(run, rest)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(run), strict=True))
    assert whole.progress == run.progress and run.progress.skipped == 2


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_resume_with_another_batch_size_rescales_the_schedule(image_folder, tmp_path, name):
    common = ["TRAIN.LR_SCHEDULER.NAME", name, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    with start(image_folder, tmp_path, *common, "DATA.BATCH_SIZE", 8, "TRAIN.EPOCHS", 1) as session:
        run, _ = prepared(session)
        engine.fit(run, Fixed())
    with start(image_folder, tmp_path, *common, "DATA.BATCH_SIZE", 2, "TRAIN.EPOCHS", 4) as session:
        run, _ = prepared(session)
        engine.restore(run, engine.find_checkpoint(session))
        assert run.progress.epoch == 1 and run.progress.updates == 15  # 3 became 15 an epoch
        rates, loss = [], Fixed()
        engine.fit(run, lambda m, b: (rates.append(run.optimizer.param_groups[0]["lr"]), loss(m, b))[1])
    base = session.config.TRAIN.BASE_LR
    assert len(rates) == 45 and min(rates) >= 0 and base / 2 < rates[0] <= base and rates[-1] < base / 10


def test_start_epoch_counts_in_a_fresh_run(image_folder, tmp_path):
    with start(image_folder, tmp_path, "TRAIN.START_EPOCH", 1) as session:
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
    assert "Train: [1/2]" in log_of(session) and "Train: [0/2]" not in log_of(session)


def test_an_elastic_restart_goes_on_where_training_was(image_folder, tmp_path, monkeypatch):
    with start(image_folder, tmp_path) as session:
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
    first = session.config.OUTPUT + "/ckpt_epoch_0.pth"
    with start(image_folder, tmp_path, "MODEL.RESUME", first) as session:
        assert engine.find_checkpoint(session) == first
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert engine.find_checkpoint(session).endswith("ckpt_epoch_1.pth")
    with start(image_folder, tmp_path / "fresh", "MODEL.RESUME", first) as session:
        assert engine.find_checkpoint(session) == first  # nothing newer yet


def test_training_ends_at_its_time_limit_and_goes_on_later(image_folder, tmp_path, monkeypatch):
    """The clock is ours: it strikes at the third update."""
    from launch import TimeIsUp

    with start(image_folder, tmp_path, "TRAIN.TIME_LIMIT", 60.0, "SAVE_BEST", True) as session:
        run, mixup = prepared(session)
        with monkeypatch.context() as patch:
            patch.setattr(engine.Run, "should_stop", lambda self: self.progress.updates >= 3)
            with pytest.raises(TimeIsUp, match=r"the time limit of 60.0 minute") as stop:
                engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert stop.value.exit_code == 0
        path = engine.find_checkpoint(session)
        assert path.endswith("ckpt_epoch_0_step_3.pth")
        run, mixup = prepared(session)
        engine.restore(run, path)
        assert run.progress.updates == 3
        engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert run.progress.epoch == session.config.TRAIN.EPOCHS


def test_the_best_weights_of_an_earlier_run_are_kept(image_folder, tmp_path):
    from pathlib import Path

    with start(image_folder, tmp_path, "SAVE_BEST", True, "TRAIN.EPOCHS", 1) as session:
        run, mixup = prepared(session)
        path = Path(session.config.OUTPUT) / "ckpt_best.pth"
        torch.save({"model": run.model.state_dict(), "max_accuracy": 100.5}, path)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert torch.load(path, weights_only=True)["max_accuracy"] == 100.5
        torch.save({"model": run.model.state_dict(), "max_accuracy": -0.5}, path)
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
        assert torch.load(path, weights_only=True)["max_accuracy"] >= 0


def test_validation_without_any_usable_image_is_an_error(image_folder, tmp_path):
    for path in (image_folder / "val").rglob("*.png"):
        path.write_bytes(b"nothing")
    with start(image_folder, tmp_path, "DATA.ON_ERROR", "skip") as session:
        run, _ = prepared(session)
        with pytest.raises(ValueError, match="none of the validation images can be used"):
            evaluation.validate(session, run.model, run.loader_val)
