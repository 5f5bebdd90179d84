"""The official ``utils_simmim.py``: `utils`, but position tables are resized along a geometric progression."""

from functools import partial

from checkpoint import resize_bias_table_geometric
from utils import (
    EVERY_PROCESS_SAVES,
    NativeScalerWithGradNormCount,
    auto_resume_helper,
    get_grad_norm,
    load_checkpoint,
    reduce_tensor,
    resume,
    save_best,
    save_checkpoint,
)
from utils import load_pretrained as load_pretrained_bicubic

__all__ = [
    "EVERY_PROCESS_SAVES",
    "NativeScalerWithGradNormCount",
    "auto_resume_helper",
    "get_grad_norm",
    "load_checkpoint",
    "load_pretrained",
    "reduce_tensor",
    "resume",
    "save_best",
    "save_checkpoint",
]

load_pretrained = partial(load_pretrained_bicubic, resize_table=resize_bias_table_geometric)
