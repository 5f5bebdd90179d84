"""Datasets, loaders and mixup from the configuration (official ``data/build.py``)."""

import atexit
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from torch.utils.data import DataLoader, Dataset

import distributed

from .datasets import ClassFolder, SampleSeeded, class_names
from .samplers import EvalSampler, TrainSampler
from .transforms import build_transform

DATASETS = ("imagenet",)


def build_loader(config: Any, simmim: bool = False, is_pretrain: bool = False) -> tuple:
    """``dataset_train, dataset_val, data_loader_train, data_loader_val, mixup_fn``.

    Sets ``MODEL.NUM_CLASSES`` from the folder, unless the configuration gave it. With ``EVAL_MODE`` there is no
    training part: its dataset and loader are None.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, unreadable or not of the model's classes.
    """
    if simmim:
        raise ValueError("simmim=True: this version has no SimMIM loaders yet")
    if config.DATA.DATASET not in DATASETS:
        raise ValueError(f"DATA.DATASET={config.DATA.DATASET!r} is not in this version; choose from {list(DATASETS)}")
    if config.DATA.ZIP_MODE:
        raise ValueError("DATA.ZIP_MODE=True (--zip) is not in this version; unzip the data and leave the flag out")
    classes = settle_classes(config)
    dataset_val = build_dataset(False, config, classes)
    dataset_train = None if config.EVAL_MODE else build_dataset(True, config, classes)
    loader_train = None if config.EVAL_MODE else _train_loader(dataset_train, config)
    return dataset_train, dataset_val, loader_train, _eval_loader(dataset_val, config), build_mixup(config)


def build_dataset(is_train: bool, config: Any, classes: list[str] | None = None) -> Dataset:
    """The training or validation folder, numbered by ``classes`` (its own if None)."""
    root = _root(config) / ("train" if is_train else "val")
    if is_train:
        classes = None  # every training class has images: an empty one is an error
    return ClassFolder(root, build_transform(is_train, config), classes)


def settle_classes(config: Any) -> list[str]:
    """The class names of the data, with ``MODEL.NUM_CLASSES`` set to their number or checked against it."""
    root = _root(config)
    train, val = root / "train", root / "val"
    classes = class_names(val if config.EVAL_MODE and not train.is_dir() else train)
    config.defrost()
    if config.MODEL.NUM_CLASSES_FROM_DATA:
        config.MODEL.NUM_CLASSES = len(classes)
    config.freeze()
    if len(classes) > config.MODEL.NUM_CLASSES:
        raise ValueError(
            f"{root} has {len(classes)} classes, but the head has MODEL.NUM_CLASSES={config.MODEL.NUM_CLASSES}; "
            f"leave that key out to take the number from the folder"
        )
    return classes


def build_mixup(config: Any) -> Mixup | None:
    """timm's mixup and cutmix on batches of (images, labels), or None where both are off."""
    aug = config.AUG
    if aug.MIXUP <= 0 and aug.CUTMIX <= 0 and aug.CUTMIX_MINMAX is None:
        return None
    return Mixup(
        mixup_alpha=aug.MIXUP,
        cutmix_alpha=aug.CUTMIX,
        cutmix_minmax=aug.CUTMIX_MINMAX,
        prob=aug.MIXUP_PROB,
        switch_prob=aug.MIXUP_SWITCH_PROB,
        mode=aug.MIXUP_MODE,
        label_smoothing=config.MODEL.LABEL_SMOOTHING,
        num_classes=config.MODEL.NUM_CLASSES,
    )


def _root(config: Any) -> Path:
    if not config.DATA.DATA_PATH:
        raise ValueError(
            "DATA.DATA_PATH is empty; give --data-path FOLDER with train/<class>/<image> and val/<class>/<image>"
        )
    return Path(config.DATA.DATA_PATH)


def _train_loader(dataset: Dataset, config: Any) -> DataLoader:
    world_size = distributed.world_size()
    sampler = TrainSampler(len(dataset), distributed.rank(), world_size, config.SEED)
    if len(sampler) < config.DATA.BATCH_SIZE:
        raise ValueError(
            f"{len(dataset)} training images on {world_size} process(es) do not fill one batch of "
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE}; use at most {len(sampler)}"
        )
    return DataLoader(SampleSeeded(dataset, config.SEED), sampler=sampler, drop_last=True, **_loader_arguments(config))


def _eval_loader(dataset: Dataset, config: Any) -> DataLoader:
    test = config.TEST
    sampler = EvalSampler(
        len(dataset), distributed.rank(), distributed.world_size(), test.SEQUENTIAL, test.SHUFFLE, config.SEED
    )
    return DataLoader(dataset, sampler=sampler, **_loader_arguments(config))


def _loader_arguments(config: Any) -> dict[str, Any]:
    workers = min(config.DATA.NUM_WORKERS, _cores_per_process())
    return {
        "batch_size": config.DATA.BATCH_SIZE,
        "num_workers": workers,
        "pin_memory": config.DATA.PIN_MEMORY and torch.accelerator.is_available(),
        "persistent_workers": workers > 0,
        "worker_init_fn": _LeaveSignalsToMain() if workers else None,
        "generator": torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    }


class _LeaveSignalsToMain:
    """Makes a worker outlive Ctrl-C and SIGTERM, which reach whole process groups: the main process saves first.

    Once the main process exits, SIGTERM ends the worker, as multiprocessing expects.
    """

    def __init__(self):
        self.exiting = multiprocessing.RawValue("b", 0)
        atexit.register(setattr, self.exiting, "value", 1)  # runs before multiprocessing ends its children

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self.exiting.value else None)


def _cores_per_process() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
