"""The factory: ``MODEL.TYPE`` to a class."""

from typing import Any

from torch import nn

from .arguments import model_arguments
from .attention import set_attention_backend
from .simmim import build_simmim
from .swin_mlp import SwinMLP
from .swin_transformer import SwinTransformer
from .swin_transformer_moe import SwinTransformerMoE
from .swin_transformer_v2 import SwinTransformerV2

# MODEL.TYPE: class. The section of MODEL that holds its arguments is named after the type, in capitals.
MODELS = {
    "swin": SwinTransformer,
    "swinv2": SwinTransformerV2,
    "swin_moe": SwinTransformerMoE,
    "swin_mlp": SwinMLP,
}


def build_model(config: Any, is_pretrain: bool = False) -> nn.Module:
    """The model that ``config`` describes, on the CPU (official ``models/build.py``).

    Args:
        is_pretrain: SimMIM's model for pre-training, with this one as its encoder.

    Raises ``ValueError`` for an unknown type and for sizes that the model cannot take.
    """
    kind = config.MODEL.TYPE
    if kind not in MODELS:
        raise ValueError(f"MODEL.TYPE={kind!r} is unknown; choose from {sorted(MODELS)}")
    model = build_simmim(config) if is_pretrain else MODELS[kind](**model_arguments(config))
    set_attention_backend(model, config.MODEL.ATTENTION_BACKEND)
    return model
