"""What tests share: golden numbers and the rule that fills weights, small data, the scripts run as users run them."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import preloaded
import pytest
import torch
from PIL import Image

from config import get_config
from kernels import window_process
from models import build_model
from models.attention import ATTEND

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # forks of a process with threads lack them
multiprocessing.set_forkserver_preload(list(preloaded.LIBRARIES))  # for whom "forkserver" starts
torch.set_num_threads(1)  # most models here are so small that threads only wait for each other

ROOT = Path(__file__).parent.parent
# Without its extension, window_process computes what the others do; tests/test_window_process.py looks at that.
BACKENDS = [name for name in ATTEND if name != "window_process" or window_process.is_built_for(torch.device("cpu"))]
GOLDEN = Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    if not torch.accelerator.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Compiled code, its count against PyTorch's limit, and what would not compile belong to one test alone."""
    yield
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


def golden(name: str) -> dict:
    """Numbers of the official code; tests/golden/README.md says how they were made."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def make_config(cfg: str | Path | None = None, *opts, **flags):
    """The configuration of a command line; KEY, VALUE pairs may be of any type."""
    path = None if cfg is None else ROOT / cfg
    return get_config(SimpleNamespace(cfg=path, opts=[o if isinstance(o, str) else repr(o) for o in opts], **flags))


def golden_values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden rule's value of the parameter ``name``."""
    r = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "relative_position_bias_table":
        value = 0.5 * r
    elif last == "logit_scale":
        value = np.log(10) + 0.1 * r
    elif len(shape) >= 2:
        value = r / np.sqrt(np.prod(shape[1:]))
    elif "norm" in name and last == "weight":
        value = 1 + 0.1 * r
    else:
        value = 0.05 * r
    return torch.from_numpy(value.astype(np.float32))


def fill(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(golden_values(name, tuple(parameter.shape)))
    return model


def golden_images(seed: int, batch: int, size: int) -> torch.Tensor:
    images = np.random.RandomState(seed).standard_normal((batch, 3, size, size))
    return torch.from_numpy(images.astype(np.float32))


def swin_tiny(*opts):
    """Swin-T at 224 with golden weights, in evaluation mode."""
    return fill(build_model(make_config("configs/swin/swin_tiny_patch4_window7_224.yaml", *opts))).eval()


# A Swin of two small stages on 16x16 images, with a shift: a step takes milliseconds.
SMALL = [
    *("DATA.IMG_SIZE", 16, "MODEL.NAME", "small", "MODEL.DROP_PATH_RATE", 0.1, "DATA.BATCH_SIZE", 4),
    *("MODEL.SWIN.PATCH_SIZE", 2, "MODEL.SWIN.EMBED_DIM", 8, "MODEL.SWIN.DEPTHS", [2, 2]),
    *("MODEL.SWIN.NUM_HEADS", [2, 4], "MODEL.SWIN.WINDOW_SIZE", 4),
    *("TRAIN.EPOCHS", 2, "TRAIN.WARMUP_EPOCHS", 0, "PRINT_FREQ", 2, "DATA.NUM_WORKERS", 0),
]


def write_images(root: Path, classes: list[str], per_class: int, size: int = 16, seed: int = 0) -> None:
    """PNG images whose brightness says their class."""
    generator = np.random.RandomState(seed)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = generator.randint(0, 100, (size, size, 3)) + 150 * label // max(len(classes) - 1, 1)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/ of 3 classes: 30 and 11 images of 16x16."""
    root = tmp_path / "data"
    for split, count in (("train", 10), ("val", 4)):
        write_images(root / split, ["ant", "bee", "cat"], count, seed=count)
    (root / "val" / "cat" / "3.png").unlink()
    return root


@pytest.fixture(scope="session")
def preloaded_python() -> Iterator[dict[str, str]]:
    """Variables of `preloaded`'s Python: where it listens, and the command to call it by, as torchrun knows it."""
    with tempfile.TemporaryDirectory() as folder:  # a socket's address is short
        address, command = os.path.join(folder, "socket"), Path(folder, "python")
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{preloaded.__file__}" "$@"\n')
        command.chmod(0o755)
        server = subprocess.Popen(
            [sys.executable, preloaded.__file__, "--serve", address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C that ends the tests is not for those who end what they have started
        )
        with server:  # it ends as its input does
            assert server.stdout.readline() == b"ready\n"
            yield {preloaded.ADDRESS: address, "PYTHON_EXEC": str(command)}


@pytest.fixture
def run_script(tmp_path: Path, preloaded_python: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Run a script of the project, as ``python`` or with ``torchrun=N``; output goes to ``tmp_path/output``.

    ``fresh`` processes import everything themselves, for seconds; the others begin with the libraries, which do not see
    the variables of ``env`` that they read while they are imported.
    """

    def call(
        script: str | Path,
        *arguments,
        torchrun: int = 0,
        launcher: str = "torch.distributed.run",
        check: bool = True,
        env: dict | None = None,
        fresh: bool = False,
    ):
        launch = ["-m", launcher, "--standalone", "--nproc_per_node", str(torchrun)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **({} if fresh else preloaded_python), **(env or {})}
        python = sys.executable if fresh else preloaded_python["PYTHON_EXEC"]
        command = [python, *(launch if torchrun else []), ROOT / script, *arguments]
        result = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
            start_new_session=True,  # so that tests may send signals to the whole group
            env=variables,
        )
        if check:
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return call


def small_run(data: Path, *opts) -> list[str]:
    """Arguments of main.py that train `SMALL` on a folder."""
    every = [*SMALL, *opts]
    return ["--cfg", str(EMPTY_CONFIG), "--data-path", str(data), "--output", "output", "--opts", *map(str, every)]


EMPTY_CONFIG = GOLDEN / "empty.yaml"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_state(a: Path, b: Path) -> None:
    """Weights, optimizer, schedule, position and generators of two checkpoints, bit for bit."""
    first, second = (torch.load(path, weights_only=True) for path in (a, b))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for one, two in zip(first["optimizer"]["state"].values(), second["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    for key in ("max_accuracy", "epoch", "progress"):
        assert first[key] == second[key], key
    for one, two in zip(first["rng"], second["rng"], strict=True):
        assert torch.equal(one["torch"], two["torch"]) and torch.equal(one["numpy"][1], two["numpy"][1])


# A script that sends itself a signal when it begins a given training step, counted over the run and on each rank.
STOPS_ITSELF = """
import os, sys
sys.path.insert(0, {root!r})
import launch, supervised, {script}
number, stop_at, seen = int(os.environ["SIGNAL"]), int(os.environ["STOP_AT"]), 0
compute = {owner}.{name}
def counted(*arguments):
    global seen
    seen += 1
    if seen == stop_at:
        if os.environ["GROUP"]:  # loader workers too, as Ctrl-C on a terminal
            os.killpg(os.getpgrp(), number)
        else:
            os.kill(os.getpid(), number)
    return compute(*arguments)
{owner}.{name} = counted
launch.run({script}.main, "")
"""


def write_stopping_script(folder: Path, script: str, owner: str, name: str) -> Path:
    """`STOPS_ITSELF` for the loss ``owner.name`` of one of the scripts; SIGNAL, STOP_AT and GROUP steer it."""
    path = folder / "stops_itself.py"
    path.write_text(STOPS_ITSELF.format(root=str(ROOT), script=script, owner=owner, name=name))
    return path
