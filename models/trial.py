"""Which backend of window attention is the fastest: tried on the device at hand, once for each kind of call.

As cudnn.benchmark does for convolutions. A trial runs PyTorch's path and its rivals on random maps of the call's sizes,
forward, or forward and backward where gradients are needed. A rival is taken where its results are PyTorch's within
rounding and it is faster by `MARGIN`; one that fails in any way is not. The log says so once. Each process decides for
itself, and close calls may end differently in another run; a backend that is named is never tried.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kernels import window_attention as fused

from .layers import window_mask
from .linear import computes_plainly

logger = logging.getLogger(__name__)

MARGIN = 1.05
LARGEST = 2**25  # numbers of a trial's q, k and v, or scores: they keep a large GPU busy, in 64 MB of bfloat16
ROUNDS, REPEATS = 5, 4
# Of the largest difference to the largest number: both sides are rounded. A wrong address makes 0.1 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
TF32 = 1e-2  # for float32 where products may be of TF32

Attend = Callable[..., Tensor]  # models.attention.window_attention
Passes = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Call:
    """A kind of call of `models.attention.window_attention`: all that may change which backend is fastest.

    ``shape``: of qkv, (B, H, W, 3C); ``masked``: with a `window_mask`; ``compiled``: within what torch.compile makes.
    """

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype
    shape: tuple[int, ...]
    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    masked: bool
    cosine: bool
    scale: float
    needs_grad: bool
    autocast: bool
    compiled: bool

    def __str__(self) -> str:
        B, H, W, C3 = self.shape
        shift = f" shifted by {self.shift[0]}x{self.shift[1]}" if any(self.shift) else ""
        return (
            f"attention in {B} maps of {H}x{W}, windows of {self.window[0]}x{self.window[1]}{shift}, {self.num_heads} "
            f"heads of {C3 // (3 * self.num_heads)}{', cosine' if self.cosine else ''}, {self.dtype}, forward"
            f"{' and backward' if self.needs_grad else ''}{', compiled' if self.compiled else ''}"
        )

    def in_trial(self) -> "Call":
        """With the power of 2 that stands for batches like this one; `LARGEST` bounds it."""
        B, H, W, C3 = self.shape
        most = LARGEST // (H * W * max(C3, self.num_heads * math.prod(self.window)))
        return replace(self, shape=(1 << max(1, min(B, most)).bit_length() - 1, H, W, C3))


def kind_of(
    qkv: Tensor,
    bias: Tensor,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    masked: bool,
    cosine: bool,
    scale: float,
) -> tuple | None:
    """The fields of a `Call`, all of them plain values; None where a trial is out of the question. Compilers trace it.

    It is while operators are recorded or replaced (tracers, fake tensors, counters, torch.func), and where a compiler
    leaves the size of maps open, not only that of the batch.
    """
    if not is_wanted(qkv.device) or type(qkv) is not Tensor:
        return None
    compiled = torch.compiler.is_compiling()
    if not (compiled or computes_plainly()):
        return None
    shape = _known_sizes(qkv) if compiled else tuple(qkv.shape)
    if 0 in shape:
        return None
    needs_grad = torch.is_grad_enabled() and (qkv.requires_grad or bias.requires_grad)
    autocast = torch.is_autocast_enabled(qkv.device.type)
    sizes = (num_heads, window, shift, masked, cosine, scale)
    return (qkv.device, qkv.dtype, bias.dtype, shape, *sizes, needs_grad, autocast, compiled)


def _known_sizes(qkv: Tensor) -> tuple[int, ...]:
    """The shape; of a batch that a compiler leaves open, more maps than a trial takes; no maps where it leaves more."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # it takes a moment, but compilers have it

    B, *sizes = qkv.shape
    if not all(has_static_value(size) for size in sizes):
        return (0, 0, 0, 0)
    return (B if has_static_value(B) else LARGEST, *sizes)


def time_on_cuda(passes: Passes) -> dict[str, float]:
    """Milliseconds of each pass: the least of some rounds, in which they take turns."""
    taken = dict.fromkeys(passes, math.inf)
    torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for name, run in passes.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(REPEATS):
                run()
            ended.record()
            ended.synchronize()
            taken[name] = min(taken[name], began.elapsed_time(ended) / REPEATS)
    return taken


CLOCKS: dict[str, Callable[[Passes], dict[str, float]]] = {"cuda": time_on_cuda}  # by the type of device
CHOSEN: dict[tuple, str] = {}


def outcomes() -> dict[str, int]:
    """How many kinds of call each backend has won so far."""
    return dict(Counter(CHOSEN.values()))


def is_wanted(device: torch.device) -> bool:
    """Whether `fastest` tries anything there. Not where every run must give the same bits: trials may differ."""
    return device.type in CLOCKS and not torch.are_deterministic_algorithms_enabled()


