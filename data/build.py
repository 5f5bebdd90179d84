"""Datasets, loaders and mixup from the configuration (official ``data/build.py``)."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import to_2tuple
from torch.utils.data import DataLoader, Dataset, Sampler

import distributed
from config import OFFICIAL_CLASSES

from .classes import SelectedClasses, read_class_list
from .decoding import build_decoder
from .device import DeviceLoader
from .fast import FastEval, FastTrain
from .images import Images, collate, stack
from .lists import LISTS, ListSource, collect
from .policies import Augmentation
from .raw import RawSource
from .samplers import EvalSampler, PartSampler, TrainSampler
from .shards import ShardSampler, ShardSet, StreamImages
from .sources import UNKNOWN, FolderSource, ImageTree, Source, class_names
from .tiny_imagenet import TinyImageNetSource
from .transforms import build_transform
from .workers import LeaveSignalsToMain
from .zipped import MAPS, ZipSource, map_lines

Classes = list[str] | None
Stored = Source | ShardSet
logger = logging.getLogger(__name__)


def build_loader(config: Any) -> tuple:
    """``dataset_train, dataset_val, data_loader_train, data_loader_val, mixup_fn``.

    Loaders give (images, labels) on this process's device, images normalised. Sets ``MODEL.NUM_CLASSES`` from the data,
    unless the configuration gave it. With ``EVAL_MODE`` there is no training part: its dataset and loader are None.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, unreadable or not of the model's classes.
    """
    if mixes(config) and config.DATA.BATCH_SIZE % 2 and not config.EVAL_MODE:
        raise ValueError(
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE} must be even with mixup or cutmix, "
            "or set AUG.MIXUP 0 AUG.CUTMIX 0"
        )
    train = None if config.EVAL_MODE else open_split(config, "train")
    known = training_classes(config) if train is None else known_of(train)
    if isinstance(train, Source) and train.classes is None and config.MODEL.NUM_CLASSES_FROM_DATA:
        check_largest_label(train, skips(config))
    val = open_split(config, "val", known.names, known.count)
    settle_classes(config, val, known)
    loader_train = None if train is None else train_loader(train, config, build_decoding(config, True))
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


def open_split(
    config: Any, split: str, names: Classes = None, count: int | None = None, labelled: bool = True
) -> Stored:
    """The training (``train``) or validation (``val``) samples; ``DATA.CLASSES`` chooses among them.

    Args:
        names: all classes by number; those that the data itself names if None.
        count: how many there are, if that is known; where labels from there on are skipped, it takes a limit.
        labelled: whether labels are needed. If not, any folder of images will do, and any label.
    """
    kind, chosen = source_kind(config), config.DATA.CLASSES
    open_kind = OPEN[kind] if labelled else UNLABELLED.get(kind, OPEN[kind])
    if not chosen:
        limit = config.MODEL.NUM_CLASSES if labelled else None
        if config.MODEL.NUM_CLASSES_FROM_DATA:
            limit = count if skips(config) else None
        return open_kind(config, split, names, limit)
    if kind == "shards":
        raise ValueError(f"DATA.CLASSES={chosen}: a stream of shards cannot leave samples out; pack the others anew")
    return SelectedClasses(open_kind(config, split, names, None), read_class_list(Path(chosen)), chosen)


def has_split(config: Any, split: str) -> bool:
    """Whether there is a file or folder that the samples of ``split`` would be read from."""
    kind = source_kind(config)
    if kind == "shards" and config.DATA[f"{split.upper()}_SHARDS"]:
        return True
    name = {"zip": MAPS, "list": LISTS}.get(kind, {}).get(split, split)
    return bool(config.DATA.DATA_PATH) and Path(config.DATA.DATA_PATH, name).exists()


def skips(config: Any) -> bool:
    return config.DATA.ON_ERROR == "skip"


def _open_folder(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    return FolderSource(_root(config) / split, classes, skips(config))


def _open_tree(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    folder = _root(config) / split
    return ImageTree(folder if split == "val" or folder.is_dir() else _root(config))


def _open_zip(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    mode = config.DATA.CACHE_MODE
    if split == "val" or (mode == "part" and config.DATA.CLASSES):
        mode = "no"  # each validation image is read once per epoch; a part is not that of the chosen classes
    return ZipSource(
        *(_root(config), split, mode, classes, limit),
        *(distributed.rank(), distributed.world_size(), distributed.local_rank()),
        *(distributed.barrier, distributed.broadcast_object, skips(config)),
    )


def _open_shards(config: Any, split: str, classes: Classes, limit: int | None, labelled: bool = True) -> ShardSet:
    pattern, index = (config.DATA[f"{split.upper()}_{key}"] for key in ("SHARDS", "INDEX"))
    skip = skips(config)
    names = {"classes": classes, "num_classes": limit}
    return ShardSet(pattern or _root(config) / split, index or None, **names, skip=skip, labelled=labelled)


def _open_list(config: Any, split: str, classes: Classes, limit: int | None) -> Source:
    return ListSource(_root(config), split, classes, limit, skip=skips(config))


OPEN: dict[str, Callable[[Any, str, Classes, int | None], Stored]] = {
    "folder": _open_folder,
    "zip": _open_zip,
    "list": _open_list,
    "shards": _open_shards,
    "raw": lambda config, split, classes, limit: RawSource(_root(config) / split, classes, limit, skips(config)),
    "tiny_imagenet": lambda config, split, classes, _: TinyImageNetSource(_root(config), split, classes, skips(config)),
}


# Where labels are not needed, these kinds do without.
UNLABELLED = {"folder": _open_tree, "shards": partial(_open_shards, labelled=False)}


class Known(NamedTuple):
    """What training data says of classes: all names, before any are chosen, and their number; None if unknown."""

    names: Classes
    count: int | None


def known_of(train: Stored) -> Known:
    return Known(train.source.classes if isinstance(train, SelectedClasses) else train.classes, class_count(train))


def training_classes(config: Any) -> Known:
    """What evaluation takes from training data that is at hand: no more than names and labels are read of it."""
    kind, names, count = source_kind(config), None, None
    if kind == "folder" and (train := _root(config) / "train").is_dir():
        names = class_names(train)
        count = len(names)
    elif kind == "zip" and (train := _root(config) / MAPS["train"]).is_file():
        lines = collect(train, "line", map_lines(train), skip=skips(config))
        names, count = lines.classes, int(lines.labels.max()) + 1 or None
    elif kind == "list" and config.DATA.DATASET not in OFFICIAL_CLASSES and (_root(config) / LISTS["train"]).is_file():
        names, count = known_of(_open_list(config, "train", None, None))
    return Known(names, count)  # raw and tar shards say it in the index of either split


def settle_classes(config: Any, val: Stored, known: Known) -> None:
    """Set ``MODEL.NUM_CLASSES`` to the data's number of classes, or check the given number against it."""
    found = class_count(val)
    count = found if config.DATA.CLASSES else known.count
    if count is None:  # labels of validation alone may lack the last classes
        count = OFFICIAL_CLASSES.get(config.DATA.DATASET, found)
    if count is None and config.MODEL.NUM_CLASSES_FROM_DATA:
        raise ValueError(f"{val.urls[0]}: no index says how many classes there are; give MODEL.NUM_CLASSES")
    config.defrost()
    if config.MODEL.NUM_CLASSES_FROM_DATA:
        config.MODEL.NUM_CLASSES = count
    config.freeze()
    most = max(count or 0, found or 0)
    if most > config.MODEL.NUM_CLASSES:
        raise ValueError(
            f"{config.DATA.DATA_PATH} has {most} classes, but the head has MODEL.NUM_CLASSES="
            f"{config.MODEL.NUM_CLASSES}; leave that key out to take the number from the training data"
        )


