"""What fused window attention computes, token by token, in plain PyTorch. As slow as it is plain; for tests."""

import torch
from torch import Tensor

MASKED = -100.0


def attend(
    qkv: Tensor,
    bias: Tensor,
    logit_scale: Tensor | None,
    num_heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    masked: bool,
    scale: float,
) -> Tensor:
    """As `kernels.window_attention.attend`, differentiable, in ``qkv``'s precision: float64 for tests."""
    B, H, W, C3 = qkv.shape
    (h, w), (down, right) = window, shift
    rows, columns = -(-H // h), -(-W // w)
    q, k, v = qkv.view(B, H, W, 3, num_heads, -1).permute(3, 0, 4, 1, 2, 5)  # each B, nH, H, W, D
    if logit_scale is not None:
        q, k = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (q, k))
        scale = scale * logit_scale.reshape(num_heads, 1, 1)
    out = qkv.new_zeros(B, num_heads, H, W, C3 // (3 * num_heads))
    for i in range(rows):
        for j in range(columns):
            # Token by token: where it lies in the map, and on which side of the seam where the map's ends meet.
            y, x = torch.meshgrid(torch.arange(h) + i * h + down, torch.arange(w) + j * w + right, indexing="ij")
            y, x = y.flatten(), x.flatten()
            side = 2 * (y >= rows * h).int() + (x >= columns * w).int()
            y, x = y % (rows * h), x % (columns * w)
            real = (y < H) & (x < W)
            y, x, side = y[real], x[real], side[real]
            logits = scale * (q[:, :, y, x] @ k[:, :, y, x].mT) + bias[:, real][:, :, real]
            if masked:
                logits = logits + MASKED * (side[:, None] != side[None, :])
            out[:, :, y, x] = logits.softmax(-1) @ v[:, :, y, x]
    return out.permute(0, 2, 3, 1, 4).reshape(B, H, W, C3 // 3)
