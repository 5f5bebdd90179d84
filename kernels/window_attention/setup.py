"""Build window attention for CPUs: ``pip install ./kernels/window_attention --no-build-isolation`` from the root."""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import WHEEL, Build, check_setuptools, cpu_extension

check_setuptools("swin_window_attention")
setup(
    name="swin_window_attention",
    version="1.0.0",
    description="Attention within shifted windows of maps on CPUs, forward and backward",
    package_dir={"": "src"},
    packages=["swin_window_attention"],
    ext_modules=[cpu_extension("swin_window_attention")],
    cmdclass={"build_ext": Build},
    options=WHEEL,
)
