"""Training, evaluating and timing a classifier: what main.py, main_moe.py and main_simmim_ft.py have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torch.optim import Optimizer

import engine
import evaluation
from config import OFFICIAL_CLASSES
from data import build_loader
from launch import Session
from models import build_model
from optimizer import build_optimizer


class SupervisedLoss:
    """Cross-entropy; against soft targets where mixup or cutmix made them, else with label smoothing."""

    def __init__(self, mixup: Mixup | None, label_smoothing: float):
        self.mixup = mixup
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = self.mixed(*batch)
        return self.score(model(images), targets)

    def mixed(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (images, targets) if self.mixup is None else self.mixup(images, targets)

    def score(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of logits (B, classes), and the accuracy against hard targets."""
        logits = logits.float()
        if targets.is_floating_point():
            return F.cross_entropy(logits, targets), {}
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return loss, {"accuracy": 100 * (logits.argmax(1) == targets).float().mean()}


@dataclass(frozen=True)
class Task:
    """What a script does its own way; the defaults are those of main.py.

    ``after_epoch`` makes, for a model, what is called with the run after each epoch.
    """

    build_optimizer: Callable[[Any, nn.Module], Optimizer] = build_optimizer
    loss: type[SupervisedLoss] = SupervisedLoss
    after_epoch: Callable[[nn.Module], Callable[[engine.Run], None]] | None = None


def run(session: Session, task: Task | None = None) -> float:
    """Do what the configuration says.

    Returns the best top-1 accuracy in percent, or images per second for ``THROUGHPUT_MODE``.
    """
    task = task or Task()
    if session.config.THROUGHPUT_MODE:
        return time_model(session)
    if session.config.MODEL.TYPE == "swin_moe" and task.loss is SupervisedLoss:
        raise ValueError(
            "MODEL.TYPE='swin_moe' has an auxiliary loss, which this script does not know; use main_moe.py"
        )
    if session.config.EVAL_MODE:
        return evaluate(session, task)
    return train(session, task)


def train(session: Session, task: Task) -> float:
    config = session.config
    dataset_train, _, loader_train, loader_val, mixup = build_loader(config)
    model = build_model(config)
    engine.describe(session, model)
    after_epoch = task.after_epoch and task.after_epoch(model)
    parts = (loader_train, loader_val, dataset_train.classes, task.build_optimizer, after_epoch)
    run = engine.prepare(session, model, *parts)
    checkpoint = engine.find_checkpoint(session)
    if checkpoint:
        engine.restore(run, checkpoint)
    elif config.MODEL.PRETRAINED:
        session.files.load_pretrained(config, model, session.logger, run.optimizer)
    if checkpoint or config.MODEL.PRETRAINED:
        evaluation.validate(session, model, loader_val)
    return engine.fit(run, task.loss(mixup, config.MODEL.LABEL_SMOOTHING))


def evaluate(session: Session, task: Task) -> float:
    config = session.config
    _, dataset_val, _, loader_val, _ = build_loader(config)
    model = build_model(config)
    engine.describe(session, model)
    if config.MODEL.PRETRAINED and not config.MODEL.RESUME:
        session.files.load_pretrained(config, model, session.logger)
    else:
        engine.load_weights(session, model, dataset_val.classes)
    engine.compile_model(session, model.to(session.device))
    return evaluation.validate(session, model, loader_val)[0]


def time_model(session: Session) -> float:
    config = session.config
    if config.MODEL.NUM_CLASSES_FROM_DATA:  # no data is needed here: the official head of this dataset
        config.defrost()
        config.MODEL.NUM_CLASSES = OFFICIAL_CLASSES.get(config.DATA.DATASET, config.MODEL.NUM_CLASSES)
        config.freeze()
    model = build_model(config)
    engine.describe(session, model)
    engine.compile_model(session, model.to(session.device))
    return evaluation.throughput(session, model)
