"""FSDP2 over two real processes, by gloo: DDP's and one process's results, checkpoints that are theirs, other keys.

Functions named ``on_...`` run in every process of a `Team`.
"""

import logging
import math
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import make_config, small_run, weights, write_images
from team import Team
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import distributed
import engine
import evaluation
import launch
import sharding
import storage
import utils
import utils_moe
from ema import MovingAverage
from models import build_model
from models.expert_parallel import expert_parameters

STEPS, BATCH = 12, 8  # images of all processes together


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    started = Team(2, tmp_path_factory.mktemp("team"))
    yield started
    started.stop()


def section(kind: str, *opts) -> list:
    """Two small stages of ``kind`` on 16x16 images."""
    name = f"MODEL.{kind.upper()}."
    small = {"PATCH_SIZE": 2, "EMBED_DIM": 8, "DEPTHS": [2, 2], "NUM_HEADS": [2, 4], "WINDOW_SIZE": 4}
    return ["MODEL.TYPE", kind, *(part for key, value in small.items() for part in (name + key, value)), *opts]


MOE = section(
    "swin_moe",
    *("MODEL.SWIN_MOE.MOE_BLOCKS", [[1], [0, 1]], "MODEL.SWIN_MOE.NUM_EXPERTS", 4, "MODEL.SWIN_MOE.TOP_VALUE", 2),
    *("MODEL.SWIN_MOE.COSINE_ROUTER", True, "MODEL.SWIN_MOE.COSINE_ROUTER_DIM", 4),
    *("MODEL.SWIN_MOE.GATE_NOISE", 1.0e-9),  # generators of processes differ, so a fair comparison has none
)
MODELS = {
    "swin": section("swin", "MODEL.SWIN.APE", True),  # its position embedding has one row: none for process 1
    "swinv2": section("swinv2", "TRAIN.OPTIMIZER.NAME", "fused_adam"),
    "swin_mlp": section("swin_mlp", "TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.USE_CHECKPOINT", True),
    "fp16": section("swin", "AMP_DTYPE", "fp16"),
    "experts": MOE,
    "experts, recomputed": [*MOE, "TRAIN.USE_CHECKPOINT", True, "TRAIN.OPTIMIZER.NAME", "fused_adam"],
    "copies of experts": [*MOE, "MODEL.SWIN_MOE.EXPERT_PARALLEL", 1],
}


class Batches(list):
    """A loader of batches that are there already, in the same order every epoch."""

    sampler = SimpleNamespace(set_epoch=lambda epoch, first: None)


def batches(count: int) -> Batches:
    """This process's part of each batch."""
    generator = torch.Generator().manual_seed(1)
    size, made = BATCH // distributed.world_size(), Batches()
    own = slice(distributed.rank() * size, (distributed.rank() + 1) * size)
    for _ in range(count):
        labels = torch.randint(3, (BATCH,), generator=generator)
        images = torch.randn(BATCH, 3, 16, 16, generator=generator) + labels[:, None, None, None]
        made.append([images[own], labels[own]])
    return made


def loss_of(model, batch):
    images, labels = batch
    answer = model(images)
    logits, auxiliary = answer if isinstance(answer, tuple) else (answer, 0.0)
    return F.cross_entropy(logits.float(), labels) + auxiliary, {}


def loss_of_pretraining(model, batch):
    """SimMIM's, with masks that images decide: the same number of patches of each."""
    images, _ = batch
    patches = images[:, 0, ::2, ::2].flatten(1)  # B, 64
    hidden = patches.argsort(1).argsort(1) < 40
    return model(images, hidden.float().view(-1, 8, 8)), {}


