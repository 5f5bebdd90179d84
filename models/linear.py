"""Linear layers whose float32 products on AMD's CPUs with AVX-512 are oneDNN's: PyTorch's default takes twice as long.

PyTorch has two ways to them. In training it is a 1x1 convolution of channels-last data, which is the same product,
gradients included. In inference it is the operator that torch.compile uses, which has no gradient; it computes GELU
on the way, and serves one thread as well, for which PyTorch does not give convolutions to oneDNN.
"""

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


class Linear(nn.Linear):
    """``nn.Linear`` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by oneDNN where that is faster."""
    if not _takes_onednn(x, weight):
        return F.linear(x, weight, bias)
    if not _needs_grad(x, weight, bias) and has_pointwise():
        return _pointwise(x, weight, bias, "none")
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # 1, C, 1, rows; in memory rows, C
    rows = F.conv2d(rows, weight[:, :, None, None], bias)
    return rows.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def linear_act(x: Tensor, layer: nn.Module, act: nn.Module) -> Tensor:
    """``act(layer(x))``, at once where this is a `Linear` and the exact GELU, and nobody watches what is between."""
    plain = type(layer) is Linear and type(act) is nn.GELU and act.approximate == "none"
    if not plain or is_hooked(layer) or is_hooked(act) or not _takes_onednn(x, layer.weight):
        return act(layer(x))
    if _needs_grad(x, layer.weight, layer.bias) or not has_pointwise():
        return act(layer(x))
    return _pointwise(x, layer.weight, layer.bias, "gelu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x`` (n, K) times ``weight`` (K, N), plus ``bias``, by oneDNN where that is faster; no gradients.

    Args:
        out: (n, N), where to write it.
    """
    if not (_takes_onednn(x, weight) and has_pointwise()):
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
    y = _pointwise(x, weight.t(), bias, "none")
    return y if out is None else out.copy_(y)


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of a module's own sees what goes in or comes out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def runs_plainly() -> bool:
    """Whether nobody records or replaces operators: no compiler, tracer, counter of operations or fake tensor."""
    if torch.compiler.is_compiling():  # first: a compiler must not see the rest
        return False
    return not torch.jit.is_tracing() and _get_current_dispatch_mode() is None


def _takes_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        runs_plainly()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)  # not one that is quantised or sharded
        and x.numel() > 0
        and onednn_is_faster()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


def _needs_grad(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:  # tangents flow without grad mode too
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


@lru_cache
def has_pointwise() -> bool:
    """Whether PyTorch's private operator is there, and does on small numbers what is expected of it."""
    x, weight, bias = torch.linspace(-3, 3, 6).view(2, 3), torch.linspace(-1, 1, 12).view(4, 3), torch.linspace(0, 1, 4)
    expected = F.linear(x, weight, bias)
    try:
        with torch.no_grad():
            pairs = [
                (_pointwise(x, weight, bias, "none"), expected),
                (_pointwise(x, weight, None, "none"), expected - bias),
                (_pointwise(x, weight, bias, "gelu"), F.gelu(expected)),
            ]
    except (AttributeError, RuntimeError, TypeError):  # another build or version of PyTorch
        return False
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@lru_cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, which PyTorch's default library uses on Intel's alone.

    On AMD's CPUs without it the two are equal, but for GELU on the way, which is slower than after it.
    """
    path = Path("/proc/cpuinfo")
    amd = "AuthenticAMD" in (path.read_text() if path.exists() else platform.processor())
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"