def check_largest_label(train: Source, skip: bool) -> None:
    """Raise ``ValueError``, or with ``skip`` warn, where more than half of the classes have no sample.

    Where the largest label alone says how many classes there are, one wrong label makes a head of any size.
    """
    last = int(train.labels.argmax())
    count, used = int(train.labels[last]) + 1, len(np.unique(train.labels[train.labels != UNKNOWN]))
    if 2 * used >= count:
        return
    problem = (
        f"{train.name(last)}: its label {count - 1} makes {count} classes, of which {used} have samples; correct it, "
        "or give MODEL.NUM_CLASSES"
    )
    if not skip:
        raise ValueError(problem)
    logger.warning(problem)


def class_count(samples: Stored) -> int | None:
    """How many classes there are, by their names or their largest label; None for a stream that does not say."""
    if samples.classes is not None:
        return len(samples.classes)
    return samples.num_classes if isinstance(samples, ShardSet) else int(samples.labels.max()) + 1


def mixes(config: Any) -> bool:
    """Whether there is mixup or cutmix, which pair the images of a batch."""
    return config.AUG.MIXUP > 0 or config.AUG.CUTMIX > 0 or config.AUG.CUTMIX_MINMAX is not None


def build_mixup(config: Any) -> Mixup | None:
    """timm's mixup and cutmix on batches of (images, labels), or None where both are off."""
    aug = config.AUG
    if not mixes(config):
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
    pipeline = resolve_pipeline(config)
    decode = pick_decoder(config, pipeline, is_train)
    if pipeline != "device":
        return decode, build_transform(is_train, config)
    if not is_train:
        return decode, FastEval(build_transform(False, config).transforms[:-1])
    size = to_2tuple(config.DATA.IMG_SIZE)
    return decode, FastTrain(size, config.AUG.HFLIP, config.DATA.INTERPOLATION, build_augmentation(config))


