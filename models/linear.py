"""Linear layers on CPUs on which something is faster than PyTorch's default library.

On Intel's with AVX-512 and AMD's without, that is this project's kernels, where they are built (kernels/linear): they
come nearer to what the processor can do, and compute GELU, forward and backward, while its numbers are in the cache, in
inference layer norms and residuals too. They are of float32, and under autocast, without gradients, of bfloat16 where
the processor has AMX.

On AMD's with AVX-512, for which the default library was not made and on which nobody has measured the kernels, it is
oneDNN, in half of the default's time. PyTorch has two ways to that. In training it is a 1x1 convolution of data whose
channels come last, which is the same product, gradients included. In inference it is the operator that torch.compile
uses, which has no gradient; it computes GELU on the way, and serves one thread as well, for which PyTorch does not give
convolutions to oneDNN.
"""

import platform
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kernels import linear as kernel

FEWEST_ROWS = 2  # for which the kernels are worth it; of one row PyTorch reads a weight as it lies
# Multiply-adds of a layer, and of an MLP's first, for which they are in training: its functions take longer to call.
LEAST_WORK, LEAST_WORK_OF_MLP = 1 << 24, 1 << 22


class Linear(nn.Linear):
    """``nn.Linear`` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, by the kernels or oneDNN where they are faster."""
    if takes_bfloats(x, weight, bias) and _is_enough(x, weight, LEAST_WORK, False):
        return kernel.linear(x.to(torch.bfloat16), weight, bias)
    if not _is_plain(x, weight):
        return F.linear(x, weight, bias)
    if kernel_is_faster() and _is_enough(x, weight, LEAST_WORK, _needs_grad(x, weight, bias)):
        return kernel.linear(x, weight, bias)
    if not takes_onednn():
        return F.linear(x, weight, bias)
    if not _needs_grad(x, weight, bias) and has_pointwise():
        return _pointwise(x, weight, bias, "none")
    rows = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # 1, C, 1, rows; in memory rows, C
    rows = F.conv2d(rows, weight[:, :, None, None], bias)
    return rows.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def mlp(x: Tensor, fc1: nn.Module, act: nn.Module, drop: nn.Dropout, fc2: nn.Module) -> Tensor:
    """``fc2(drop(act(fc1(x))))``, in one call of the kernels where nobody watches what is between."""
    if not fuses_mlp(x, fc1, act, drop, fc2):
        return fc2(drop(linear_act(x, fc1, act)))
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.bfloat16)
    return kernel.mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)


def fuses_mlp(x: Tensor, fc1: nn.Module, act: nn.Module, drop: nn.Dropout, fc2: nn.Module) -> bool:
    """Whether all of an MLP is one call of the kernels."""
    return (
        type(fc2) is Linear
        and type(drop) is nn.Dropout
        and not (is_hooked(fc2) or is_hooked(drop) or (drop.training and drop.p > 0))
        and _is_linear_gelu(fc1, act)
        and _takes_layers(x, fc1, fc2)
        and _is_enough(x, fc1.weight, LEAST_WORK_OF_MLP, _needs_grad(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias))
    )


def fuses_residual_mlp(
    x: Tensor, norm: nn.Module, drop_path: nn.Module, fc1: nn.Module, act: nn.Module, drop: nn.Dropout, fc2: nn.Module
) -> bool:
    """Whether ``x + drop_path(fc2(drop(act(fc1(norm(x))))))`` is one call of the kernels: in inference alone."""
    return (
        _may_join(x)
        and _joins_norm(x, norm)
        and passes(drop_path)
        and fuses_mlp(x, fc1, act, drop, fc2)
        and fc2.weight.shape[0] == x.shape[-1]
    )


def normed_linear(x: Tensor, norm: nn.Module, layer: nn.Module) -> Tensor:
    """``layer(norm(x))``, in one call where `joins` says so."""
    return kernel.joined_linear(x, norm, layer) if joins(x, layer, norm) else layer(norm(x))


def joins(x: Tensor, layer: nn.Module, norm: nn.Module | None = None) -> bool:
    """Whether ``norm`` before ``layer``, of rows like those of x, and a residual after it are part of its one call."""
    return (
        _may_join(x)
        and type(layer) is Linear
        and not is_hooked(layer)
        and _takes_layers(x, layer)
        and _is_enough(x, layer.weight, LEAST_WORK, False)
        and (norm is None or _joins_norm(x, norm))
    )


def _may_join(x: Tensor) -> bool:
    """Whether there are no gradients, and x is what layers multiply."""
    return not torch.is_grad_enabled() and (x.dtype == torch.bfloat16) == torch.is_autocast_enabled("cpu")


def _joins_norm(x: Tensor, norm: nn.Module) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and norm.normalized_shape == x.shape[-1:]
        and norm.bias is not None
        and not is_hooked(norm)
        and _is_on_cpu(x, norm.weight, norm.bias)
    )


def passes(drop: nn.Module) -> bool:
    """Whether a layer that drops something in training does nothing now, and nobody watches it."""
    drops = type(drop) in (nn.Dropout, DropPath) and not drop.training
    return (type(drop) is nn.Identity or drops) and not is_hooked(drop)


