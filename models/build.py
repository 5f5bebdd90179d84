"""The factory: ``MODEL.TYPE`` to a class, every lower-case key of its section to a constructor argument."""

from torch import nn

from .attention import set_attention_backend
from .swin_transformer import SwinTransformer

# type: class, section of MODEL that holds its arguments
MODELS = {"swin": (SwinTransformer, "SWIN")}


def build_model(config, is_pretrain: bool = False) -> nn.Module:
    """The model that ``config`` describes, on the CPU (official ``models/build.py``).

    Raises ``ValueError`` for an unknown type and for sizes that the model cannot take.
    """
    kind = config.MODEL.TYPE
    if is_pretrain:
        raise ValueError("is_pretrain=True: this version has no pre-training models yet")
    if kind not in MODELS:
        raise ValueError(f"MODEL.TYPE={kind!r} is not in this version; choose from {sorted(MODELS)}")
    model_class, section = MODELS[kind]
    arguments = {key.lower(): value for key, value in config.MODEL[section].items()}
    model = model_class(
        img_size=config.DATA.IMG_SIZE,
        num_classes=config.MODEL.NUM_CLASSES,
        drop_rate=config.MODEL.DROP_RATE,
        drop_path_rate=config.MODEL.DROP_PATH_RATE,
        use_checkpoint=config.TRAIN.USE_CHECKPOINT,
        **arguments,
    )
    set_attention_backend(model, config.MODEL.ATTENTION_BACKEND)
    return model
