"""Window attention on maps in image order. B maps of H x W, nW windows of N tokens, nH heads of d = C / nH channels.

Linear layers act on each token alone, so they never see windows. Only `window_attention` does: it takes packed
q, k, v in image order and gives the mixed values back in image order, so that a backend is free to roll and cut copies
(``reference``, ``sdpa``; ``window_process`` in one go) or to address the map in place (``fused``). ``auto`` takes what
is correct and, on a GPU, what a `trial` has found to be the fastest.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import window_attention as fused
from kernels import window_process

from . import trial
from .layers import Pair, check_window, padded_resolution, relative_position_index
from .linear import Linear, computes_plainly, is_hooked, is_untransformed, passes, runs_plainly


def attention_weights(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + bias + mask), (B, nW, nH, N, N), in the official order of operations."""
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    if mask is not None:
        logits = logits + mask.unsqueeze(1)
    return logits.softmax(-1)


def attend_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """softmax(scale q k^T + bias + mask) v in the official order of operations (paper, equation 4).

    Args:
        q, k, v: (B, nW, nH, N, d).
        bias: (nH, N, N), for every window.
        mask: (nW, N, N) for each kind of window, or None.

    Returns:
        (B, nW, nH, N, d).
    """
    return F.dropout(attention_weights(q, k, bias, mask, scale), dropout_p) @ v


def attend_sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """As `attend_reference`, by PyTorch's scaled_dot_product_attention."""
    shape = q.shape
    if mask is None:  # windows are alike: they join the batch, and the bias is broadcast
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # B * nW, nH, N, d
        logits_bias = bias.unsqueeze(0)
    else:  # windows differ: they join the heads, so that no mask is copied for every map of the batch
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))  # B, nW * nH, N, d
        logits_bias = (bias + mask.unsqueeze(1)).flatten(0, 1).unsqueeze(0)  # 1, nW * nH, N, N
    # Another dtype than q's would silently give wrong results in some CUDA kernels.
    logits_bias = logits_bias.to(q.dtype)
    if q.is_cuda:  # flash takes no bias, and cuDNN can return NaN gradients for windows of 64 tokens
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            x = F.scaled_dot_product_attention(q, k, v, logits_bias, dropout_p, scale=scale)
    else:
        x = F.scaled_dot_product_attention(q, k, v, logits_bias, dropout_p, scale=scale)
    return x.view(shape)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T + bias) v of windows on a CPU: (nW, nH, N, d), in any memory order, to (nW, N, nH, d)."""
    bias = bias.view(-1, *bias.shape[-3:]).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2)


@lru_cache(maxsize=32)  # two for each stage and size of image
def window_order(
    resolution: tuple[int, int], window_size: tuple[int, int], shift_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """For each token of a map in the order of windows its place on the map, and the inverse; each (H * W), int64."""
    H, W = resolution
    with torch.inference_mode(False):
        places = torch.arange(H * W, device="cpu").view(1, H, W, 1)
        order = window_process.partition_reference(places, window_size, shift_size).flatten()
        return order, order.argsort()


def attend_either(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout_p: float = 0.0
) -> Tensor:
    """`attend_sdpa` where it is fast and correct, else `attend_reference`."""
    name = faster_on_windows(q.device, q.dtype, torch.is_grad_enabled(), grid_size(q, mask))
    return ATTEND[name](q, k, v, bias, mask, scale, dropout_p)


ATTEND: dict[str, Callable[..., Tensor]] = {
    "reference": attend_reference,
    "sdpa": attend_sdpa,
    "window_process": attend_either,  # on windows that the extension in kernels/window_process cuts and merges
}


BACKENDS = ("auto", *ATTEND, "fused")  # the kernels in kernels/window_attention, which cut no windows


def check_backend(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"MODEL.ATTENTION_BACKEND={name!r}; choose from {list(BACKENDS)}")
    return name


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, needs_grad: bool, grid: int = 1) -> str:
    """What ``auto`` stands for on this device, for this dtype and size of SDPA's batch or heads (`grid_size`)."""
    return faster_on_windows(device, dtype, needs_grad, grid) if name == "auto" else name


def faster_on_windows(device: torch.device, dtype: torch.dtype, needs_grad: bool, grid: int) -> str:
    """``sdpa`` where it is fast and correct on windows that are cut, else ``reference``."""
    if (
        device.type == "cpu"
        and dtype in (torch.bfloat16, torch.float16)
        and (needs_grad or torch.compiler.is_compiling())
    ):
        # SDPA's half-precision backward on CPU takes twice the time of plain products, and its forward twice the time
        # of those that a compiler fuses with bias, mask and softmax.
        return "reference"
    if device.type == "cuda" and grid >= 65536:
        return "reference"  # the CUDA kernels' grids end there
    return "sdpa"