def _takes_layers(x: Tensor, *layers: nn.Module) -> bool:
    parts = [part for layer in layers for part in (layer.weight, layer.bias)]
    return takes_kernel(x, *parts) or takes_bfloats(x, *parts)


def takes_kernel(x: Tensor, *parts: Tensor | None) -> bool:
    """Whether the kernels multiply ``x`` by these weights, with these biases, in float32."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and _takes(x, *parts)


def takes_bfloats(x: Tensor, *parts: Tensor | None) -> bool:
    """Whether the kernels multiply ``x`` by these weights, with these biases, in bfloat16: without gradients."""
    return (
        autocasts_to_bfloats()
        and not torch.is_grad_enabled()
        and x.dtype in (torch.bfloat16, torch.float32)
        and _takes(x, *parts)
    )


def _takes(x: Tensor, *parts: Tensor | None) -> bool:
    return _is_on_cpu(x, *parts) and kernel_is_faster()


def autocasts_to_bfloats() -> bool:
    """Whether autocast asks for bfloat16 on a CPU for which the kernels have it."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16 and kernel.BFLOATS > 0


def linear_act(x: Tensor, layer: nn.Module, act: nn.Module) -> Tensor:
    """``act(layer(x))``, by oneDNN at once where this is a `Linear` and the exact GELU, and nobody watches between."""
    if not _is_linear_gelu(layer, act) or not _is_plain(x, layer.weight) or not takes_onednn():
        return act(layer(x))
    if _needs_grad(x, layer.weight, layer.bias) or not has_pointwise():
        return act(layer(x))
    return _pointwise(x, layer.weight, layer.bias, "gelu")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x`` (n, K) times ``weight`` (K, N), plus ``bias``, by oneDNN where that is faster; no gradients.

    Args:
        out: (n, N), where to write it.
    """
    if not (_is_plain(x, weight) and takes_onednn() and has_pointwise()):
        return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias, x, weight, out=out)
    y = _pointwise(x, weight.t(), bias, "none")
    return y if out is None else out.copy_(y)


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook of a module's own sees what goes in or comes out, or the gradients of either; or another forward
    has been put in the place of its class's."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def runs_plainly() -> bool:
    """Whether nobody records or replaces operators: no compiler, tracer, counter of operations or fake tensor."""
    if torch.compiler.is_compiling():  # first: a compiler must not see the rest
        return False
    return not torch.jit.is_tracing() and _get_current_dispatch_mode() is None


def computes_plainly() -> bool:
    """Whether numbers are computed here and now, by PyTorch itself; asked outside of compilers."""
    return runs_plainly() and is_untransformed()


def is_untransformed() -> bool:
    """Whether no transform of torch.func is under way, nor forward-mode derivatives; compilers may ask too."""
    return forward_ad._current_level < 0 and _has_no_level()


@torch.compiler.assume_constant_result  # compilers ask while they trace, within the transform
def _has_no_level() -> bool:
    return torch._C._functorch.maybe_current_level() is None


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a layer in float32 on a CPU, computed here and now or compiled for it."""
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and _is_on_cpu(x, weight)


def _is_on_cpu(x: Tensor, *parts: Tensor | None) -> bool:
    """Whether x and these weights and biases in float32 are on a CPU, computed here and now or compiled for it."""
    return (
        (torch.compiler.is_compiling() or runs_plainly())
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.numel() > 0
        and all(part is None or _is_part(part) for part in parts)
    )


def _is_part(part: Tensor) -> bool:
    return (
        part.device.type == "cpu"
        and part.dtype == torch.float32
        and part.layout == torch.strided
        and type(part) in (Tensor, nn.Parameter)  # not one that is quantised or sharded
        and part.numel() > 0
    )


def _is_enough(x: Tensor, weight: Tensor, least: int, trains: bool) -> bool:
    rows_are_enough = x.numel() >= FEWEST_ROWS * x.shape[-1]
    return rows_are_enough and (not trains or x.numel() * weight.shape[0] >= least)


def _is_linear_gelu(layer: nn.Module, act: nn.Module) -> bool:
    plain = type(layer) is Linear and type(act) is nn.GELU and act.approximate == "none"
    return plain and not is_hooked(layer) and not is_hooked(act)


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


def takes_onednn() -> bool:
    return (
        runs_plainly() and onednn_is_faster() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    )


def kernel_is_faster() -> bool:
    """Whether the kernels are built, this is a CPU on which they were measured, and derivatives are the usual ones.

    In compiled models too, but not in exported ones, which other programs run.
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and _kernel_serves() and is_untransformed()
    return _kernel_serves() and computes_plainly()


@torch.compiler.assume_constant_result  # a compiler is not to look into it
def _kernel_serves() -> bool:
    return not kernel.PROBLEM and is_amd() != has_avx512()


def onednn_is_faster() -> bool:
    """Whether this is an AMD CPU with AVX-512, which PyTorch's default library uses on Intel's alone.

    On AMD's CPUs without it the two are equal, but for GELU on the way, which is slower than after it.
    """
    return is_amd() and has_avx512()


@lru_cache
def is_amd() -> bool:
    path = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (path.read_text() if path.exists() else platform.processor())


@lru_cache
def has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
