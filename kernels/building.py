"""What the extensions' ``setup.py`` share; each puts this folder on Python's path."""

import sys
from importlib.util import find_spec
from pathlib import Path

import setuptools
from torch.utils.cpp_extension import BuildExtension, CppExtension

OLDEST = "0x020b000000000000"  # PyTorch 2.11; with its stable interface one binary serves later releases too
COMPILE = ["-O3", f"-DTORCH_TARGET_VERSION={OLDEST}"]
WHEEL = {"bdist_wheel": {"py_limited_api": "cp310"}}


def check_setuptools(name: str) -> None:
    """Releases before 70.1 need the package wheel, which virtual environments do not have; pip's error hides that."""
    old = tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1)
    if old and find_spec("wheel") is None:
        sys.exit(
            f"{name}: error: setuptools {setuptools.__version__} cannot build wheels; pip install 'setuptools>=70.1'"
        )


def setup_for_cpus(package: str, description: str) -> None:
    """Set up ``package`` and its library, from ``csrc`` beside setup.py, with code for each instruction set."""
    check_setuptools(package)
    setuptools.setup(
        name=package,
        version="1.0.0",
        description=description,
        package_dir={"": "src"},
        packages=[package],
        ext_modules=[_cpu_extension(package)],
        cmdclass={"build_ext": Build},
        options=WHEEL,
    )


def _cpu_extension(package: str) -> CppExtension:
    shared = Path(__file__).parent / "csrc"
    return CppExtension(
        f"{package}._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        include_dirs=[str(shared)],
        # Hidden: both extensions have names such as swin::kAvx2, which a program that links both would mix up.
        extra_compile_args=[*COMPILE, "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"],
        py_limited_api=True,  # no file of a Python version: the library holds operators, no Python module
        depends=sorted(str(path) for folder in (Path("csrc"), shared) for path in folder.glob("*.h")),
    )


class Build(BuildExtension):
    """Ends with one line that says what to do, below the compiler's own."""

    advice = ""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as err:
            reason = str(err).splitlines()[0] if str(err) else type(err).__name__
            name = self.distribution.get_name()
            raise SystemExit(f"{name}: error: {reason}; the compiler's messages are above{self.advice}") from err
