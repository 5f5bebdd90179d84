"""From the configuration to constructor arguments: every key of a model's section, in lower case."""

from typing import Any


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
