"""Build linear layers for CPUs: ``pip install ./kernels/linear --no-build-isolation`` from the root."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from building import setup_for_cpus

setup_for_cpus("swin_linear", "Linear layers and MLPs on CPUs, forward and backward")
