"""Datasets, loaders and mixup from the configuration (official ``data/build.py``)."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from torch.utils.data import DataLoader, Dataset, Sampler

import distributed

from .augment import Augmentation
from .classes import SelectedClasses, read_class_list
from .decoding import as_pil, build_decoder
from .device import DeviceLoader
from .fast import FastEval, FastTrain
from .images import Images, collate
from .lists import ListSource
from .raw import RawSource
from .samplers import EvalSampler, PartSampler, TrainSampler
from .shards import ShardSampler, ShardSet, StreamImages
from .sources import FolderSource, Source, class_names
from .tiny_imagenet import TinyImageNetSource
from .transforms import build_transform
from .workers import LeaveSignalsToMain
from .zipped import ZipSource

Classes = list[str] | None


def build_loader(config: Any, simmim: bool = False, is_pretrain: bool = False) -> tuple:
    """``dataset_train, dataset_val, data_loader_train, data_loader_val, mixup_fn``.

    Loaders give (images, labels) on this process's device, images normalised. Sets ``MODEL.NUM_CLASSES`` from the data,
    unless the configuration gave it. With ``EVAL_MODE`` there is no training part: its dataset and loader are None.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, unreadable or not of the model's classes.
    """
    if simmim:
        raise ValueError("simmim=True: this version has no SimMIM loaders yet")
    train = None if config.EVAL_MODE else open_split(config, "train", given_classes(config))
    classes = train.classes if train is not None else evaluation_classes(config)
    val = open_split(config, "val", classes)
    settle_classes(config, train if train is not None else val, classes or val.classes)
    loader_train = None if train is None else _train_loader(train, config)
    loader_val = _eval_loader(val, config)
    dataset_train = None if train is None else loader_train.dataset
    return dataset_train, loader_val.dataset, loader_train, loader_val, build_mixup(config)


def source_kind(config: Any) -> str:
    """The form of the data: ``DATA.SOURCE``, or what official keys say.

    Raises ``ValueError`` where the two contradict each other.
    """
    kind, zipped = config.DATA.SOURCE, config.DATA.ZIP_MODE
    if zipped and kind not in ("auto", "zip"):
        raise ValueError(f"DATA.ZIP_MODE=True (--zip) and DATA.SOURCE={kind!r} exclude each other; give one of them")
    if kind != "auto":
        return kind
    return "zip" if zipped else "list" if config.DATA.DATASET == "imagenet22K" else "folder"


def open_split(config: Any, split: str, classes: Classes) -> Source | ShardSet:
    """The training (``train``) or validation (``val``) samples, numbered by ``classes``, or by their own if None."""
    kind = source_kind(config)
    limit = None if config.MODEL.NUM_CLASSES_FROM_DATA else config.MODEL.NUM_CLASSES
    chosen = None if config.DATA.CLASSES else classes  # a list of classes selects from all that are there
    source = OPEN[kind](config, split, chosen, limit)
    if not config.DATA.CLASSES:
        return source
    if kind == "shards":
        raise ValueError(
            f"DATA.CLASSES={config.DATA.CLASSES}: a stream of shards cannot leave samples out; pack them anew"
        )
    return SelectedClasses(source, classes)


def _open_folder(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    # Every training class has images: an empty one is an error.
    return FolderSource(_root(config) / split, None if split == "train" else classes)


def _open_zip(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    cache = config.DATA.CACHE_MODE if split == "train" else "no"  # each validation image is read once per epoch
    return ZipSource(
        *(_root(config), split, cache, classes, limit),
        *(distributed.rank(), distributed.world_size(), distributed.local_rank()),
        *(distributed.barrier, distributed.broadcast_object),
    )


def _open_shards(config: Any, split: str, classes: Classes, limit: int | None) -> ShardSet:
    pattern = config.DATA[f"{split.upper()}_SHARDS"]
    return ShardSet(pattern or _root(config) / split, classes=classes, num_classes=limit)


OPEN: dict[str, Callable[[Any, str, Classes, int | None], Source | ShardSet]] = {
    "folder": _open_folder,
    "zip": _open_zip,
    "list": lambda config, split, classes, limit: ListSource(_root(config), split, classes, limit),
    "shards": _open_shards,
    "raw": lambda config, split, classes, limit: RawSource(_root(config) / split, classes, limit),
    "tiny_imagenet": lambda config, split, classes, limit: TinyImageNetSource(_root(config), split, classes),
}


def given_classes(config: Any) -> Classes:
    """The classes of the file ``DATA.CLASSES``, if there is one."""
    return read_class_list(Path(config.DATA.CLASSES)) if config.DATA.CLASSES else None


def evaluation_classes(config: Any) -> Classes:
    """The classes that evaluation numbers samples by: the training folders', where they are at hand."""
    given = given_classes(config)
    if given is not None or source_kind(config) != "folder":
        return given
    train = _root(config) / "train"
    return class_names(train) if train.is_dir() else None


