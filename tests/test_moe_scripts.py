"""main_moe.py as users run it: one process and several, exact resuming, uneven evaluation, errors in one line."""

import re
import signal
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_same_state, small_run, write_stopping_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import utils
import utils_moe

MODEL = [key.replace("SWIN.", "SWIN_MOE.") if isinstance(key, str) else key for key in SMALL]
MODEL += ["MODEL.TYPE", "swin_moe", "MODEL.SWIN_MOE.MOE_BLOCKS", [[1], [1]], "MODEL.SWIN_MOE.NUM_EXPERTS", 4]


COPIES = ["MODEL.SWIN_MOE.EXPERT_PARALLEL", 1]  # every process holds all experts


def run_of(data: Path, *opts) -> list[str]:
    return small_run(data, *MODEL, *opts)


def accuracies(text: str) -> list[str]:
    return re.findall(r" \* Acc@1 (\S+ Acc@5 \S+)", text)


def test_train_on_two_processes_evaluate_on_one_and_three(image_folder, tmp_path, run_script):
    """11 validation images in batches of 2: one of two processes has three batches, one of three processes one less."""
    opts = ["DATA.BATCH_SIZE", 2, "MODEL.SWIN_MOE.PATH", "dropless", "TRAIN.MOE.STATISTICS", True]
    result = run_script("main_moe.py", *run_of(image_folder, *opts), torchrun=2, fresh=True)
    folder = tmp_path / "output/small/default"
    assert re.search(r"number of params single: (\d+)[\s\S]*number of params whole: (\d+)", result.stdout)
    assert re.search(r"loss \S+ \(\S+\)\tloss-cls \S+ \(\S+\)\tloss-aux \S+ \(\S+\)\tgrad_norm", result.stdout)
    assert "experts of layers.1.blocks.1: share of tokens" in result.stdout
    tags = set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert {"train/loss-aux", "experts/layers.0.blocks.1/share_3", "experts/layers.1.blocks.1/dropped_share"} <= tags
    last = accuracies(result.stdout)[-1]
    for processes in (0, 4):
        arguments = [*run_of(image_folder, *opts), "--eval", "--resume", folder / "ckpt_epoch_1.pth"]
        evaluated = run_script("main_moe.py", *arguments, "--tag", f"eval{processes}", torchrun=processes)
        assert accuracies(evaluated.stdout)[-1] == last  # without dropped tokens, neighbours do not matter
        assert "on the 11 test images" in evaluated.stdout


@pytest.mark.parametrize(
    "number, stop_at, processes, opts",
    [
        (signal.SIGTERM, 5, 1, ["TRAIN.ACCUMULATION_STEPS", 2]),
        (signal.SIGKILL, 6, 2, ["DATA.BATCH_SIZE", 2, "TRAIN.MOE.CHECKPOINT", "official"]),
        (signal.SIGKILL, 6, 2, [*("DATA.BATCH_SIZE", 2, "TRAIN.USE_CHECKPOINT", True), *COPIES]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    image_folder, tmp_path, run_script, number, stop_at, processes, opts
):
    torchrun = processes if processes > 1 else 0
    arguments = run_of(image_folder, "SAVE_STEPS", 2, *opts)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("main_moe.py", *arguments, "--output", whole, torchrun=torchrun)
    script = write_stopping_script(tmp_path, "main_moe", "main_moe.ExpertLoss", "__call__")
    environment = {"SIGNAL": str(int(number)), "STOP_AT": str(stop_at), "GROUP": ""}
    stopped = run_script(script, *arguments, "--output", parts, torchrun=torchrun, check=False, env=environment)
    assert stopped.returncode != 0
    run_script("main_moe.py", *arguments, "--output", parts, torchrun=torchrun)
    if not torchrun:
        assert_same_state(*(root / "small/default/ckpt_epoch_1.pth" for root in (whole, parts)))
        return
    if "official" in opts:
        final = [root / "small/default/ckpt_epoch_final.pth" for root in (whole, parts)]
        assert (final[0].with_name("ckpt_epoch_final.pth.master")).exists()
        first, second = (utils_moe.read_process(path)["model"] for path in final)
        assert all(torch.equal(value, second[name]) for name, value in first.items())
    one, two = (utils_moe.read_process(root / "small/default/ckpt_epoch_1.pth") for root in (whole, parts))
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    for name, entry in one["optimizer"]["state"].items():
        assert all(torch.equal(value, two["optimizer"]["state"][name][key]) for key, value in entry.items())


@pytest.mark.parametrize(
    "opts, torchrun, message",
    [
        (["MODEL.SWIN_MOE.NUM_EXPERTS", 3], 2, r"MODEL.SWIN_MOE.NUM_EXPERTS=3"),
        (["MODEL.SWIN_MOE.EXPERT_PARALLEL", 3], 2, r"MODEL.SWIN_MOE.EXPERT_PARALLEL=3 does not divide the 2 process"),
        (["MODEL.SWIN_MOE.TOP_VALUE", 5], 0, r"MODEL.SWIN_MOE.TOP_VALUE=5"),
        (["MODEL.SWIN_MOE.GATE_NOISE", 0.0], 0, r"MODEL.SWIN_MOE.GATE_NOISE=0"),
        (["MODEL.SWIN_MOE.NUM_EXPERTS", 1], 0, r"MODEL.SWIN_MOE.*expert"),
        (["MODEL.TYPE", "swin"], 0, r"MODEL.TYPE='swin': main_moe.py trains swin_moe"),
    ],
)
def test_errors_name_the_key_in_one_line(image_folder, run_script, opts, torchrun, message):
    result = run_script("main_moe.py", *run_of(image_folder, *opts), torchrun=torchrun, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("main_moe.py: error: ")]
    assert result.returncode == 1 and lines, result.stderr
    assert all(re.search(message, line) for line in lines)


def test_what_fails_on_the_main_process_ends_all_with_one_line(image_folder, tmp_path, run_script):
    saved = tmp_path / "output/small/default"
    saved.mkdir(parents=True)
    (saved / "ckpt_epoch_0.pth").write_bytes(b"PK half of it")
    address = "https://127.0.0.1:1/none.pth"
    for flags, message in (
        (["--eval", "--resume", address], f"{address}: cannot be downloaded"),
        ([], "none of its 1 checkpoint(s) loads"),
    ):
        arguments = [*run_of(image_folder), *flags]
        result = run_script("main_moe.py", *arguments, torchrun=2, check=False, env={"TORCH_HOME": str(tmp_path)})
        lines = [line for line in result.stderr.splitlines() if line.startswith("main_moe.py: error: ")]
        assert len(lines) == 2 and all(message in line for line in lines), result.stderr


def test_a_gradient_that_another_process_cannot_use_is_skipped_here_too():
    """A scaler looks at this process's gradients alone; the norm tells of all processes."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler = utils.NativeScalerWithGradNormCount("cpu", enabled=True)
    first = scaler.get_scale()
    for other, moved in ((torch.tensor(torch.inf), False), (torch.tensor(2.0 * first), True)):
        optimizer.zero_grad()
        before = parameter.detach().clone()
        norm = scaler(parameter.sum(), optimizer, parameters=[parameter], combine=lambda other=other: other)
        assert torch.equal(parameter, before) != moved
        assert torch.isfinite(norm) == moved
    assert norm.item() == pytest.approx(4.0)  # the scale was halved by the step that was skipped
    assert scaler.get_scale() == first / 2
