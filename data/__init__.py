"""Datasets and loaders."""

from typing import Any

from .build import build_loader as build_supervised_loader
from .data_simmim_pt import build_loader_simmim
from .device import DeviceLoader

__all__ = ["build_loader"]


def build_loader(config: Any, simmim: bool = False, is_pretrain: bool = False) -> tuple | DeviceLoader:
    """What `build.build_loader` gives; for SimMIM pre-training, the one loader of `build_loader_simmim`.

    SimMIM's fine-tuning has the data of supervised training.
    """
    return build_loader_simmim(config) if simmim and is_pretrain else build_supervised_loader(config)
