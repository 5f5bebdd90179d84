"""The models of ``configs/`` under timm's names: after ``import models.registry``, a call of
``timm.create_model("official_swin_tiny_patch4_window7_224")`` builds this repository's model of that file.

The prefix keeps timm's own models of the same names. Sizes come from the YAML files, so a new file is a new model.
This module stands on top of `utils`, beside the scripts; no other one in ``models/`` imports it.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, register_model, resolve_pretrained_cfg
from torch import nn
from yacs.config import CfgNode

from config import OFFICIAL_CLASSES, get_config
from utils import load_pretrained

from .arguments import model_arguments
from .attention import set_attention_backend
from .build import MODELS

logger = logging.getLogger(__name__)

PREFIX = "official_"
CONFIGS = Path(__file__).parent.parent / "configs"
LEFT_OUT = ("demo/*", "*_tiny_imagenet.yaml", "simmim/simmim_pretrain_*")  # not official; no classifiers
FILLED_BY_TIMM = ("img_size", "in_chans", "num_classes")  # from its pretrained_cfg, where they are not arguments


@dataclass(frozen=True)
class Entry:
    """A classification model of ``configs/``; the two texts are those of its ``# Expected:`` and ``# Weights:`` lines.

    Args:
        expected: the accuracy of the paper and of the released weights.
        weights: the address of the released weights; empty where there are none.
    """

    path: Path
    config: CfgNode
    expected: str
    weights: str

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def family(self) -> str:
        return self.path.parent.name

    @property
    def num_classes(self) -> int:
        return OFFICIAL_CLASSES.get(self.config.DATA.DATASET, self.config.MODEL.NUM_CLASSES)


def read_catalogue() -> dict[str, Entry]:
    """Every official classification model by the name of its file."""
    paths = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if not any(map(path.match, LEFT_OUT))]
    return {path.stem: read_entry(path) for path in paths}


def read_entry(path: Path) -> Entry:
    comments = dict(re.findall(r"^# (Expected|Weights): (.+)$", path.read_text(), re.MULTILINE))
    config = get_config(SimpleNamespace(cfg=path))
    return Entry(path, config, comments.get("Expected", ""), comments.get("Weights", ""))


def timm_cfg(entry: Entry) -> dict[str, Any]:
    """What timm wants to know of a model: its images, as official evaluation prepares them, its head, its weights."""
    config = entry.config
    section = config.MODEL[config.MODEL.TYPE.upper()]
    # Official evaluation either resizes the shorter side to 256 / 224 of the crop, or the whole image, its aspect lost.
    crop = {"crop_pct": 224 / 256} if config.TEST.CROP else {"crop_pct": 1.0, "crop_mode": "squash"}
    return {
        "url": entry.weights or None,
        "input_size": (section.IN_CHANS, *to_2tuple(config.DATA.IMG_SIZE)),
        "fixed_input_size": True,
        "interpolation": config.DATA.INTERPOLATION,
        **crop,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": entry.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def create(
    entry: Entry,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **arguments: Any,
) -> nn.Module:
    """The model of ``entry``, as ``timm.create_model`` asks for it.

    Args:
        pretrained: start from the released weights, fitted to this model as by `utils.load_pretrained`: a head of
            another class count is set to zero. ``pretrained_cfg_overlay={"file": …}`` names other weights.
        cache_dir: not supported, since files are kept in torch's cache.
        arguments: of the model's class, over those of the YAML file; and timm's ``features_only, out_indices``, for a
            list of maps (B, C, H, W) of these stages, without a norm.

    Raises:
        ValueError: for sizes that the model cannot take; with ``pretrained``, where there are no weights for it, or
            where they do not fit.
    """
    config = entry.config
    source = None
    if pretrained:
        source = _source(entry, pretrained_cfg, pretrained_cfg_overlay, cache_dir)

    def build(**arguments: Any) -> nn.Module:
        model = MODELS[config.MODEL.TYPE](**arguments)
        set_attention_backend(model, config.MODEL.ATTENTION_BACKEND)
        model.in_chans = model.patch_embed.in_chans  # timm's scripts ask for it
        if source:
            load_pretrained(_with_pretrained(config, source), model, logger)
        return model

    from_file = {key: value for key, value in model_arguments(config).items() if key not in FILLED_BY_TIMM}
    return build_model_with_cfg(
        build,
        PREFIX + entry.name,
        pretrained=False,  # timm's own loading would leave a head that does not fit at random
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        feature_cfg={"feature_cls": "getter", "out_indices": (0, 1, 2, 3)},
        **(from_file | arguments),
    )


def _source(entry: Entry, pretrained_cfg: Any, overlay: dict[str, Any] | None, cache_dir: Any) -> str:
    """The file or address of the weights to start from. Raises ``ValueError`` where there is none."""
    name = PREFIX + entry.name
    if cache_dir is not None:
        raise ValueError(f"{name}: cache_dir={str(cache_dir)!r} is not used; files are kept in TORCH_HOME, so set that")
    known = resolve_pretrained_cfg(name, pretrained_cfg, overlay)
    source = known.file or known.url
    if not source:
        raise ValueError(
            f"{name}: its file in configs/{entry.family} names no released weights; "
            "leave pretrained out, or give pretrained_cfg_overlay={'file': PATH}"
        )
    return str(source)


def _with_pretrained(config: CfgNode, source: str) -> CfgNode:
    config = config.clone()
    config.defrost()
    config.MODEL.PRETRAINED = source
    config.freeze()
    return config


def entrypoint(entry: Entry) -> Callable[..., nn.Module]:
    """`create` for one model, under the name that timm shall know."""

    def call(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return create(entry, pretrained, **arguments)

    call.__name__ = call.__qualname__ = PREFIX + entry.name
    return call


CATALOGUE = read_catalogue()
REGISTERED = {PREFIX + name: entry for name, entry in CATALOGUE.items()}
default_cfgs = {name: timm_cfg(entry) for name, entry in REGISTERED.items()}  # timm looks for this name
for _entry in REGISTERED.values():
    register_model(entrypoint(_entry))
__all__ = ["CATALOGUE", "PREFIX", "REGISTERED", "Entry"]  # here, since timm adds the models' names, which are not here
