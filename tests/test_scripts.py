"""main.py as users run it: train, evaluate, resume exactly, several processes, and errors in one line."""

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_state, small_run, weights, write_images, write_stopping_script

SAVED = "output/small/default"


@pytest.mark.parametrize(
    "number, stop_at, processes, opts",
    [
        (signal.SIGKILL, 1, 1, []),  # before anything is saved
        (signal.SIGKILL, 6, 1, []),
        (signal.SIGKILL, 11, 1, ["TRAIN.ACCUMULATION_STEPS", 2]),  # within a group
        (signal.SIGTERM, 4, 1, ["TRAIN.ACCUMULATION_STEPS", 3]),
        (signal.SIGINT, 12, 1, []),
        (signal.SIGTERM, 10, 1, ["DATA.NUM_WORKERS", 2]),
        (signal.SIGINT, 3, 1, ["DATA.NUM_WORKERS", 2]),
        (signal.SIGKILL, 7, 2, ["DATA.BATCH_SIZE", 2]),
        (signal.SIGTERM, 9, 2, ["DATA.BATCH_SIZE", 2, "TRAIN.ACCUMULATION_STEPS", 2, "PRINT_FREQ", 2]),
    ],
)
def test_a_stopped_run_resumes_to_the_same_weights(
    image_folder, tmp_path, run_script, number, stop_at, processes, opts
):
    """All random parts on; another number of workers after the resume."""
    torchrun = processes if processes > 1 else 0
    arguments = small_run(image_folder, "SAVE_STEPS", 2, "AUG.REPROB", 0.5, *opts)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_script("main.py", *arguments, "--output", whole, torchrun=torchrun)
    group = "yes" if "DATA.NUM_WORKERS" in opts else ""
    script = write_stopping_script(tmp_path, "main", "supervised.SupervisedLoss", "__call__")
    environment = {"SIGNAL": str(int(number)), "STOP_AT": str(stop_at), "GROUP": group}
    stopped = run_script(script, *arguments, "--output", parts, torchrun=torchrun, check=False, env=environment)
    if torchrun:
        assert stopped.returncode != 0
    else:
        assert stopped.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert not (parts / "small/default/ckpt_epoch_1.pth").exists()
    if number != signal.SIGKILL:
        assert len(list((parts / "small/default").glob("ckpt_epoch_*_step_*.pth"))) == 1
    resumed = [*arguments, "DATA.NUM_WORKERS", 0 if group else 2, "--output", parts]
    run_script("main.py", *resumed, torchrun=torchrun)
    assert_same_state(*(root / "small/default/ckpt_epoch_1.pth" for root in (whole, parts)))


def test_train_evaluate_resume(image_folder, tmp_path, run_script):
    run_script("main.py", *small_run(image_folder), fresh=True)
    folder = tmp_path / SAVED
    assert json.loads((folder / "config.json").read_text())["MODEL"]["NUM_CLASSES"] == 3
    saved = torch.load(folder / "ckpt_epoch_1.pth", weights_only=True)
    assert saved["classes"] == ["ant", "bee", "cat"]
    before = {path: path.read_bytes() for path in folder.glob("*.pth")}

    for flags in (["--resume", folder / "ckpt_epoch_0.pth"], ["--pretrained", folder / "ckpt_epoch_0.pth"], []):
        result = run_script("main.py", "--eval", *flags, *small_run(image_folder))
        assert "Accuracy of the network on the 11 test images" in result.stdout
        assert "Start training" not in result.stdout
        used = "ckpt_epoch_0.pth" if flags else "ckpt_epoch_1.pth"
        assert used in result.stdout
    assert {path: path.read_bytes() for path in folder.glob("*.pth")} == before

    result = run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 3), "--resume", folder / "ckpt_epoch_0.pth")
    assert "Train: [1/3]" in result.stdout and "Train: [0/3]" not in result.stdout  # explicit --resume wins


