"""Train, evaluate and time Swin models on ImageNet-style data.

python main.py --cfg configs/swin/swin_tiny_patch4_window7_224.yaml --data-path DATA
torchrun --nproc_per_node 8 main.py --cfg … --data-path DATA --batch-size 128
python main.py --eval --cfg … --resume FILE.pth --data-path DATA
"""

from typing import Any

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn

import engine
import launch
import utils
from config import OFFICIAL_CLASSES
from data import build_loader
from models import build_model


class SupervisedLoss:
    """Cross-entropy; against soft targets where mixup or cutmix made them, else with label smoothing."""

    def __init__(self, mixup: Mixup | None, label_smoothing: float):
        self.mixup = mixup
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        logits = model(images).float()
        if targets.is_floating_point():
            return F.cross_entropy(logits, targets), {}
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": 100 * (logits.argmax(1) == targets).float().mean()}


def main(config: Any) -> float:
    """Do what ``config`` says. Returns the best top-1 accuracy in percent, or images per second for THROUGHPUT_MODE."""
    with launch.session(config) as session:
        if session.config.THROUGHPUT_MODE:
            return time_model(session)
        if session.config.MODEL.TYPE == "swin_moe":
            raise ValueError(
                "MODEL.TYPE='swin_moe' has an auxiliary loss, which main.py does not know; it only times it"
            )
        if session.config.EVAL_MODE:
            return evaluate(session)
        return train(session)


def train(session: launch.Session) -> float:
    config = session.config
    dataset_train, _, loader_train, loader_val, mixup = build_loader(config)
    model = build_model(config)
    engine.describe(session, model)
    run = engine.prepare(session, model, loader_train, loader_val, dataset_train.classes)
    checkpoint = engine.find_checkpoint(session)
    if checkpoint:
        engine.restore(run, checkpoint)
    elif config.MODEL.PRETRAINED:
        utils.load_pretrained(config, model, session.logger)
    if checkpoint or config.MODEL.PRETRAINED:
        engine.validate(session, model, loader_val)
    return engine.fit(run, SupervisedLoss(mixup, config.MODEL.LABEL_SMOOTHING))


def evaluate(session: launch.Session) -> float:
    config = session.config
    _, dataset_val, _, loader_val, _ = build_loader(config)
    model = build_model(config)
    engine.describe(session, model)
    if config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        utils.load_pretrained(config, model, session.logger)
    else:
        engine.load_weights(session, model, dataset_val.classes)
    return engine.validate(session, model.to(session.device), loader_val)[0]


def time_model(session: launch.Session) -> float:
    config = session.config
    if config.MODEL.NUM_CLASSES_FROM_DATA:  # no data is needed here: the official head of this dataset
        config.defrost()
        config.MODEL.NUM_CLASSES = OFFICIAL_CLASSES.get(config.DATA.DATASET, config.MODEL.NUM_CLASSES)
        config.freeze()
    model = build_model(config)
    engine.describe(session, model)
    return engine.throughput(session, model)


if __name__ == "__main__":
    launch.run(main, "Train, evaluate and time Swin models")
