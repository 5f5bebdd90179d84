"""The factory: ``MODEL.TYPE`` to a class, every lower-case key of its section to a constructor argument."""

from typing import Any

from torch import nn

from .attention import set_attention_backend
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

    Raises ``ValueError`` for an unknown type and for sizes that the model cannot take.
    """
    if is_pretrain:
        raise ValueError("is_pretrain=True: this version has no pre-training models yet")
    kind = config.MODEL.TYPE
    if kind not in MODELS:
        raise ValueError(f"MODEL.TYPE={kind!r} is unknown; choose from {sorted(MODELS)}")
    model = MODELS[kind](**model_arguments(config))
    set_attention_backend(model, config.MODEL.ATTENTION_BACKEND)
    return model


def model_arguments(config: Any) -> dict[str, Any]:
    """What ``config`` says of the model of its ``MODEL.TYPE``, as constructor arguments."""
    section = config.MODEL[config.MODEL.TYPE.upper()]
    return {
        "img_size": config.DATA.IMG_SIZE,
        "num_classes": config.MODEL.NUM_CLASSES,
        "drop_rate": config.MODEL.DROP_RATE,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
        "pad_maps": config.MODEL.PAD_MAPS,
        **{key.lower(): value for key, value in section.items()},
    }