@pytest.mark.parametrize("launcher", ["torchrun", "launch"])
def test_two_processes_equal_one(tmp_path, run_script, launcher):
    """The same global batches: the same losses for ten steps, and the same accuracy on an odd number of images."""
    data = tmp_path / "data"
    for split, count in (("train", 40), ("val", 7)):
        write_images(data / split, ["ant", "bee", "cat"], count, seed=count)
    common = ["TRAIN.EPOCHS", 1, "PRINT_FREQ", 1, "MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    arguments = {size: small_run(data, *common, "DATA.BATCH_SIZE", size) for size in (6, 12)}
    one = run_script("main.py", *arguments[12], "--tag", "one").stdout
    module = {"torchrun": "torch.distributed.run", "launch": "torch.distributed.launch"}[launcher]
    fresh = launcher == "torchrun"
    two = run_script("main.py", *arguments[6], "--tag", "two", torchrun=2, launcher=module, fresh=fresh).stdout
    numbers = [re.findall(r"loss ([\d.]+) .*grad_norm ([\d.]+)", text) for text in (one, two)]
    assert len(numbers[0]) == 10
    for (loss, norm), (other_loss, other_norm) in zip(*numbers, strict=True):
        assert float(loss) == pytest.approx(float(other_loss), abs=2e-4)
        assert float(norm) == pytest.approx(float(other_norm), rel=1e-3, abs=2e-4)
    results = [re.search(r" \* Acc@1 ([\d.]+)", text)[1] for text in (one, two)]
    assert results[0] == results[1]
    assert "on the 21 test images" in two
    first, second = (weights(tmp_path / f"output/small/{tag}/ckpt_epoch_0.pth") for tag in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-4, rtol=1e-3)


def test_accumulation_on_two_processes_equals_one(tmp_path, run_script):
    data = tmp_path / "data"
    for split in ("train", "val"):
        write_images(data / split, ["ant", "bee"], 12)
    common = ["TRAIN.EPOCHS", 1, "PRINT_FREQ", 1, "MODEL.DROP_PATH_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    run_script("main.py", *small_run(data, *common, "DATA.BATCH_SIZE", 12), "--tag", "one")
    opts = [*common, "DATA.BATCH_SIZE", 3, "TRAIN.ACCUMULATION_STEPS", 2]
    run_script("main.py", *small_run(data, *opts), "--tag", "two", torchrun=2)
    first, second = (weights(tmp_path / f"output/small/{tag}/ckpt_epoch_0.pth") for tag in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=1e-4, rtol=1e-3)


def fails(result: subprocess.CompletedProcess, *texts: str) -> None:
    """Not 0, one line on stderr, and in it what is wrong."""
    assert result.returncode not in (0, None)
    lines = [line for line in result.stderr.splitlines() if "Warning" not in line and not line.startswith("  ")]
    assert len(lines) == 1 and lines[0].startswith("main.py: error: "), result.stderr
    for text in texts:
        assert text in lines[0], lines[0]


def test_bad_input_is_one_line(image_folder, tmp_path, run_script):
    """Each of these ends with a line that names the thing, and leaves a good checkpoint as it was."""
    run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 1))
    good = tmp_path / SAVED / "ckpt_epoch_0.pth"
    before = good.read_bytes()

    def call(*opts, data=image_folder, flags=()):
        return run_script("main.py", *flags, *small_run(data, *opts), check=False)

    fails(call(data=tmp_path / "nowhere"), "nowhere", "no such folder", "--data-path")
    fails(call("DATA.BATCH_SIZE", 0), "DATA.BATCH_SIZE=0")
    fails(call("DATA.NUM_WORKERS", -1), "DATA.NUM_WORKERS=-1")
    fails(call("DATA.IMG_SIZE", 18), "DATA.IMG_SIZE", "sizes near it that work")
    fails(call("MODEL.NUM_CLASSES", 2), "3 classes", "MODEL.NUM_CLASSES=2")
    fails(
        call("MODEL.SWIN.EMBED_DIM", 16, flags=["--eval", "--resume", good]),
        "ckpt_epoch_0.pth",
        "MODEL.SWIN.EMBED_DIM=8, this one 16",
    )
    fails(call("MODEL.SWIN.EMBED_DIM", 16), "ckpt_epoch_0.pth", "EMBED_DIM=8, this one 16")  # by auto-resume
    fails(call(flags=["--eval", "--resume", tmp_path / "none.pth"]), "none.pth", "no such checkpoint")

    cut = tmp_path / "cut.pth"
    cut.write_bytes(before[: len(before) // 2])
    fails(call(flags=["--eval", "--resume", cut]), "cut.pth", "truncated")
    torch.save({"model": Exploit()}, tmp_path / "evil.pth")
    fails(call(flags=["--eval", "--resume", tmp_path / "evil.pth"]), "evil.pth", "refused")
    assert not (tmp_path / "ran").exists()

    write_images(image_folder / "val", ["eel"], 1)
    fails(call(flags=["--tag", "other"]), "eel")
    (image_folder / "val" / "eel" / "0.png").unlink(), (image_folder / "val" / "eel").rmdir()
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"not an image")
    for workers in (0, 2):
        fails(call("DATA.NUM_WORKERS", workers, flags=["--tag", "other"]), "cannot decode", "bee/3.png")
    assert good.read_bytes() == before
    assert "Traceback" in (tmp_path / "output/small/other/log_rank0.txt").read_text()  # the log keeps the details


class Exploit:
    def __reduce__(self):
        import os

        return os.system, ("touch ran",)


def test_an_error_on_one_rank_ends_all(image_folder, run_script):
    (image_folder / "train" / "bee" / "3.png").write_bytes(b"not an image")
    result = run_script("main.py", *small_run(image_folder), torchrun=2, check=False, fresh=True)
    assert result.returncode != 0 and "cannot decode" in result.stderr


def test_evaluation_checks_class_names(image_folder, tmp_path, run_script):
    run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 1))
    for split in ("train", "val"):
        (image_folder / split / "bee").rename(image_folder / split / "boa")
    result = run_script("main.py", "--eval", *small_run(image_folder), check=False)
    fails(result, "they differ in bee, boa")