def settle_classes(config: Any, samples: Source | ShardSet, classes: Classes) -> None:
    """Set ``MODEL.NUM_CLASSES`` to the data's number of classes, or check the given number against it."""
    if classes is not None:
        count = len(classes)
    elif isinstance(samples, ShardSet):
        count = samples.num_classes
        if count is None and config.MODEL.NUM_CLASSES_FROM_DATA:
            raise ValueError(f"{samples.urls[0]}: no index says how many classes there are; give MODEL.NUM_CLASSES")
    else:
        count = int(samples.labels.max()) + 1
    config.defrost()
    if config.MODEL.NUM_CLASSES_FROM_DATA:
        config.MODEL.NUM_CLASSES = count
    config.freeze()
    if count is not None and count > config.MODEL.NUM_CLASSES:
        raise ValueError(
            f"{config.DATA.DATA_PATH} has {count} classes, but the head has MODEL.NUM_CLASSES="
            f"{config.MODEL.NUM_CLASSES}; leave that key out to take the number from the data"
        )


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


def build_decoding(config: Any, is_train: bool) -> tuple[Callable, Callable]:
    """The decoder and the transform of samples, for ``DATA.PIPELINE`` and ``DATA.DECODER``."""
    pipeline, name = config.DATA.PIPELINE, config.DATA.DECODER
    on_device = pipeline == "device" or (pipeline == "auto" and distributed.pick_device().type != "cpu")
    decode = build_decoder(("cv2" if on_device and is_train else "pil") if name == "auto" else name)
    if not on_device:
        return partial(_decode_as_pil, decode), build_transform(is_train, config)
    if not is_train:
        return decode, FastEval(build_transform(False, config).transforms[:-2])
    aug, size = config.AUG, to_2tuple(config.DATA.IMG_SIZE)
    augmentation = Augmentation(
        size, aug.AUTO_AUGMENT, aug.COLOR_JITTER, config.DATA.INTERPOLATION, aug.REPROB, aug.RECOUNT
    )
    return decode, FastTrain(size, aug.HFLIP, config.DATA.INTERPOLATION, augmentation)


def _decode_as_pil(decode: Callable, data: Any, name: str) -> Any:
    return as_pil(decode(data, name))


def _train_loader(samples: Source | ShardSet, config: Any) -> DeviceLoader:
    rank, world_size, seed = distributed.rank(), distributed.world_size(), config.SEED
    if isinstance(samples, ShardSet):
        sampler = ShardSampler(samples, rank, world_size, seed, buffer=config.DATA.SHUFFLE_BUFFER)
    elif isinstance(samples, ZipSource) and config.DATA.CACHE_MODE == "part":
        sampler = PartSampler(samples.own_indices(), len(samples) // world_size, seed)
    else:
        sampler = TrainSampler(len(samples), rank, world_size, seed)
    if len(sampler) < config.DATA.BATCH_SIZE:
        raise ValueError(
            f"{len(samples)} training images on {world_size} process(es) do not fill one batch of "
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE}; use at most {len(sampler)}"
        )
    return _loader(samples, sampler, config, is_train=True)


def _eval_loader(samples: Source | ShardSet, config: Any) -> DeviceLoader:
    rank, world_size, test = distributed.rank(), distributed.world_size(), config.TEST
    if isinstance(samples, ShardSet):
        sampler = ShardSampler(samples, rank, world_size, train=False)
    else:
        sampler = EvalSampler(len(samples), rank, world_size, test.SEQUENTIAL, test.SHUFFLE, config.SEED)
    return _loader(samples, sampler, config, is_train=False)


def _loader(samples: Source | ShardSet, sampler: Sampler, config: Any, is_train: bool) -> DeviceLoader:
    make: type[Dataset] = StreamImages if isinstance(samples, ShardSet) else Images
    dataset = make(samples, *build_decoding(config, is_train), config.SEED, config.DATA.ON_ERROR == "skip")
    workers = min(config.DATA.NUM_WORKERS, _cores_per_process())
    loader = DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        drop_last=is_train,
        num_workers=workers,
        collate_fn=partial(collate, fill=is_train),
        pin_memory=config.DATA.PIN_MEMORY and torch.accelerator.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=LeaveSignalsToMain() if workers else None,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    )
    return DeviceLoader(loader, distributed.pick_device(), config.AUG.REMODE)


def _cores_per_process() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