def takes_fused(
    name: str,
    qkv: Tensor,
    mask: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    dropout_p: float,
) -> bool:
    """Whether the fused kernels attend, by ``name``. ``ValueError`` where they are asked to but cannot."""
    if name != "fused":
        return False
    problem = f"it has no dropout of attention (attn_drop={dropout_p})" if dropout_p else ""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        problem = "it has no forward-mode derivatives"
    problem = problem or fused_problem(qkv.device, qkv.dtype, qkv.shape, mask is not None, num_heads, window, shift)
    if problem:
        raise ValueError(f"MODEL.ATTENTION_BACKEND='fused': {problem}; choose auto")
    return True


def fused_problem(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    masked: bool,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
) -> str:
    """Why the fused kernels cannot attend in maps of ``shape``, that of qkv; empty where they can."""
    padded = padded_resolution(shape[1:3], window) != tuple(shape[1:3])
    if padded and not masked:
        return "maps that are padded need their window_mask"
    if masked and not padded and not any(shift):
        return "it makes its masks itself and takes no other"
    return fused.unsupported(device, dtype, shape[3] // 3, num_heads, window, shift)


@torch.compiler.assume_constant_result  # compilers run it while they trace, and keep the answer
def fastest_backend(*kind) -> str:
    """What ``auto`` stands for in a `trial.Call` of this kind, of plain values that compilers know."""
    call = trial.Call(*kind).in_trial()
    cannot = fused_problem(call.device, call.dtype, call.shape, call.masked, call.num_heads, call.window, call.shift)
    rivals = () if cannot else ("fused",)
    if window_process.is_built_for(call.device):
        rivals += ("window_process",)
    B, *resolution, _ = call.shape
    windows = math.prod(padded_resolution(resolution, call.window)) // math.prod(call.window)
    grid = windows * (call.num_heads if call.masked else B)
    default = faster_on_windows(call.device, call.dtype, call.needs_grad, grid)
    return trial.fastest(window_attention, call, default, rivals)


def fuses_on_cpu(qkv: Tensor) -> bool:
    """Whether ``auto`` prefers the kernel for CPUs: where it is built, not in exported, traced or counted models."""
    if qkv.device.type != "cpu" or not fused.serves_cpu(qkv.dtype):
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting() and is_untransformed()
    return type(qkv) is Tensor and computes_plainly()


def grid_size(q: Tensor, mask: Tensor | None) -> int:
    """How large the batch or, with a mask, the heads get that `attend_sdpa` makes of (B, nW, nH, N, d)."""
    B, nW, num_heads = q.shape[:3]
    return B * nW if mask is None else nW * num_heads


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    num_heads: int,
    window_size: Pair,
    shift_size: Pair = 0,
    scale: float,
    logit_scale: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention within (shifted) windows of a map.

    Args:
        qkv: (B, H, W, 3C), for each token its q, k and v, each split into heads.
        bias: (nH, N, N), added to the logits of every window.
        mask: (nW, N, N), the `window_mask` of a map that is shifted or padded; else None.
        shift_size: how far windows begin below and right of the map's corner; they wrap around.
        logit_scale: (nH, 1, 1), for cosine attention (SwinV2, equation 2): q and k are normalised, then q is
            multiplied by it.

    Returns:
        (B, H, W, C), in image order.
    """
    resolution, window = tuple(qkv.shape[1:3]), to_2tuple(window_size)
    shift = to_2tuple(shift_size)
    if backend == "auto" and not dropout_p:
        sizes = (num_heads, window, shift, mask is not None, logit_scale is not None, scale)
        kind = trial.kind_of(qkv, bias, *sizes)
        if kind is not None:
            backend = fastest_backend(*kind)
        elif fuses_on_cpu(qkv) and not fused_problem(
            qkv.device, qkv.dtype, qkv.shape, mask is not None, num_heads, window, shift
        ):
            backend = "fused"
    if takes_fused(backend, qkv, mask, num_heads, window, shift, dropout_p):
        return fused.attend(qkv, bias, logit_scale, num_heads, window, shift, mask is not None, scale)
    partition, merge = window_process.partition_reference, window_process.merge_reference
    if backend == "window_process" and window_process.is_built_for(qkv.device):
        partition, merge = window_process.partition, window_process.merge
    q, k, v = windowed_qkv(qkv, num_heads, window, shift_size, logit_scale, partition)
    backend = resolve_backend(backend, qkv.device, qkv.dtype, torch.is_grad_enabled(), grid_size(q, mask))
    x = ATTEND[backend](q, k, v, bias, mask, scale, dropout_p)
    H, W = padded_resolution(resolution, window)
    x = merge(x.unsqueeze(0), (H, W), window, shift_size)
    return x if resolution == (H, W) else x[:, : resolution[0], : resolution[1]]


def windowed_qkv(
    qkv: Tensor,
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: Pair,
    logit_scale: Tensor | None = None,
    partition: Callable[..., Tensor] = window_process.partition_reference,
) -> tuple[Tensor, Tensor, Tensor]:
    """The q, k and v of each window, (B, nW, nH, N, d): pad a map (B, H, W, 3C), shift and cut it, prepare q and k."""
    H, W = padded_resolution(qkv.shape[1:3], window_size)
    if tuple(qkv.shape[1:3]) != (H, W):
        qkv = pad_map(qkv, (H, W))
    q, k, v = partition(qkv, window_size, shift_size, parts=3, heads=num_heads).unbind(0)
    return (*prepare(q, k, logit_scale), v)


def prepare(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k as they are multiplied: themselves, or of unit length for cosine attention, q times its scale."""
    if logit_scale is None:
        return q, k
    eps = max(1e-12, torch.finfo(q.dtype).tiny)  # in float16 the usual 1e-12 is 0, and padding would be 0 / 0
    return (F.normalize(q, dim=-1, eps=eps) * logit_scale).to(q.dtype), F.normalize(k, dim=-1, eps=eps).to(k.dtype)


def pad_map(x: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Zeros at the bottom and right of a map (B, H, W, C), up to ``resolution``. A mask must hide them."""
    return F.pad(x, (0, 0, 0, resolution[1] - x.shape[2], 0, resolution[0] - x.shape[1]))


class AttentionBase(nn.Module):
    """What window attention modules share. A subclass creates its bias, then calls `add_projections`.

    Args:
        window_size: (height, width), or one number for both.
    """

    backend = "auto"
    scale = 1.0

    def __init__(self, dim: int, window_size: Pair, num_heads: int):
        super().__init__()
        self.dim = dim
        self.window_size = to_2tuple(window_size)
        self.num_heads = num_heads
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))

    def add_projections(self, qkv_bias: bool, attn_drop: float, proj_drop: float) -> None:
        """The layers around the attention. After the bias: the order of creation decides the initial weights."""
        self.qkv = Linear(self.dim, self.dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(self.dim, self.dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def bias_table(self) -> Tensor:
        """The bias of each relative position, ((2h - 1) * (2w - 1), nH)."""
        raise NotImplementedError

    def fit_bias(self, window_size: tuple[int, int]) -> None:
        """Make the bias, learnt on ``self.window_size``, one of ``window_size``."""
        raise NotImplementedError

    def packed_qkv(self, x: Tensor) -> Tensor:
        """(..., C) to (..., 3C)."""
        return self.qkv(x)

    def cosine_scale(self) -> Tensor | None:
        """(nH, 1, 1) where attention is by cosine; None where it is by scaled products."""
        return None

    @property
    def dropout_p(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def position_bias(self) -> Tensor:
        """(nH, N, N)."""
        # An embedding's backward is deterministic; that of plain indexing adds in any order, on CPU too.
        bias = F.embedding(self.relative_position_index, self.bias_table())  # N, N, nH
        return bias.permute(2, 0, 1).contiguous()

    def set_window_size(self, window_size: Pair) -> None:
        """Attend within windows of another size from now on; what was learnt of relative positions is resized."""
        window_size = to_2tuple(window_size)
        if window_size == self.window_size:
            return
        self.fit_bias(window_size)
        self.window_size = window_size
        self.relative_position_index = relative_position_index(window_size).to(self.relative_position_index.device)

    def forward(self, x: Tensor, mask: Tensor | None = None, shift_size: Pair = 0) -> Tensor:
        """Attend within windows.

        Args:
            x: windows that are cut already (B * nW, N, C), as officially, or maps in image order (B, H, W, C).
            mask: (nW, N, N), what to add to the logits of each kind of window, or None. For maps that are shifted, or
                no whole number of windows, their `layers.window_mask`, which fused kernels make by themselves.
            shift_size: of the windows of maps.

        Returns:
            What ``x`` is, in shape and order.
        """
        if x.ndim == 3:
            return self._forward_windows(x, mask)
        if mask is None:
            check_window(tuple(x.shape[1:3]), self.window_size)
        if self._gathers(x):
            return self._forward_gathered(x, mask, to_2tuple(shift_size))
        # Not by `attend`: within one more function PyTorch's compiler has a longer error for tangents, which it lacks.
        x = window_attention(self.packed_qkv(x), self.position_bias(), mask, **self._arguments(shift_size))
        return self.proj_drop(self.proj(x))

    def attend(self, qkv: Tensor, mask: Tensor | None, shift_size: Pair) -> Tensor:
        """`forward` of maps between its linear layers: (B, H, W, 3C) to (B, H, W, C)."""
        return window_attention(qkv, self.position_bias(), mask, **self._arguments(shift_size))

    def _arguments(self, shift_size: Pair) -> dict[str, Any]:
        """Those of `window_attention` for windows with this shift."""
        return {
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "shift_size": shift_size,
            "scale": self.scale,
            "logit_scale": self.cosine_scale(),
            "dropout_p": self.dropout_p,
            "backend": self.backend,
        }

    def may_be_taken_apart(self, x: Tensor) -> bool:
        """Whether `attend` between ``qkv`` and ``proj`` is all that `forward` does with maps x, and nobody watches."""
        return (
            type(self).forward is AttentionBase.forward
            and type(self).packed_qkv is AttentionBase.packed_qkv
            and not is_hooked(self)
            and passes(self.proj_drop)
            and not self._gathers(x)
        )

    def _gathers(self, x: Tensor) -> bool:
        """Whether `_forward_gathered` serves maps: in inference on a CPU, where nobody watches the linear layers."""
        return (
            runs_plainly()
            and x.device.type == "cpu"
            and x.numel() > 0
            and not torch.is_grad_enabled()
            and (self.backend == "sdpa" or (self.backend == "auto" and not self._fuses(x)))
            and self.dropout_p == 0.0
            and padded_resolution(x.shape[1:3], self.window_size) == tuple(x.shape[1:3])
            and not any(is_hooked(layer) for layer in (self.qkv, self.proj, self.proj_drop))
        )

    def _fuses(self, x: Tensor) -> bool:
        """Whether ``auto`` has a kernel for maps like these on a CPU."""
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        geometry = (self.dim, self.num_heads, self.window_size, (0, 0))
        return fused.serves_cpu(dtype) and not fused.unsupported(x.device, dtype, *geometry)

    def _forward_gathered(self, x: Tensor, mask: Tensor | None, shift_size: tuple[int, int]) -> Tensor:
        """`forward` of maps with a tenth of the copying: tokens go to their windows, and back, as whole rows.

        Linear layers act on each token alone, so they take tokens in any order; SDPA reads q, k and v where they lie.
        """
        B, H, W, C = x.shape
        order, back = window_order((H, W), self.window_size, shift_size)
        N = math.prod(self.window_size)
        x = x.reshape(B, H * W, C).index_select(1, order)
        qkv = self.packed_qkv(x).view(B, -1, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # each B, nW, nH, N, d
        q, k = prepare(q, k, self.cosine_scale())
        bias = self.position_bias()
        if mask is None:
            x = sdpa(*(each.flatten(0, 1) for each in (q, k, v)), bias, self.scale)
        else:  # windows differ: one image at a time, so that no mask is copied for every image
            bias = bias + mask.unsqueeze(1)  # nW, nH, N, N
            x = torch.stack([sdpa(*image, bias, self.scale) for image in zip(q, k, v, strict=True)])
        x = self.proj_drop(self.proj(x.view(B, H * W, C)))
        return x.index_select(1, back).view(B, H, W, C)

    def _forward_windows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.backend == "fused":
            raise ValueError("MODEL.ATTENTION_BACKEND='fused': it takes maps, not windows that are cut; choose auto")
        windows, N, C = x.shape
        kinds = 1 if mask is None else mask.shape[0]
        qkv = self.packed_qkv(x).view(windows // kinds, kinds, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).contiguous().unbind(0)  # each B, nW, nH, N, d
        q, k = prepare(q, k, self.cosine_scale())
        backend = resolve_backend(self.backend, q.device, q.dtype, torch.is_grad_enabled(), grid_size(q, mask))
        x = ATTEND[backend](q, k, v, self.position_bias(), mask, self.scale, self.dropout_p)
        return self.proj_drop(self.proj(x.transpose(2, 3).reshape(windows, N, C)))

    @torch.no_grad()
    def weights(self, x: Tensor, mask: Tensor | None = None, shift_size: Pair = 0) -> Tensor:
        """How much each token of a window attends to each: maps (B, H, W, C) to (B, nW, nH, N, N)."""
        q, k, _ = windowed_qkv(self.packed_qkv(x), self.num_heads, self.window_size, shift_size, self.cosine_scale())
        return attention_weights(q, k, self.position_bias(), mask, self.scale)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}"

    def flops(self, N: int) -> int:
        """Multiply-adds of one window of N tokens, counted as officially."""
        projections = 4 * N * self.dim * self.dim
        products = 2 * self.num_heads * N * N * (self.dim // self.num_heads)
        return projections + products


def set_attention_backend(model: nn.Module, name: str) -> None:
    """Choose the backend of every window attention in ``model``: one of `BACKENDS`."""
    check_backend(name)
    for module in model.modules():
        if isinstance(module, AttentionBase):
            module.backend = name
