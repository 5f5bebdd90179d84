"""What fused window attention is asked for, and whether it can. Windows of N tokens, nH heads of D channels."""

import importlib.util
import math
import os
from dataclasses import dataclass

import torch

from . import cpu

LARGEST_WINDOW, LARGEST_HEAD = 24, 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Geometry:
    """What a kernel is compiled for.

    ``shifted``: masks what the shift brings together; ``padded``: masks padding; ``precision``: of products of float32,
    ieee or tf32.
    """

    num_heads: int
    head_width: int
    window: tuple[int, int]
    shift: tuple[int, int]
    shifted: bool
    padded: bool
    cosine: bool
    dtype: torch.dtype
    precision: str

    @property
    def tokens(self) -> int:
        return math.prod(self.window)

    @property
    def whole(self) -> bool:
        return is_whole(self.window, self.head_width)

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        if self.whole:
            return power_of_2(self.tokens), power_of_2(self.tokens)
        wide = self.head_width > (32 if self.dtype == torch.float32 else 64)
        return (32, 32) if wide else (64, 32)

    def constants(self) -> dict:
        """The kernels' compile-time arguments."""
        return {
            "NUM_HEADS": self.num_heads,
            "D": self.head_width,
            "WINDOW_H": self.window[0],
            "WINDOW_W": self.window[1],
            "SHIFT_H": self.shift[0],
            "SHIFT_W": self.shift[1],
            "SHIFTED": self.shifted,
            "PADDED": self.padded,
            "COSINE": self.cosine,
            "EPS": max(1e-12, torch.finfo(self.dtype).tiny),  # as models.attention.prepare has it
            "PRECISION": self.precision,
            "UPCAST": INTERPRETED and self.dtype == torch.bfloat16,
            "BLOCK_M": self.blocks[0],
            "BLOCK_N": self.blocks[1],
            "BLOCK_D": power_of_2(self.head_width),
        }

    def options(self) -> dict:
        """How Triton compiles the kernels. Chosen so that registers suffice on sm_80 and sm_90; not yet timed."""
        exact = self.dtype == torch.float32 and self.precision == "ieee"  # no tensor cores, but many registers
        if self.whole:
            warps = {16: 2, 32: 4, 64: 16} if exact else {16: 1, 32: 2, 64: 4}
            return {"num_warps": warps[self.blocks[0]], "num_stages": 1 if exact else 2, "enable_fp_fusion": True}
        stages = 1 if exact or self.head_width > 64 else 2
        return {"num_warps": 8 if exact else 4, "num_stages": stages, "enable_fp_fusion": True}


def is_whole(window: tuple[int, int], head_width: int) -> bool:
    """Whether a window is one tile, the faster way; else it is cut into tiles of queries and keys."""
    return math.prod(window) <= 64 and head_width <= 32


def power_of_2(size: int) -> int:
    """The least power of 2 that is no less, and 16 at least, which Triton's products need."""
    return max(16, 1 << (size - 1).bit_length())


def products_are_tf32() -> bool:
    """Whether PyTorch's products of float32 may be of TF32, and so those of the kernels."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def unsupported(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> str:
    """Why the kernels cannot take such maps; empty where they can."""
    if dtype not in DTYPES:
        return f"{dtype} is not one of {', '.join(str(known) for known in DTYPES)}"
    if not 1 <= min(window) <= max(window) <= LARGEST_WINDOW:
        return f"windows of {window[0]}x{window[1]} are larger than {LARGEST_WINDOW}x{LARGEST_WINDOW}"
    if not all(0 <= by < side for by, side in zip(shift, window, strict=True)):
        return f"a shift of {shift[0]}x{shift[1]} is not within the window"
    if channels // num_heads > LARGEST_HEAD:
        return f"heads of {channels // num_heads} channels are wider than {LARGEST_HEAD}"
    if device.type == "cpu" and not INTERPRETED:
        return cpu.unsupported(dtype)
    return unsupported_device(device)


@torch.compiler.assume_constant_result  # compilers need not follow what it asks of the driver
def unsupported_device(device: torch.device) -> str:
    """Why Triton's kernels cannot run there; empty where they can."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu" and INTERPRETED:
        return ""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if torch.cuda.get_device_properties(device).major < 8:
        return "it needs a GPU of compute capability 8.0 or more"
    return ""


HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton reads it once too: kernels then run on a CPU, slowly.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