# main.py that counts the all-reduces of DistributedDataParallel.
COUNTS_REDUCTIONS = """
import sys
sys.path.insert(0, {root!r})
import torch.distributed as dist, engine, launch, main
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
count = 0
def counted(group, bucket):
    global count
    count += 1
    return allreduce_hook(group, bucket)
class Counting(engine.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(dist.group.WORLD, counted)
engine.DistributedDataParallel = Counting
def counting(config):
    main.main(config)
    sys.stdout.write(f"REDUCTIONS {{count}}\\n")  # in one go: print would mix with that of the other process
launch.run(counting, "")
"""


def test_accumulation_reduces_once_per_update(image_folder, tmp_path, run_script):
    """15 images a rank, batches of 2: 7 batches, in groups of 3: 3 updates, on a model of one bucket."""
    script = tmp_path / "counts.py"
    script.write_text(COUNTS_REDUCTIONS.format(root=str(ROOT)))
    counts = []
    for steps in (1, 3):
        opts = ["DATA.BATCH_SIZE", 2, "TRAIN.ACCUMULATION_STEPS", steps, "TRAIN.EPOCHS", 1]
        output = run_script(script, *small_run(image_folder, *opts), "--tag", str(steps), torchrun=2).stdout
        counts.append(int(re.search(r"REDUCTIONS (\d+)", output)[1]))
    assert counts[0] % 7 == 0 and counts[1] * 7 == counts[0] * 3


def test_training_on_a_zip_keeps_the_best_weights(image_folder, tmp_path, run_script):
    from tools import make_zip

    make_zip.make_zip(image_folder, tmp_path / "zip", ["train", "val"], workers=0)
    opts = ["TRAIN.EPOCHS", 2, "SAVE_BEST", True]
    result = run_script("main.py", "--zip", "--cache-mode", "full", *small_run(tmp_path / "zip", *opts))
    assert "decoder pil, pipeline official" in result.stdout and "train.zip" in result.stdout  # data's own lines
    best = torch.load(tmp_path / SAVED / "ckpt_best.pth", weights_only=True)
    accuracies = [float(value) for value in re.findall(r"\* Acc@1 ([\d.]+)", result.stdout)]
    assert best["max_accuracy"] == pytest.approx(max(accuracies), abs=1e-3) and best["classes"] == ["ant", "bee", "cat"]
    evaluated = run_script(
        "main.py", "--eval", "--zip", "--resume", str(tmp_path / SAVED / "ckpt_best.pth"), *small_run(tmp_path / "zip")
    )
    assert f"* Acc@1 {best['max_accuracy']:.3f}" in evaluated.stdout


def test_skipped_images_are_listed_at_the_end_of_the_epoch(image_folder, run_script):
    broken = image_folder / "val" / "ant" / "0.png"
    broken.write_bytes(b"not an image")
    opts = ["TRAIN.EPOCHS", 1, "DATA.ON_ERROR", "skip"]
    result = run_script("main.py", *small_run(image_folder, *opts), torchrun=2)
    assert "Accuracy of the network on the 10 test images" in result.stdout
    logs = [Path(broken.parents[3] / SAVED / f"log_rank{rank}.txt").read_text() for rank in (0, 1)]
    assert sum(log.count("1 sample(s) skipped in evaluation by this process") for log in logs) == 1
    assert sum(str(broken) in log for log in logs) == 1
    failed = run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 1), check=False)
    assert failed.returncode == 1 and f"cannot decode {broken}" in failed.stderr