def pick_decoder(config: Any, pipeline: str, is_train: bool) -> Callable:
    """The decoder of ``DATA.DECODER``."""
    name = config.DATA.DECODER
    name = ("cv2" if pipeline == "device" and is_train else "pil") if name == "auto" else name
    logger.info(f"{'training' if is_train else 'evaluation'} images: decoder {name}, pipeline {pipeline}")
    return build_decoder(name)


def resolve_pipeline(config: Any, augments: bool = True) -> str:
    """What ``auto`` stands for: device on CUDA, which has the float64 that it needs, for policies that it knows.

    Args:
        augments: whether images are augmented by the policy of ``AUG``.
    """
    if config.DATA.PIPELINE != "auto":
        return config.DATA.PIPELINE
    if distributed.pick_device().type != "cuda":
        return "official"
    if not augments:
        return "device"
    try:
        build_augmentation(config)
    except ValueError:
        return "official"
    return "device"


def build_augmentation(config: Any) -> Augmentation:
    """What workers draw for the device. Raises ``ValueError`` for policies that only the official pipeline has."""
    aug, size = config.AUG, to_2tuple(config.DATA.IMG_SIZE)
    return Augmentation(size, aug.AUTO_AUGMENT, aug.COLOR_JITTER, config.DATA.INTERPOLATION, aug.REPROB, aug.RECOUNT)


def train_loader(
    samples: Stored,
    config: Any,
    decoding: tuple[Callable, Callable],
    make_batch: Callable[[Sequence[Any]], tuple] = stack,
) -> DeviceLoader:
    """Shuffled batches of ``DATA.BATCH_SIZE``, all full. ``make_batch`` makes a batch of samples, as `images.stack`.

    Raises ``ValueError`` where samples do not fill one batch, or are not as many as those of other processes.
    """
    _check_count(samples, config, "training")
    rank, world_size, seed = distributed.rank(), distributed.world_size(), config.SEED
    if isinstance(samples, ShardSet):
        sampler = ShardSampler(samples, rank, world_size, seed, buffer=config.DATA.SHUFFLE_BUFFER)
    elif isinstance(samples, ZipSource) and config.DATA.CACHE_MODE == "part":
        sampler = PartSampler(samples.own_indices(), len(samples) // world_size, rank, seed)
    else:
        sampler = TrainSampler(len(samples), rank, world_size, seed)
    if len(sampler) < config.DATA.BATCH_SIZE:
        raise ValueError(
            f"{len(samples)} training images on {world_size} process(es) do not fill one batch of "
            f"DATA.BATCH_SIZE={config.DATA.BATCH_SIZE}; use at most {len(sampler)}"
        )
    return _loader(samples, sampler, config, True, decoding, make_batch)


def _check_count(samples: Stored, config: Any, kind: str) -> None:
    """Every process must call it, and each raises ``ValueError`` where two have other numbers of samples: they would
    shuffle differently, and wait for each other at the end of the epoch.
    """
    count, counts = len(samples), distributed.broadcast_object(distributed.gather_objects(len(samples)))
    for process, other in enumerate(counts):
        if other != count:
            where = samples.urls[0] if isinstance(samples, ShardSet) else config.DATA.DATA_PATH
            raise ValueError(
                f"{where}: {count} {kind} images here, but {other} for process {process}; copy the data again"
            )


def _eval_loader(samples: Stored, config: Any) -> DeviceLoader:
    _check_count(samples, config, "evaluation")
    rank, world_size, test = distributed.rank(), distributed.world_size(), config.TEST
    if isinstance(samples, ShardSet):
        sampler = ShardSampler(samples, rank, world_size, train=False)
    else:
        sampler = EvalSampler(len(samples), rank, world_size, test.SEQUENTIAL, test.SHUFFLE, config.SEED)
    return _loader(samples, sampler, config, False, build_decoding(config, False), stack)


def _loader(
    samples: Stored,
    sampler: Sampler,
    config: Any,
    is_train: bool,
    decoding: tuple[Callable, Callable],
    make_batch: Callable[[Sequence[Any]], tuple],
) -> DeviceLoader:
    make: type[Dataset] = StreamImages if isinstance(samples, ShardSet) else Images
    dataset = make(samples, *decoding, config.SEED, skips(config))
    workers = min(config.DATA.NUM_WORKERS, _cores_per_process())
    loader = DataLoader(
        dataset,
        batch_size=config.DATA.BATCH_SIZE,
        sampler=sampler,
        drop_last=is_train,
        num_workers=workers,
        collate_fn=partial(collate, fill=is_train, make_batch=make_batch),
        pin_memory=config.DATA.PIN_MEMORY and torch.accelerator.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=LeaveSignalsToMain() if workers else None,
        generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
    )
    return DeviceLoader(loader, distributed.pick_device(), config.AUG.REMODE, fill=is_train and skips(config))


def _cores_per_process() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
