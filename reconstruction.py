"""What a model that SimMIM trains makes of images: losses, and pictures of what it sees and what it fills in."""

import os
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.utils import make_grid, save_image

import distributed
import sharding
from launch import Session
from meters import write_scalars
from models.simmim import SimMIM


@torch.no_grad()  # in inference mode FSDP2 would keep tensors that training cannot use
def reconstruct(session: Session, model: SimMIM, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each image (N,), and a grid (3, height, width) of uncovered, masked and completed images in 0 to 1.

    Args:
        images: (N, 3, H, W), normalised by ImageNet's mean and deviation.
        masks: (N, h, w), 1 for hidden patches.
    """
    was_training = model.training
    model.eval()
    images, masks = images.to(session.device), masks.to(session.device)
    size = session.config.DATA.BATCH_SIZE
    with session.autocast():
        parts = [model.reconstruct(*part) for part in zip(images.split(size), masks.split(size), strict=True)]
    losses, predicted = (torch.cat(values) for values in zip(*parts, strict=True))
    model.train(was_training)
    hidden = model.hidden_pixels(masks)
    # What is predicted of pixels that are seen is not trained, and means nothing.
    rows = torch.stack([images, images * (1 - hidden), images * (1 - hidden) + predicted * hidden], 1)
    return losses.float().cpu(), make_grid(_to_colours(rows.flatten(0, 1).float().cpu()), nrow=3)


def _to_colours(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images * deviation + mean).clamp(0, 1)


def write_png(grid: Tensor, path: Path) -> None:
    """Write a picture (3, height, width) of values in 0 to 1; it appears complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_image(grid, temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Watch:
    """The same images and masks every ``SAVE_FREQ`` epochs: losses to the log, pictures to PNG and TensorBoard.

    Args:
        images, masks: as for `reconstruct`.
    """

    def __init__(self, session: Session, images: Tensor, masks: Tensor):
        self.session, self.images, self.masks = session, images, masks

    def __call__(self, run: Any) -> None:
        """After an epoch of ``run``, for the main process; the others only help where they hold a part of the model."""
        config, epoch = run.config, run.progress.epoch - 1
        if epoch % config.SAVE_FREQ and epoch + 1 < config.TRAIN.EPOCHS:
            return
        if not distributed.is_main():
            if sharding.is_sharded(run.model):
                reconstruct(self.session, run.model, self.images, self.masks)
            return
        losses, grid = self.look(run.model, f"epoch_{epoch}")
        each = {f"reconstruction/image_{i}": loss for i, loss in enumerate(losses.tolist())}
        write_scalars(run, {"val/loss": losses.mean().item(), **each})
        run.writer.add_image("reconstruction", grid, run.progress.updates)

    def look(self, model: SimMIM, name: str) -> tuple[Tensor, Tensor]:
        """Log what `reconstruct` gives, and write ``OUTPUT/reconstruction_<name>.png``."""
        losses, grid = reconstruct(self.session, model, self.images, self.masks)
        each = " ".join(f"{loss:.4f}" for loss in losses.tolist())
        self.session.logger.info(f" * Reconstruction loss {losses.mean():.4f} of {len(losses)} images: {each}")
        path = Path(self.session.config.OUTPUT) / f"reconstruction_{name}.png"
        if distributed.is_main():
            write_png(grid, path)
            self.session.logger.info(f"{path} saved !!!")
        return losses, grid
