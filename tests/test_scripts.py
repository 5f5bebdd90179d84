"""main.py as users run it: train, evaluate, resume exactly, several processes, and errors in one line."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_run, write_images

SAVED = "output/small/default"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same(a: Path, b: Path) -> None:
    """Weights, optimizer, schedule and position, bit for bit."""
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for one, two in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    for key in ("max_accuracy", "epoch", "progress"):
        assert first[key] == second[key], key
    assert torch.equal(first["rng"][0]["torch"], second["rng"][0]["torch"])


def interrupted(arguments: list[str], cwd: Path, marker: str, number: int) -> int:
    """Run main.py, send a signal once a line with ``marker`` appears, return the exit code."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as child:
        for line in child.stdout:
            if marker.encode() in line:
                child.send_signal(number)
                break
        child.stdout.read()
    return child.returncode


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_weights(image_folder, tmp_path, run_script, number):
    """All random parts on; another number of workers after the resume."""
    arguments = small_run(image_folder, "PRINT_FREQ", 1, "SAVE_STEPS", 2, "AUG.REPROB", 0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    run_script("main.py", *arguments, "--output", whole / "output")
    code = interrupted(arguments, parts, "Train: [1/2][3/7]", number)
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    saved = [path.name for path in (parts / SAVED).glob("*.pth")]
    assert "ckpt_epoch_1.pth" not in saved and any("_step_" in name for name in saved)
    result = run_script("main.py", *arguments, "DATA.NUM_WORKERS", 2, "--output", parts / "output")
    assert re.search(r"auto resuming from .*ckpt_epoch_1_step_[2-6]\.pth", result.stdout)
    final = "output/small/default/ckpt_epoch_1.pth"
    assert_same(whole / final, parts / final)


def test_train_evaluate_resume(image_folder, tmp_path, run_script):
    run_script("main.py", *small_run(image_folder))
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
    if launcher == "torchrun":
        two = run_script("main.py", *arguments[6], "--tag", "two", torchrun=2).stdout
    else:
        module = ["-m", "torch.distributed.launch", "--nproc_per_node", "2", "--master_port", "29511"]
        command = [sys.executable, *module, str(ROOT / "main.py"), *arguments[6], "--tag", "two"]
        two = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
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
    fails(call("MODEL.SWIN.EMBED_DIM", 16, flags=["--eval", "--resume", good]), "ckpt_epoch_0.pth", "of another shape")
    fails(call("MODEL.SWIN.EMBED_DIM", 16), "ckpt_epoch_0.pth", "of another shape")  # by auto-resume
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
    result = run_script("main.py", *small_run(image_folder), torchrun=2, check=False)
    assert result.returncode != 0 and "cannot decode" in result.stderr


def test_evaluation_checks_class_names(image_folder, tmp_path, run_script):
    run_script("main.py", *small_run(image_folder, "TRAIN.EPOCHS", 1))
    for split in ("train", "val"):
        (image_folder / split / "bee").rename(image_folder / split / "boa")
    result = run_script("main.py", "--eval", *small_run(image_folder), check=False)
    fails(result, "they differ in bee, boa")
