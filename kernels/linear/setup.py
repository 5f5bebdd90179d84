"""Build linear layers for CPUs: ``pip install ./kernels/linear --no-build-isolation`` from the root."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import WHEEL, Build, check_setuptools, cpu_extension

check_setuptools("swin_linear")
setup(
    name="swin_linear",
    version="1.0.0",
    description="Linear layers and MLPs on CPUs, forward and backward",
    package_dir={"": "src"},
    packages=["swin_linear"],
    ext_modules=[cpu_extension("swin_linear")],
    cmdclass={"build_ext": Build},
    options=WHEEL,
)
