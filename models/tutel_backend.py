"""Tutel's own layer behind ``MODEL.SWIN_MOE.BACKEND: tutel``, for those who have it installed."""

import importlib
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.distributed import ProcessGroup

import distributed

from .expert_parallel import ExpertGroups, as_groups
from .experts import total_experts

INSTALL = "pip install --no-build-isolation git+https://github.com/microsoft/tutel@main"


def tutel_layer(
    in_features: int,
    hidden_features: int,
    num_local_experts: int,
    top_value: int,
    capacity_factor: float,
    cosine_router: bool,
    normalize_gate: bool,
    use_bpr: bool,
    is_gshard_loss: bool,
    gate_noise: float,
    cosine_router_dim: int,
    cosine_router_init_t: float,
    moe_drop: float,
    init_std: float,
    mlp_fc2_bias: bool,
    path: str = "capacity",
    router: str = "flat",
    group: ProcessGroup | ExpertGroups | None = None,
    **groups_of_experts: Any,
) -> nn.Module:
    """Tutel's ``moe_layer``, called as officially; its output holds ``l_aux``.

    Raises:
        ValueError: where it is not installed, for what it does not have, and where it is known to be wrong.
    """
    key = "MODEL.SWIN_MOE."
    if (path, router) != ("capacity", "flat"):
        raise ValueError(
            f"{key}BACKEND='tutel' has neither {key}PATH={path!r} with {key}ROUTER={router!r}; take 'capacity' and "
            f"'flat', or {key}BACKEND native"
        )
    if use_bpr and capacity_factor <= 0:
        raise ValueError(
            f"{key}CAPACITY_FACTOR={capacity_factor} with {key}USE_BPR: newer versions of Tutel drop tokens there that "
            f"have a place; give {key}USE_BPR False, a positive factor, or {key}BACKEND native"
        )
    try:
        moe = importlib.import_module("tutel.moe")
    except ImportError as err:
        raise ValueError(
            f"{key}BACKEND='tutel', but Tutel cannot be imported ({err}); {INSTALL}, or give {key}BACKEND native"
        ) from err
    gate = {
        "type": "cosine_top" if cosine_router else "top",
        "k": top_value,
        "capacity_factor": capacity_factor,
        "gate_noise": gate_noise,
        "fp32_gate": True,
    }
    if cosine_router:
        gate |= {"proj_dim": cosine_router_dim, "init_t": cosine_router_init_t}
    processes = as_groups(group)
    if processes.size == 1 and processes.copies > 1:  # no group stands for all processes there
        raise ValueError(
            "MODEL.SWIN_MOE.EXPERT_PARALLEL=1 with MODEL.SWIN_MOE.BACKEND='tutel': Tutel would share experts over all "
            "processes; choose 0, or native"
        )
    drop = nn.Dropout(moe_drop)
    layer = moe.moe_layer(
        gate_type=gate,
        model_dim=in_features,
        experts={
            "type": "ffn",
            "count_per_node": num_local_experts,
            "hidden_size_per_expert": hidden_features,
            "activation_fn": lambda x: drop(F.gelu(x)),
        },
        scan_expert_func=lambda _, parameter: setattr(parameter, "skip_allreduce", True),
        seeds=(1, distributed.rank() + 1, distributed.rank() + 1),
        batch_prioritized_routing=use_bpr,
        normalize_gate=normalize_gate,
        is_gshard_loss=is_gshard_loss,
        group=processes.ep_group,
    )
    layer.drop = drop  # a part of the layer, so that it follows train() and eval()
    experts = layer.experts
    experts.expert_groups = processes
    experts.num_experts, experts.shards = total_experts(num_local_experts, processes.size), max(-num_local_experts, 1)
    nn.init.trunc_normal_(experts.batched_fc1_w, std=init_std)
    nn.init.trunc_normal_(experts.batched_fc2_w, std=init_std)
    nn.init.zeros_(experts.batched_fc1_bias)
    nn.init.zeros_(experts.batched_fc2_bias)
    experts.batched_fc2_bias.requires_grad = mlp_fc2_bias
    return layer
