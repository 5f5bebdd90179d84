"""Experts in the place of a block's MLP, by this project's layer or by Tutel's."""

from typing import Any

from torch import Tensor, nn

from .moe import MoELayer
from .tutel_backend import tutel_layer

LAYERS = {"native": MoELayer, "tutel": tutel_layer}


class MoEMlp(nn.Module):
    """Experts in the place of an MLP: (B, L, C) to (B, L, C) and the auxiliary loss.

    Args:
        backend: "native", or "tutel" where it is installed.
        new: ``path, router, groups, top_groups, group`` of `moe.MoELayer`, as are all others.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_local_experts: int,
        top_value: int,
        capacity_factor: float = 1.25,
        cosine_router: bool = False,
        normalize_gate: bool = False,
        use_bpr: bool = True,
        is_gshard_loss: bool = True,
        gate_noise: float = 1.0,
        cosine_router_dim: int = 256,
        cosine_router_init_t: float = 0.5,
        moe_drop: float = 0.0,
        init_std: float = 0.02,
        mlp_fc2_bias: bool = True,
        backend: str = "native",
        **new: Any,
    ):
        super().__init__()
        if backend not in LAYERS:
            raise ValueError(f"MODEL.SWIN_MOE.BACKEND={backend!r}; choose from {sorted(LAYERS)}")
        self.in_features = in_features
        self._moe_layer = LAYERS[backend](
            *(in_features, hidden_features, num_local_experts, top_value, capacity_factor, cosine_router),
            *(normalize_gate, use_bpr, is_gshard_loss, gate_noise, cosine_router_dim, cosine_router_init_t),
            *(moe_drop, init_std, mlp_fc2_bias),
            **new,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self._moe_layer(x)
        return y if isinstance(y, tuple) else (y, y.l_aux)
