"""Swin and SwinV2 as this code and other libraries make them: the same widths, depths and drop path rates."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import timm
import torch
import torchvision
from torch import Tensor, nn

from kernels import window_process
from models.attention import ATTEND, set_attention_backend, takes_fused
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2

Builder = Callable[[], nn.Module]
LIBRARIES = ("torch", "timm", "torchvision", "transformers")


@dataclass(frozen=True)
class Model:
    title: str
    size: int  # of images
    ours: Builder
    peers: dict[str, Builder]


class Logits(nn.Module):
    """A classifier of transformers that gives its logits alone."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images).logits


def from_transformers(name: str, **settings) -> nn.Module:
    import transformers  # takes seconds

    config = getattr(transformers, f"{name}Config")(num_labels=1000, **settings)
    return Logits(getattr(transformers, f"{name}ForImageClassification")(config))


BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
V2 = {"img_size": 256, "window_size": 8}
MODELS = {
    "swin_tiny": Model(
        "Swin-T, 224 pixels",
        224,
        partial(SwinTransformer, drop_path_rate=0.2),
        {
            "timm": partial(timm.create_model, "swin_tiny_patch4_window7_224", drop_path_rate=0.2),
            "torchvision": torchvision.models.swin_t,
            "transformers": partial(from_transformers, "Swin", drop_path_rate=0.2),
        },
    ),
    "swin_base": Model(
        "Swin-B, 224 pixels",
        224,
        partial(SwinTransformer, **BASE, drop_path_rate=0.5),
        {
            "timm": partial(timm.create_model, "swin_base_patch4_window7_224", drop_path_rate=0.5),
            "torchvision": torchvision.models.swin_b,
            "transformers": partial(from_transformers, "Swin", **BASE, drop_path_rate=0.5),
        },
    ),
    "swinv2_tiny": Model(
        "SwinV2-T, 256 pixels, windows of 8",
        256,
        partial(SwinTransformerV2, **V2, drop_path_rate=0.2),
        {
            "timm": partial(timm.create_model, "swinv2_tiny_window8_256", drop_path_rate=0.2),
            "torchvision": torchvision.models.swin_v2_t,
            "transformers": partial(from_transformers, "Swinv2", image_size=256, window_size=8, drop_path_rate=0.2),
        },
    ),
}


def candidates(model: Model, device: torch.device) -> dict[str, Builder]:
    """Builders of ours with each backend that serves this device, and of the peers that are installed."""
    ours = {f"ours, {backend}": partial(with_backend, model.ours, backend) for backend in usable_backends(device)}
    return {**ours, **{name: build for name, build in model.peers.items() if importlib.util.find_spec(name)}}


def usable_backends(device: torch.device) -> list[str]:
    names = ["auto", *ATTEND, "fused"]
    if not window_process.is_built_for(device):
        names.remove("window_process")
    try:
        takes_fused("fused", torch.empty(1, 7, 7, 96, device=device), None, 1, (7, 7), (0, 0), 0.0)
    except ValueError:
        names.remove("fused")
    return names


def with_backend(build: Builder, backend: str) -> nn.Module:
    model = build()
    set_attention_backend(model, backend)
    return model


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in LIBRARIES if importlib.util.find_spec(name))