def fastest(attend: Attend, call: Call, default: str, rivals: tuple[str, ...]) -> str:
    """One of ``rivals`` that a trial has found to be faster than ``default``, PyTorch's path; else ``default``.

    Nothing is tried for exported programs, which run elsewhere, nor while a CUDA graph is captured, which uses what was
    found before.
    """
    if not rivals or torch.compiler.is_exporting():
        return default
    key = (call, default, rivals)
    if key not in CHOSEN and not _is_captured(call.device):
        # In a thread of its own no mode of the caller's reaches it: autocast, inference mode, hooks on saved tensors.
        with ThreadPoolExecutor(1) as thread:
            CHOSEN[key] = thread.submit(_try, attend, *key).result()
    return CHOSEN.get(key, default)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(attend: Attend, call: Call, default: str, rivals: tuple[str, ...]) -> str:
    try:
        # A thread begins on the first GPU, whichever is its parent's.
        with torch.cuda.device(call.device) if call.device.type == "cuda" else nullcontext():
            name, facts = _compare(attend, call, default, rivals)
    except Exception as err:  # such as no memory for the trial
        name, facts = default, [_reason(err)]
    logger.info(f"{call}: {name} is taken ({'; '.join(facts)})")
    return name


def _compare(attend: Attend, call: Call, default: str, rivals: tuple[str, ...]) -> tuple[str, list[str]]:
    """The name of the fastest that is correct, and what was found."""
    inputs, able, facts = _draw(call), [], []
    expected = _run(attend, call, inputs, default)
    for name in rivals:
        try:
            error = _largest_difference(_run(attend, call, inputs, name), expected)
        except Exception as err:  # of many kinds, from a missing compiler to too little shared memory
            facts.append(f"{name} fails: {_reason(err)}")
            continue
        if error <= _tolerance(call.dtype):
            able.append(name)
        else:
            facts.append(f"{name} differs by {error:.1e}")
    if not able:
        return default, facts
    passes = {name: partial(_run, attend, call, inputs, name) for name in able}
    passes[default] = partial(_run, attend, _as_compiled(call), inputs, default)
    taken = CLOCKS[call.device.type](passes)
    best = min(able, key=taken.__getitem__)
    facts += [f"{name} {milliseconds:.3f} ms" for name, milliseconds in taken.items()]
    return best if taken[best] * MARGIN < taken[default] else default, facts


def _as_compiled(call: Call) -> Call:
    """A compiler makes one copy of a roll, a normalisation and the partition: PyTorch's path is timed without these."""
    return replace(call, shift=(0, 0), cosine=False) if call.compiled else call


def _draw(call: Call) -> dict[str, Tensor | None]:
    """Random inputs, by a generator of their own: the caller's draws stay what they are."""
    N, generator = math.prod(call.window), torch.Generator(call.device).manual_seed(0)
    kind = {"device": call.device, "generator": generator}
    mask = window_mask(call.shape[1:3], call.window, call.shift) if call.masked else None
    inputs = {
        "qkv": torch.randn(call.shape, dtype=call.dtype, **kind),
        "bias": torch.randn(call.num_heads, N, N, dtype=call.bias_dtype, **kind),
        "logit_scale": torch.full((call.num_heads, 1, 1), 10.0, device=call.device) if call.cosine else None,
    }
    for x in inputs.values():
        if x is not None:
            x.requires_grad_(call.needs_grad)
    grad = torch.randn(*call.shape[:3], call.shape[3] // 3, dtype=call.dtype, **kind)
    return {**inputs, "mask": mask if mask is None else mask.to(call.device, call.bias_dtype), "grad": grad}


def _run(attend: Attend, call: Call, inputs: dict[str, Tensor | None], backend: str) -> Iterable[Tensor]:
    """The output, and where they are needed the gradients of the inputs that there are."""
    qkv, bias, mask = inputs["qkv"], inputs["bias"], inputs["mask"]
    logit_scale = inputs["logit_scale"] if call.cosine else None
    sizes = {"num_heads": call.num_heads, "window_size": call.window, "shift_size": call.shift, "scale": call.scale}
    autocast = torch.autocast(call.device.type, call.dtype, enabled=call.autocast)
    with torch.set_grad_enabled(call.needs_grad), autocast:
        out = attend(qkv, bias, mask, **sizes, logit_scale=logit_scale, backend=backend)
    if not call.needs_grad:
        return (out,)
    leaves = [x for x in (qkv, bias, logit_scale) if x is not None]
    return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"]))


def _largest_difference(results: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """Of any number, to the largest of its tensor; NaN where there is one."""
    pairs = [(ours.float(), theirs.float()) for ours, theirs in zip(results, expected, strict=True)]
    errors = [(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in pairs]
    return torch.stack(errors).max().item()


def _tolerance(dtype: torch.dtype) -> float:
    return TF32 if dtype == torch.float32 and fused.products_are_tf32() else TOLERANCE[dtype]


def _reason(err: Exception) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())[:200]}"