def on_run(folder: str, opts: list, resume: str = "", loss=loss_of, look=None) -> list[float]:
    """Train for an epoch of `STEPS`, save; gives the gradients' norms, and what ``look`` says of the run."""
    config = make_config(
        None,
        *("OUTPUT", folder, "DATA.IMG_SIZE", 16, "MODEL.NUM_CLASSES", 3, "MODEL.DROP_PATH_RATE", 0.0),
        *("DATA.BATCH_SIZE", BATCH // distributed.world_size(), "MODEL.RESUME", resume, "TRAIN.CLIP_GRAD", 0.7),
        *("TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 0.1, "TRAIN.OPTIMIZER.EPS", 1e-3),
        *opts,
    )
    files = utils_moe if config.MODEL.TYPE == "swin_moe" else utils
    with launch.session(config, files=files) as session:
        torch.manual_seed(distributed.rank())  # the weights must be the main process's
        pretraining = loss is loss_of_pretraining
        run = engine.prepare(session, build_model(config, pretraining), batches(STEPS), batches(1))
        if resume:
            engine.restore(run, resume)
        if config.TRAIN.EMA_DECAY and run.average is None:
            run.average = MovingAverage(run.model, config.TRAIN.EMA_DECAY)
        norms: list = []
        run.scaler = Recorder(run.scaler, norms)
        engine.train_one_epoch(run, loss)
        run.progress.epoch, run.progress.samples = run.progress.epoch + 1, 0
        with nullcontext() if run.average is None else run.average.in_place():
            if not pretraining:  # with other numbers of batches
                evaluation.validate(session, run.model, batches(2 - distributed.rank()))
        engine.save(run)
        return [norm.item() for norm in norms if norm is not None] if look is None else look(run)


class Recorder:
    def __init__(self, scaler, norms: list):
        self.scaler, self.norms = scaler, norms

    def __call__(self, *arguments, **named):
        self.norms.append(self.scaler(*arguments, **named))
        return self.norms[-1]

    def __getattr__(self, name: str):
        return getattr(self.scaler, name)


FSDP2 = ["TRAIN.SHARDING", "fsdp2"]


def saved(folder: Path, epoch: int = 0) -> Path:
    return folder / f"swin_tiny_patch4_window7_224/default/ckpt_epoch_{epoch}.pth"


def read(path: Path) -> dict:
    """A whole checkpoint, the optimizer's state by name where it is of Swin-MoE."""
    return utils_moe.read_process(path) if list(path.parent.glob("*.experts*")) else storage.read_checkpoint(path)


def assert_close_states(a: Path, b: Path, rtol: float, atol: float) -> None:
    first, second = read(a), read(b)
    assert first["model"].keys() == second["model"].keys()
    assert first.keys() == second.keys()
    for weights_of in {"model", "model_ema"} & first.keys():
        torch.testing.assert_close(dict(first[weights_of]), dict(second[weights_of]), rtol=rtol, atol=atol)
    one, two = first["optimizer"], second["optimizer"]
    assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
    for name, entry in one["state"].items():
        torch.testing.assert_close(entry, two["state"][name], rtol=rtol, atol=atol)


QUICK = ("swin", "fp16", "experts, recomputed")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_training_equals_ddp_and_one_process(name, team, tmp_path):
    opts = [*MODELS[name], "TRAIN.ACCUMULATION_STEPS", 1 if name == "swin" else 3]
    ddp, fsdp, one = (tmp_path / kind for kind in ("ddp", "fsdp", "one"))
    norms, others = team.run(on_run, str(fsdp), [*opts, *FSDP2])
    assert norms == others  # bit for bit: all clip alike
    expected, _ = team.run(on_run, str(ddp), opts)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if name == "fp16" else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=tolerance["rtol"], atol=0)
    assert max(norms) > 0.7  # so that clipping counts
    assert_close_states(saved(fsdp), saved(ddp), **tolerance)
    if "expert" not in name:
        torch.testing.assert_close(on_run(str(one), opts), norms, rtol=tolerance["rtol"], atol=0)
        assert_close_states(saved(fsdp), saved(one), **tolerance)


def test_pretraining_equals_ddp_and_one_process(team, tmp_path):
    ddp, fsdp, one = (tmp_path / kind for kind in ("ddp", "fsdp", "one"))
    norms, others = team.run(on_run, str(fsdp), [*MODELS["swin"], *FSDP2], "", loss_of_pretraining)
    assert norms == others and max(norms) > 0.7
    team.run(on_run, str(ddp), MODELS["swin"], "", loss_of_pretraining)
    on_run(str(one), MODELS["swin"], "", loss_of_pretraining)
    assert "encoder.mask_token" in read(saved(fsdp))["model"]
    for other in (ddp, one):
        assert_close_states(saved(fsdp), saved(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["swin", pytest.param("copies of experts", marks=pytest.mark.slow)])
def test_averages_equal_those_of_ddp_also_after_resuming(name, team, tmp_path):
    opts = [*MODELS[name], "TRAIN.EMA_DECAY", 0.75]
    ddp, fsdp, changed = (tmp_path / kind for kind in ("ddp", "fsdp", "changed"))
    team.run(on_run, str(ddp), opts)
    team.run(on_run, str(fsdp), [*opts, *FSDP2])
    assert_close_states(saved(fsdp), saved(ddp), rtol=1e-4, atol=1e-6)
    content = read(saved(fsdp))
    assert content["model_ema"].keys() == content["model"].keys()
    assert not torch.equal(content["model_ema"]["head.weight"], content["model"]["head.weight"])
    team.run(on_run, str(ddp), opts, str(saved(ddp)))
    team.run(on_run, str(changed), [*opts, *FSDP2], str(saved(ddp)))
    assert_close_states(saved(changed, 1), saved(ddp, 1), rtol=1e-4, atol=1e-6)


COMPILED = ["COMPILE", "default", "COMPILE_BACKEND", "aot_eager"]


def on_compiled(run) -> tuple[list[str], int]:
    """Names of the weights, and how many graphs were compiled; the first tries the compiler."""
    return list(run.model.state_dict()), torch._dynamo.utils.counters["stats"]["unique_graphs"] - 1


@pytest.mark.parametrize("name", ["swin", pytest.param("experts, recomputed", marks=pytest.mark.slow)])
def test_compiled_blocks_train_as_eager_ones(name, team, tmp_path):
    """Blocks differ in their shifts: a graph of one must not serve another."""
    opts, (eager, compiled) = [*MODELS[name], *FSDP2], (tmp_path / kind for kind in ("eager", "compiled"))
    team.run(on_run, str(eager), opts)
    team.run(on_reset)
    names, graphs = team.run(on_run, str(compiled), [*opts, *COMPILED], "", loss_of, on_compiled)[0]
    assert_close_states(saved(compiled), saved(eager), rtol=1e-5, atol=1e-6)
    assert names == list(read(saved(eager))["model"]) and graphs >= 6


def on_reset() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def on_slices(run) -> tuple:
    sliced = dict(run.model.named_parameters())
    assert all(isinstance(p, DTensor) for p in sliced.values() if id(p) not in map(id, own_experts(run)))
    assert not any(isinstance(p, DTensor) for p in own_experts(run))
    state = run.optimizer.state[sliced["layers.0.blocks.0.attn.qkv.weight"]]
    here, whole = sharding.numbers_here(run.model)
    return tuple(state["exp_avg"].shape), here / whole


def own_experts(run) -> list:
    return list(expert_parameters(run.model).values())


@pytest.mark.parametrize("name", ["swin", "experts"])
def test_each_process_keeps_its_slices(name, team, tmp_path):
    for shape, share in team.run(on_run, str(tmp_path), [*MODELS[name], *FSDP2], "", loss_of, on_slices):
        assert shape == (12, 8) and share == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", [pytest.param("swin", marks=pytest.mark.slow), "experts"])
def test_checkpoints_are_those_of_ddp(name, team, tmp_path):
    """A run that changes its sharding has the weights, the optimizer's state and the next steps of others."""
    opts = MODELS[name]
    first, straight, changed, back = (tmp_path / part for part in ("first", "straight", "changed", "back"))
    team.run(on_run, str(first), [*opts, *FSDP2])
    team.run(on_run, str(straight), [*opts, *FSDP2], str(saved(first)))
    team.run(on_run, str(changed), opts, str(saved(first)))
    assert_close_states(saved(changed, 1), saved(straight, 1), rtol=1e-4, atol=1e-6)

    for kind, source in (([], first), (FSDP2, first), (FSDP2, back)):  # to ddp, to fsdp2, and from ddp's file
        team.run(on_copy, str(back), [*opts, *kind], str(saved(source)))
        one, two = read(saved(back)), read(saved(first))
        assert one["model"].keys() == two["model"].keys()
        assert all(torch.equal(one["model"][key], value) for key, value in two["model"].items())
        for key, entry in two["optimizer"]["state"].items():
            assert all(torch.equal(one["optimizer"]["state"][key][part], value) for part, value in entry.items())


def on_copy(folder: str, opts: list, source: str) -> None:
    """Restore and save again, without a step."""
    config = make_config(
        None,
        *("OUTPUT", folder, "DATA.IMG_SIZE", 16, "MODEL.NUM_CLASSES", 3, "MODEL.RESUME", source, *opts),
    )
    files = utils_moe if config.MODEL.TYPE == "swin_moe" else utils
    with launch.session(config, files=files) as session:
        run = engine.prepare(session, build_model(config), batches(STEPS), batches(1))
        engine.restore(run, source)
        engine.save(run)


def on_accumulation(steps: int) -> int:
    """How often gradients are reduced in an epoch."""
    config = make_config(
        None,
        *("OUTPUT", "", "DATA.IMG_SIZE", 16, "MODEL.NUM_CLASSES", 3, "TRAIN.ACCUMULATION_STEPS", steps),
        *(*MODELS["swin"], *FSDP2),
    )
    session = launch.Session(config, torch.device("cpu"), torch.float32, logging.getLogger("sharding"))
    run = engine.prepare(session, build_model(config), batches(STEPS))
    with CommDebugMode() as seen:
        engine.train_one_epoch(run, loss_of)
    return sum(count for operation, count in seen.get_comm_counts().items() if "reduce_scatter" in str(operation))


def test_accumulation_reduces_once_per_update(team):
    once, thrice = team.run(on_accumulation, 1)[0], team.run(on_accumulation, 3)[0]
    assert once == 3 * thrice > 0


def loss_infinite_on_one(model, batch):
    loss, values = loss_of(model, batch)
    loss_infinite_on_one.calls = getattr(loss_infinite_on_one, "calls", -1) + 1
    bad = distributed.rank() == 1 and loss_infinite_on_one.calls % STEPS in (3, 4)
    return (loss * math.inf if bad else loss), values


def on_skipped(run) -> tuple:
    finite = all(torch.isfinite(value).all() for value in run.model.state_dict().values())
    return run.progress.skipped, finite


@pytest.mark.parametrize("name", ["swin", "fp16", "experts, recomputed"])
def test_all_skip_a_step_that_is_not_finite_on_one(name, team, tmp_path):
    answers = team.run(on_run, str(tmp_path), [*MODELS[name], *FSDP2], "", loss_infinite_on_one, on_skipped)
    assert answers == [(2, True)] * 2


def test_training_by_main(image_folder, tmp_path, run_script):
    """As a user runs it: evaluation with other numbers of images on each process, best weights, resuming on one."""
    arguments = small_run(image_folder, *FSDP2, "TRAIN.CPU_OFFLOAD", True, "SAVE_BEST", True, "DATA.BATCH_SIZE", 2)
    result = run_script("main.py", *arguments, "TRAIN.EPOCHS", 1, torchrun=2)
    assert "TRAIN.SHARDING fsdp2: " in result.stdout and "there is no accelerator" in result.stdout
    assert "Accuracy of the network on the 11 test images" in result.stdout
    folder = tmp_path / "output/small/default"
    assert all(value.isfinite().all() for value in weights(folder / "ckpt_best.pth").values())
    alone = run_script("main.py", *arguments)
    assert "one process has nothing to share" in alone.stdout
    assert "Train: [1/2]" in alone.stdout and "Train: [0/2]" not in alone.stdout


def test_pretraining_by_main_shows_what_its_checkpoint_shows(tmp_path, run_script):
    write_images(tmp_path, ["unlabelled"], 12)
    arguments = small_run(tmp_path / "unlabelled", "DATA.BATCH_SIZE", 2, "DATA.MASK_PATCH_SIZE", 4, "TRAIN.EPOCHS", 1)
    trained = run_script("main_simmim_pt.py", *arguments, *FSDP2, torchrun=2)
    checkpoint = tmp_path / "output/small/default/ckpt_epoch_0.pth"
    shown = run_script("main_simmim_pt.py", "--eval", *arguments, "--resume", checkpoint)
    lines = [re.findall(r" \* (Reconstruction loss .*)", result.stdout) for result in (trained, shown)]
    assert len(lines[0]) == 1 and lines[0] == lines[1]


def test_keys_that_contradict_are_told():
    def check(*opts):
        sharding.check_settings(make_config(None, *opts))

    check(*FSDP2)
    with pytest.raises(ValueError, match=r"TRAIN\.CPU_OFFLOAD=True .* TRAIN\.SHARDING fsdp2"):
        check("TRAIN.CPU_OFFLOAD", True)
    with pytest.raises(ValueError, match=r"fused_lamb does not work on slices; .*'adamw'"):
        check(*FSDP2, "TRAIN.OPTIMIZER.NAME", "fused_lamb")
    with pytest.raises(ValueError, match=r"TRAIN\.SHARDING='zero'; choose from \['ddp', 'fsdp2'\]"):
        check("TRAIN.SHARDING", "zero")
