"""From the configuration to constructor arguments: every key of a model's section, in lower case."""

import re
from typing import Any


def model_arguments(config: Any) -> dict[str, Any]:
    """What ``config`` says of the model of its ``MODEL.TYPE``, as constructor arguments."""
    kind = config.MODEL.TYPE
    section = config.MODEL[kind.upper()]
    arguments = {
        "img_size": config.DATA.IMG_SIZE,
        "num_classes": config.MODEL.NUM_CLASSES,
        "drop_rate": config.MODEL.DROP_RATE,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
        "use_checkpoint": config.TRAIN.USE_CHECKPOINT,
        "pad_maps": config.MODEL.PAD_MAPS,
        **{key.lower(): value for key, value in section.items()},
    }
    if kind == "swin_moe" and not arguments.get("num_experts"):
        arguments["num_experts"] = experts_of_name(config.MODEL.NAME)
    return arguments


def experts_of_name(name: str) -> int:
    """32 for "…_32expert_32gpu_22k": official files tell the experts of each process alone; 0 where it says nothing."""
    found = re.search(r"_(\d+)expert(?:_|$)", name)
    return int(found[1]) if found else 0
