"""--compile: the same losses as without it, no new names, no compiling for the last batch, and errors in one line."""

import re

import pytest
import torch
from conftest import EMPTY_CONFIG, small_run, weights
from test_engine import log_of, prepared, start
from test_moe_scripts import MODEL as MOE
from torch import nn

import compilation
import engine
import evaluation
import launch
import supervised
from config import get_config
from main_moe import ExpertLoss
from models import build_model
from models.moe import MoELayer
from supervised import SupervisedLoss

EXACT = ["MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]


def compiled(backend="eager"):
    return ["COMPILE", "default", "COMPILE_BACKEND", backend]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    """How many were compiled, the one that tries the compiler apart."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] - 1


def losses_of(folder, tmp_path, *opts, loss=SupervisedLoss):
    """Those of fourteen training steps, and the lines and scores of the two evaluations."""
    losses = []
    with start(folder, tmp_path, *EXACT, *opts) as session:
        run, mixup = prepared(session)
        compute = loss(mixup, 0.1)

        def noted(model, batch):
            value, others = compute(model, batch)
            losses.append(value.item())
            return value, others

        engine.fit(run, noted)
    saved = weights(f"{session.config.OUTPUT}/ckpt_epoch_1.pth")
    assert saved.keys() == build_model(session.config).state_dict().keys()
    return losses, re.findall(r" \* Acc@1 .*", log_of(session))[-2:]


@pytest.mark.parametrize(
    "opts, loss",
    [
        (["TRAIN.ACCUMULATION_STEPS", 2, *compiled()], SupervisedLoss),
        (["TRAIN.USE_CHECKPOINT", True, *compiled("aot_eager")], SupervisedLoss),
        ([*MOE, *compiled()], ExpertLoss),
    ],
)
def test_training_has_the_losses_of_eager_training(image_folder, tmp_path, opts, loss):
    """Two graphs: of training, and of evaluation, whose last batch is smaller; and no breaks in them."""
    losses, scores = losses_of(image_folder, tmp_path / "compiled", *opts, loss=loss)
    assert graphs() == 2 and not torch._dynamo.utils.counters["graph_break"]
    eager, eager_scores = losses_of(image_folder, tmp_path / "eager", *opts, "COMPILE", "", loss=loss)
    assert graphs() == 2
    assert len(losses) == 14 and losses == pytest.approx(eager, abs=1e-4)
    assert scores == eager_scores


def differences(**settings) -> tuple[float, float]:
    """The largest ones, in an expert layer's results in training, of a seed: inductor against eager mode."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer, x, results = MoELayer(8, 16, 4, 2, capacity_factor=1.0, **settings).train(), torch.randn(64, 8), []
    for forward in (layer, torch.compile(layer)):
        torch.manual_seed(3)
        with torch.no_grad():
            results.append(forward(x))
    return tuple((one - two).abs().max().item() for one, two in zip(*results, strict=True))


@pytest.mark.slow
def test_inductor_differs_from_eager_mode_by_the_routers_noise_alone():
    """It draws numbers of its own, unless it is asked for those of eager mode."""
    assert differences()[0] > 1e-3
    assert max(differences(gate_noise=0.0)) < 1e-6
    with torch._inductor.config.patch(fallback_random=True):
        assert max(differences()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("opts, loss", [([], SupervisedLoss), (MOE, ExpertLoss)])
def test_inductor_has_the_losses_of_eager_training(image_folder, tmp_path, opts, loss):
    """With the same noise of routers."""
    with torch._inductor.config.patch(fallback_random=True):
        losses, _ = losses_of(image_folder, tmp_path / "compiled", *opts, *compiled("inductor"), loss=loss)
    eager, _ = losses_of(image_folder, tmp_path / "eager", *opts, loss=loss)
    assert len(losses) == 14 and losses == pytest.approx(eager, abs=1e-4)


def test_only_whole_batches_run_compiled():
    calls = []

    def backend(graph, inputs):
        return lambda *arguments: (calls.append(len(arguments[-1])), graph.forward(*arguments))[1]

    model = nn.ReLU()
    model.compile(backend=backend)
    for count, batch_size in ((4, 4), (3, 4), (4, 4), (2, ""), (4, 4)):
        with compilation.as_compiled(count, batch_size):
            model(torch.ones(count, 2))
    assert calls == [4, 4, 2, 4]  # without a batch size nothing is asked


def test_evaluation_has_the_accuracy_of_eager_evaluation(image_folder, tmp_path):
    with start(image_folder, tmp_path, "TRAIN.EPOCHS", 1) as session:
        run, mixup = prepared(session)
        engine.fit(run, SupervisedLoss(mixup, 0.1))
    opts = ["EVAL_MODE", True, "MODEL.RESUME", f"{session.config.OUTPUT}/ckpt_epoch_0.pth", *compiled()]
    with start(image_folder, tmp_path, *opts) as session:
        supervised.evaluate(session, supervised.Task())
    assert graphs() == 1 and "torch.compile: eager, default" in log_of(session)
    scores = re.findall(r" \* Acc@1 .*", log_of(session))
    assert len(scores) == 2 and scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("opts", [[], ["TRAIN.USE_CHECKPOINT", True], ["TRAIN.ACCUMULATION_STEPS", 2]])
def test_two_processes_have_the_losses_of_eager_training(image_folder, run_script, opts):
    arguments = small_run(image_folder, *EXACT, "PRINT_FREQ", 1, "DATA.BATCH_SIZE", 2, "TRAIN.EPOCHS", 1, *opts)
    arguments += ["COMPILE_BACKEND", "aot_eager"]
    losses = [
        re.findall(r"loss ([\d.]+) \(", run_script("main.py", *flags, *arguments, "--tag", tag, torchrun=2).stdout)
        for flags, tag in (([], "eager"), (["--compile"], "compiled"))
    ]
    assert len(losses[0]) == 7 and losses[0] == losses[1]


def test_throughput_is_of_the_compiled_model(tmp_path):
    with start(tmp_path, tmp_path, "THROUGHPUT_MODE", True, "COMPILE", "max-autotune", *compiled()[2:]) as session:
        supervised.time_model(session)
    assert graphs() == 1
    assert "torch.compile: eager, max-autotune, without CUDA graphs, which need CUDA" in log_of(session)


class Scaled(nn.Linear):
    """A layer whose bias is computed from its weight."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.weight.square().sum(1))


def test_weights_are_frozen_where_none_will_change():
    """Of the one model, and not those of others that are compiled before, after and in the meantime."""
    cpu, x = torch.device("cpu"), torch.randn(5, 4)
    models = [Scaled(4, width) for width in (3, 4, 5, 6)]  # models of one shape share what is compiled
    for model, training in zip(models, (True, False, True), strict=False):
        how = compilation.compile_in_place(model, cpu, "max-autotune-no-cudagraphs", training=training)
        assert ("weights frozen" in how) != training
    with torch.no_grad():
        for model, call in zip(models, [*models[:3], torch.compile(models[3])], strict=True):
            torch.testing.assert_close(call(x), model.forward(x))
            model.weight.zero_()
            assert bool(call(x).any()) == (model is models[1])  # the old bias
        alike = Scaled(4, 4)
        alike.compile()
        torch.testing.assert_close(alike(x), alike.forward(x))


def test_the_flag_sets_the_key():
    parser = launch.build_parser("")
    for flags, mode in (([], ""), (["--compile"], "default"), (["--compile", "max-autotune"], "max-autotune")):
        args = parser.parse_args(["--cfg", str(EMPTY_CONFIG), *flags])
        assert get_config(args)["COMPILE"] == mode
    with pytest.raises(SystemExit):
        parser.parse_args(["--cfg", str(EMPTY_CONFIG), "--compile", "fastest"])


def test_a_compiler_that_fails_is_named_at_once():
    def backend(graph, inputs):
        raise RuntimeError("no compiler at all")

    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=r"--compile: torch.compile does not work here: .*no compiler at all; install"):
        compilation.compile_in_place(nn.ReLU(), cpu, "default", backend)
    with pytest.raises(ValueError, match=r"COMPILE='reduce-overhead' uses CUDA graphs, which are for --eval"):
        compilation.compile_in_place(nn.ReLU(), cpu, "reduce-overhead", "eager", training=True)


@pytest.mark.slow
def test_a_missing_compiler_is_one_line(image_folder, tmp_path, run_script):
    env = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    failed = run_script("main.py", "--compile", *small_run(image_folder), check=False, env=env, fresh=True)
    lines = [line for line in failed.stderr.splitlines() if line.startswith("main.py: error: ")]
    assert failed.returncode == 1 and len(lines) == 1 and "/nowhere/g++" in lines[0], failed.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_evaluation_on_the_accelerator(image_folder, tmp_path, mode):
    with start(image_folder, tmp_path) as session:
        run, _ = prepared(session)
        expected = evaluation.validate(session, run.model, run.loader_val)
    with start(image_folder, tmp_path, "COMPILE", mode) as session:
        engine.compile_model(session, run.model)
        for _ in range(3):  # warm-up, recording, replay
            found = evaluation.validate(session, run.model, run.loader_val)
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-2)
        evaluation.throughput(session, run.model, runs=3)
