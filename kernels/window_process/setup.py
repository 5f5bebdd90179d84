"""Build the extension: ``pip install ./kernels/window_process --no-build-isolation`` from the repository's root.

The CPU part is always built, the CUDA part where PyTorch has CUDA and nvcc of the same major version is found.
SWIN_WINDOW_PROCESS_CUDA=0 leaves it out; 1 makes its absence an error. TORCH_CUDA_ARCH_LIST names the architectures,
by default those of the visible GPUs, else 8.0 and 9.0 with PTX for later ones.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension, library_paths

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import COMPILE, WHEEL, Build, check_setuptools


def why_no_cuda() -> str:
    """Why the CUDA part cannot be built, or ``""``."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is without CUDA"
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        return "nvcc is not found; install the CUDA toolkit or set CUDA_HOME"
    try:
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as err:
        return f"{nvcc} does not run ({err})"
    version = re.search(r"release (\d+)\.(\d+)", release)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version and version[0].split()[-1]}, but PyTorch of CUDA {torch.version.cuda}"
    if cuda_runtime() is None:
        return f"libcudart is neither in {CUDA_HOME} nor among PyTorch's packages"
    return ""


def cuda_runtime() -> Path | None:
    """The library to link with: the toolkit's, or else the one that came with PyTorch."""
    folders = [Path(folder) for folder in library_paths("cuda")]
    packages = Path(torch.__file__).parent.parent / "nvidia"
    found = [path for folder in folders for path in folder.glob("libcudart.so")]
    found += sorted(packages.glob(f"*/lib/libcudart.so.{torch.version.cuda.split('.')[0]}*"))
    return found[0] if found else None


def wants_cuda() -> bool:
    asked = os.environ.get("SWIN_WINDOW_PROCESS_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        sys.exit(f"swin_window_process: error: SWIN_WINDOW_PROCESS_CUDA={asked!r}; choose from auto, 0, 1")
    reason = "SWIN_WINDOW_PROCESS_CUDA=0" if asked == "0" else why_no_cuda()
    if reason and asked == "1":
        sys.exit(f"swin_window_process: error: SWIN_WINDOW_PROCESS_CUDA=1, but {reason}")
    sys.stderr.write(f"swin_window_process: {f'for the CPU only: {reason}' if reason else 'for the CPU and CUDA'}\n")
    return not reason


class BuildBoth(Build):
    @property
    def advice(self) -> str:
        cuda = any(extension.name.endswith("_cuda") for extension in self.extensions)
        return "; SWIN_WINDOW_PROCESS_CUDA=0 builds the CPU part alone" if cuda else ""


def extensions() -> list:
    options = {"py_limited_api": True}  # no file of a Python version: the library holds operators, no Python module
    options["depends"] = sorted(str(path) for path in Path("csrc").glob("*.h"))
    cpu = CppExtension("swin_window_process._C", ["csrc/cpu.cpp"], extra_compile_args=COMPILE, **options)
    if not wants_cuda():
        return [cpu]
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    flags = {"cxx": [*COMPILE, "-DUSE_CUDA"], "nvcc": [*COMPILE, "-DUSE_CUDA"]}
    cuda = CUDAExtension(
        "swin_window_process._C_cuda", ["csrc/cuda.cpp", "csrc/move.cu"], extra_compile_args=flags, **options
    )
    runtime = cuda_runtime()
    cuda.library_dirs.append(str(runtime.parent))
    cuda.libraries = [f":{runtime.name}" if name == "cudart" else name for name in cuda.libraries]
    return [cpu, cuda]


check_setuptools("swin_window_process")
setup(
    name="swin_window_process",
    version="1.0.0",
    description="Shift and cut maps into windows, and back, in one copy",
    package_dir={"": "src"},
    packages=["swin_window_process"],
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildBoth},
    options=WHEEL,
)
