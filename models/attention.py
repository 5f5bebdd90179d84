"""Window attention on maps in image order. B maps of H x W, nW windows of N tokens, nH heads of d = C / nH channels.

Linear layers act on each token alone, so they never see windows. Only `window_attention` does: it takes packed
q, k, v in image order and gives the mixed values back in image order, so that a backend is free to roll and cut copies
(``reference``, ``sdpa``) or to address the map in place.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layers import Pair


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
    logits = (q * scale) @ k.transpose(-2, -1) + bias
    if mask is not None:
        logits = logits + mask.unsqueeze(1)
    return F.dropout(logits.softmax(-1), dropout_p) @ v


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


ATTEND: dict[str, Callable[..., Tensor]] = {"reference": attend_reference, "sdpa": attend_sdpa}


def check_backend(name: str) -> str:
    if name not in ("auto", *ATTEND):
        raise ValueError(f"MODEL.ATTENTION_BACKEND={name!r}; choose from {['auto', *ATTEND]}")
    return name


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, needs_grad: bool, windows: int = 1) -> str:
    """What ``auto`` stands for on this device, for this dtype and number of windows in a batch."""
    if name != "auto":
        return name
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and needs_grad:
        return "reference"  # SDPA's half-precision backward on CPU takes twice the time of plain products
    if device.type == "cuda" and windows >= 65536:
        return "reference"  # the CUDA kernels' grids end there
    return "sdpa"


def window_attention(
    qkv: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    *,
    num_heads: int,
    window_size: Pair,
    shift_size: Pair = 0,
    scale: float,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention within (shifted) windows of a map.

    Args:
        qkv: (B, H, W, 3C), for each token its q, k and v, each split into heads.
        bias: (nH, N, N), added to the logits of every window.
        mask: (nW, N, N), the `shift_mask` of a shifted map; None without a shift.
        shift_size: how far windows begin below and right of the map's corner; they wrap around.

    Returns:
        (B, H, W, C), in image order.
    """
    H, W = qkv.shape[1:3]
    down, right = to_2tuple(shift_size)
    if down or right:
        qkv = torch.roll(qkv, (-down, -right), (1, 2))
    q, k, v = _cut_heads(qkv, num_heads, *to_2tuple(window_size))
    backend = resolve_backend(backend, qkv.device, qkv.dtype, torch.is_grad_enabled(), q.shape[0] * q.shape[1])
    x = ATTEND[backend](q, k, v, bias, mask, scale, dropout_p)
    x = _join_heads(x, H, W, *to_2tuple(window_size))
    return torch.roll(x, (down, right), (1, 2)) if down or right else x


def _cut_heads(qkv: Tensor, num_heads: int, h: int, w: int) -> tuple[Tensor, ...]:
    """(B, H, W, 3C) to q, k, v of (B, nW, nH, N, d) in a single copy."""
    B, H, W, C3 = qkv.shape
    x = qkv.view(B, H // h, h, W // w, w, 3, num_heads, C3 // (3 * num_heads))
    x = x.permute(5, 0, 1, 3, 6, 2, 4, 7)  # 3, B, rows of windows, columns of windows, nH, h, w, d
    return x.reshape(3, B, (H // h) * (W // w), num_heads, h * w, -1).unbind(0)


def _join_heads(x: Tensor, H: int, W: int, h: int, w: int) -> Tensor:
    """(B, nW, nH, N, d) to (B, H, W, C) in a single copy."""
    B, _, num_heads, _, d = x.shape
    x = x.view(B, H // h, W // w, num_heads, h, w, d)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, num_heads * d)


class AttentionBase(nn.Module):
    """What window attention modules share. A subclass has ``dim, window_size, num_heads, scale, attn_drop, proj,
    proj_drop`` and says how q, k, v and the bias are made."""

    backend = "auto"

    def packed_qkv(self, x: Tensor) -> Tensor:
        """(..., C) to (..., 3C)."""
        raise NotImplementedError

    def position_bias(self) -> Tensor:
        """(nH, N, N)."""
        raise NotImplementedError

    @property
    def dropout_p(self) -> float:
        return self.attn_drop.p if self.training else 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None, shift_size: Pair = 0) -> Tensor:
        """Attend within windows.

        Args:
            x: windows that are cut already (B * nW, N, C), as officially, or maps in image order (B, H, W, C).
            mask: (nW, N, N), what to add to the logits of each kind of window, or None.
            shift_size: of the windows of maps.

        Returns:
            What ``x`` is, in shape and order.
        """
        if x.ndim == 3:
            return self._forward_windows(x, mask)
        x = window_attention(
            self.packed_qkv(x),
            self.position_bias(),
            mask,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift_size=shift_size,
            scale=self.scale,
            dropout_p=self.dropout_p,
            backend=self.backend,
        )
        return self.proj_drop(self.proj(x))

    def _forward_windows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, N, C = x.shape
        kinds = 1 if mask is None else mask.shape[0]
        qkv = self.packed_qkv(x).view(windows // kinds, kinds, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).contiguous().unbind(0)  # each B, nW, nH, N, d
        backend = resolve_backend(self.backend, q.device, q.dtype, torch.is_grad_enabled(), windows)
        x = ATTEND[backend](q, k, v, self.position_bias(), mask, self.scale, self.dropout_p)
        return self.proj_drop(self.proj(x.transpose(2, 3).reshape(windows, N, C)))


def set_attention_backend(model: nn.Module, name: str) -> None:
    """Choose the backend of every window attention in ``model``: auto, reference or sdpa."""
    check_backend(name)
    for module in model.modules():
        if isinstance(module, AttentionBase):
            module.backend = name
