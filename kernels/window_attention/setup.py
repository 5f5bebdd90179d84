"""Build window attention for CPUs: ``pip install ./kernels/window_attention --no-build-isolation`` from the root."""

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import CppExtension

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import COMPILE, WHEEL, Build, check_setuptools

check_setuptools("swin_window_attention")
setup(
    name="swin_window_attention",
    version="1.0.0",
    description="Attention within shifted windows of maps on CPUs, forward and backward",
    package_dir={"": "src"},
    packages=["swin_window_attention"],
    ext_modules=[
        CppExtension(
            "swin_window_attention._C",
            [f"csrc/{name}.cpp" for name in ("operators", "plain", "avx2", "avx512")],
            extra_compile_args=[*COMPILE, "-ffp-contract=fast"],
            py_limited_api=True,  # no file of a Python version: the library holds operators, no Python module
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        )
    ],
    cmdclass={"build_ext": Build},
    options=WHEEL,
)
