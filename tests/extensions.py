"""The compiled extensions of kernels/, as tests take them: installed, or built once in pytest's cache."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

COMPILER = os.environ.get("CXX", "c++")


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MAX_JOBS": "2", **variables}


def build(source: Path, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Build an extension, as a package in ``folder / "lib"``; the sources' folder stays as it is."""
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", folder / "lib"]
    egg = ["egg_info", "--egg-base", folder]
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [*command, *egg], cwd=source, capture_output=True, text=True, timeout=300, env=environment(**variables)
    )


def digest(source: Path, *more: str) -> str:
    """Of all that decides what is built."""
    shared = source.parent
    files = sorted([*source.glob("csrc/*"), *source.glob("src/*/*.py"), *shared.glob("csrc/*"), source / "setup.py"])
    files.append(shared / "building.py")
    text = b"".join(path.read_bytes() for path in files) + "".join([torch.__version__, *more]).encode()
    return hashlib.sha256(text).hexdigest()[:12]


def load(request: pytest.FixtureRequest, source: Path, **variables: str) -> ModuleType:
    """The package ``swin_<name>`` of ``source``, a folder of kernels/; skips where there is no compiler."""
    package = f"swin_{source.name}"
    if importlib.util.find_spec(package) is None:
        if shutil.which(COMPILER) is None:
            pytest.skip("no C++ compiler")
        folder = Path(request.config.cache.mkdir(source.name)) / digest(source, *variables.values())
        if not list(folder.glob("lib/*/_C.*")):
            result = build(source, folder, **variables)
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        sys.path.insert(0, str(folder / "lib"))
    return importlib.import_module(package)
