"""Build window attention for CPUs: ``pip install ./kernels/window_attention --no-build-isolation`` from the root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import setup_for_cpus

setup_for_cpus("swin_window_attention", "Attention within shifted windows of maps on CPUs, forward and backward")
