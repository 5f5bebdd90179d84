"""Autocast on CPUs without instructions for its precision: there float32 is several times as fast, and more exact.

PyTorch computes products of bfloat16 and float16 on any CPU, but on x86 without AVX-512 (for float16, without its own
instructions) one number at a time. Models compute in float32 there, whatever autocast asks for.
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _lacking() -> frozenset[torch.dtype]:
    """The types whose products are slow on this CPU."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    try:
        return frozenset(dtype for dtype, name in known.items() if not getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # not public: another build or release may not have it
        return frozenset()


LACKING = _lacking()


def is_emulated(device_type: str) -> bool:
    """Whether autocast is on there, for a type that the CPU lacks."""
    return device_type == "cpu" and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") in LACKING


def in_native_precision(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's ``forward`` of images that runs in float32 where autocast would be emulated; it gives float32 then."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_emulated(x.device.type) or next(self.parameters()).dtype != torch.float32:
            return forward(self, x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return forward(self, x.float() if x.is_floating_point() else x, *args, **kwargs)

    return run
