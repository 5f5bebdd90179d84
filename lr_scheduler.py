"""Learning rate schedules by name, one value per update, warmed up linearly."""

from typing import Any

from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch.optim import Optimizer


class ScaledOnce(Scheduler):
    """A schedule for groups whose rates already hold their layer's scale; timm's would multiply by it once more."""

    def update_groups(self, values: float | list[float]) -> None:
        groups = self.optimizer.param_groups
        for group, value in zip(groups, values if isinstance(values, list) else [values] * len(groups), strict=True):
            group[self.param_group_field] = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore nothing: rates follow from the configuration and the update alone, also when a run is resumed with
        other epochs or another batch size."""


class Cosine(ScaledOnce, CosineLRScheduler):
    pass


class Step(ScaledOnce, StepLRScheduler):
    pass


class MultiStep(ScaledOnce, MultiStepLRScheduler):
    pass


class Linear(ScaledOnce):
    """From the base rate down to ``lr_min_rate`` of it over ``t_initial`` updates, the warm-up included."""

    def __init__(self, optimizer: Optimizer, t_initial: int, lr_min_rate: float, warmup_t: int, warmup_lr_init: float):
        super().__init__(optimizer, param_group_field="lr", t_in_epochs=False)
        self.t_initial = t_initial
        self.lr_min_rate = lr_min_rate
        self.warmup_t = warmup_t
        self.warmup_lr_init = warmup_lr_init

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return [self.warmup_lr_init + t * (base - self.warmup_lr_init) / self.warmup_t for base in self.base_values]
        done = min((t - self.warmup_t) / (self.t_initial - self.warmup_t), 1.0)
        return [base - (base - base * self.lr_min_rate) * done for base in self.base_values]


def _cosine(optimizer: Optimizer, train: Any, total: int, warmup: dict, updates: int) -> Scheduler:
    prefix = train.LR_SCHEDULER.WARMUP_PREFIX
    length = total - warmup["warmup_t"] if prefix else total
    return Cosine(
        optimizer, t_initial=max(length, 1), lr_min=train.MIN_LR, warmup_prefix=prefix, t_in_epochs=False, **warmup
    )


def _linear(optimizer: Optimizer, train: Any, total: int, warmup: dict, updates: int) -> Scheduler:
    return Linear(optimizer, t_initial=total, lr_min_rate=0.01, **warmup)


def _step(optimizer: Optimizer, train: Any, total: int, warmup: dict, updates: int) -> Scheduler:
    return Step(
        optimizer,
        decay_t=train.LR_SCHEDULER.DECAY_EPOCHS * updates,
        decay_rate=train.LR_SCHEDULER.DECAY_RATE,
        warmup_prefix=False,
        t_in_epochs=False,
        **warmup,
    )


def _multistep(optimizer: Optimizer, train: Any, total: int, warmup: dict, updates: int) -> Scheduler:
    # timm counts a milestone m as reached at update m - 1, the official schedule at update m.
    milestones = [epoch * updates + 1 for epoch in train.LR_SCHEDULER.MULTISTEPS]
    return MultiStep(
        optimizer,
        decay_t=milestones,
        decay_rate=train.LR_SCHEDULER.GAMMA,
        warmup_prefix=False,
        t_in_epochs=False,
        **warmup,
    )


SCHEDULES = {"cosine": _cosine, "linear": _linear, "step": _step, "multistep": _multistep}


def build_scheduler(config: Any, optimizer: Optimizer, n_iter_per_epoch: int) -> Scheduler:
    """The schedule of ``TRAIN.LR_SCHEDULER``; call its ``step_update(update)`` after each update, counted from 0.

    Args:
        n_iter_per_epoch: updates in an epoch (official ``lr_scheduler.py``).

    Raises:
        ValueError: for an unknown name, or a warm-up as long as the training.
    """
    train = config.TRAIN
    name = train.LR_SCHEDULER.NAME
    if name not in SCHEDULES:
        raise ValueError(f"TRAIN.LR_SCHEDULER.NAME={name!r}; choose from {sorted(SCHEDULES)}")
    if train.WARMUP_EPOCHS >= train.EPOCHS and name in ("cosine", "linear"):
        raise ValueError(f"TRAIN.WARMUP_EPOCHS={train.WARMUP_EPOCHS} must be below TRAIN.EPOCHS={train.EPOCHS}")
    warmup = {"warmup_t": int(train.WARMUP_EPOCHS * n_iter_per_epoch), "warmup_lr_init": train.WARMUP_LR}
    total = int(train.EPOCHS * n_iter_per_epoch)
    scheduler = SCHEDULES[name](optimizer, train, total, warmup, n_iter_per_epoch)
    if warmup["warmup_t"]:  # once more, since timm's constructors multiply the first rate by the layer's scale
        scheduler.update_groups(train.WARMUP_LR)
    return scheduler
