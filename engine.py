"""The training loop that all scripts share.

A script gives ``compute_loss(model, batch) -> (loss, {meter: value})``; everything else is the same for all. Values
stay on the device until they are read together, every ``PRINT_FREQ`` steps.
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

import distributed
import sharding
import utils
from checkpoint import strict_state
from compilation import compile_in_place
from config import to_dict
from ema import MovingAverage
from evaluation import report_skipped, to_device, validate
from launch import Session, Stopped, TimeIsUp
from logger import ProgressBar
from lr_scheduler import build_scheduler
from meters import EpochMeters, write_scalars
from models import trial
from models.attention import resolve_backend
from models.expert_parallel import (
    exclude_from_ddp,
    expert_modules,
    global_grad_norm,
    parameter_counts,
    sync_expert_gradients,
)
from models.recomputation import recompute_activations
from optimizer import build_optimizer

# Newer releases of PyTorch have another name for it. Our buffers never change.
SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in signature(DistributedDataParallel).parameters
)
ComputeLoss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]


@dataclass
class Progress:
    """Where training is. ``samples`` counts those of all ranks seen in the unfinished epoch."""

    epoch: int = 0
    samples: int = 0
    updates: int = 0
    updates_per_epoch: int = 0
    skipped: int = 0  # updates with non-finite gradients, in all
    skipped_in_row: int = 0
    uncorrected: int = 0  # those that ``updates`` still counts, until the next printed step


@dataclass
class Run:
    """A model with all that trains it."""

    session: Session
    model: nn.Module
    loader_train: DataLoader
    loader_val: DataLoader | None
    optimizer: Optimizer
    scheduler: Any
    scaler: utils.NativeScalerWithGradNormCount
    classes: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    max_accuracy: float = 0.0
    average: MovingAverage | None = None  # of the weights, for TRAIN.EMA_DECAY, from `fit` or `restore` on
    writer: SummaryWriter | None = None
    stop_signal: int = 0
    deadline: float = math.inf  # of TRAIN.TIME_LIMIT, on the monotonic clock
    best_saved: float = -1.0  # accuracy of ckpt_best.pth
    after_epoch: Callable[["Run"], None] | None = None  # called on every rank after each epoch

    def __post_init__(self):
        self.replica, self.shards = self.model, None
        self.parameters = list(self.model.parameters())  # that a step works on
        self.combine_gradients = None
        if sharding.is_sharded(self.model):
            self.shards = sharding.ShardedStep(self.model, self.optimizer)
            self.parameters, self.combine_gradients = self.shards.parameters, self.shards.combine
            return
        if any(expert_modules(self.model)):
            self.combine_gradients = partial(_combine_expert_gradients, self.model)
        if distributed.world_size() > 1:
            devices = None if self.session.device.type == "cpu" else [self.session.device.index]
            exclude_from_ddp(self.model)
            self.replica = DistributedDataParallel(
                self.model, device_ids=devices, gradient_as_bucket_view=True, **{SYNC_BUFFERS: False}
            )

    @property
    def config(self) -> Any:
        return self.session.config

    def around_batch(self, last: bool) -> AbstractContextManager:
        """For passes on a batch, and the step after the ``last`` one before an update: others reduce no gradients."""
        if self.shards is not None:
            return self.shards.batch(last)
        return nullcontext() if last or self.replica is self.model else self.replica.no_sync()

    def should_stop(self) -> bool:
        return bool(self.stop_signal) or time.monotonic() >= self.deadline

    def stopped(self) -> Stopped:
        """What to raise once the state is saved. A rank that stops for another's sake takes the likelier reason."""
        if self.stop_signal or not self.config.TRAIN.TIME_LIMIT:
            return Stopped(self.stop_signal or signal.SIGTERM)
        return TimeIsUp(self.config.TRAIN.TIME_LIMIT)


def _combine_expert_gradients(model: nn.Module) -> Tensor:
    sync_expert_gradients(model)
    return global_grad_norm(model)


def prepare(
    session: Session,
    model: nn.Module,
    loader_train: DataLoader,
    loader_val: DataLoader | None = None,
    classes: list[str] | None = None,
    make_optimizer: Callable[[Any, nn.Module], Optimizer] = build_optimizer,
    after_epoch: Callable[[Run], None] | None = None,
) -> Run:
    """Optimizer, schedule and scaler for ``model``, which moves to the session's device."""
    config = session.config
    model.to(session.device)
    _shard_if_asked(session, model)
    optimizer = make_optimizer(config, model)
    if config.TRAIN.RECOMPUTE_ACTIVATIONS:
        recompute_activations(model)
    compile_model(session, model, training=True)
    check_average(config, model)
    updates = math.ceil(len(loader_train) / config.TRAIN.ACCUMULATION_STEPS)
    scheduler = build_scheduler(config, optimizer, updates)
    scaler = utils.NativeScalerWithGradNormCount(session.device.type, enabled=session.amp_dtype == torch.float16)
    first = config.TRAIN.START_EPOCH
    progress = Progress(epoch=first, updates=first * updates, updates_per_epoch=updates)
    parts = (session, model, loader_train, loader_val, optimizer, scheduler, scaler)
    return Run(*parts, classes or [], progress, after_epoch=after_epoch)


def _shard_if_asked(session: Session, model: nn.Module) -> None:
    train, logger, world_size = session.config.TRAIN, session.logger, distributed.world_size()
    sharding.check_settings(session.config)
    if train.SHARDING == "ddp":
        return
    if world_size == 1:
        logger.info("TRAIN.SHARDING fsdp2: one process has nothing to share; it keeps the whole model")
        return
    sharding.shard(model, session.device, train.CPU_OFFLOAD)
    here, whole = sharding.numbers_here(model)
    logger.info(f"TRAIN.SHARDING fsdp2: {here} of the {whole} parameters that are not experts' are on this process")
    if train.CPU_OFFLOAD and session.device.type == "cpu":
        logger.info("TRAIN.CPU_OFFLOAD: there is no accelerator to take parameters off")


def describe(session: Session, model: nn.Module) -> None:
    """The official lines on a new model."""
    config, logger = session.config, session.logger
    logger.info(f"Creating model:{config.MODEL.TYPE}/{config.MODEL.NAME}")
    logger.info(str(model))
    name = config.MODEL.ATTENTION_BACKEND
    chosen = {
        label: resolve_backend(name, session.device, session.amp_dtype, grad)
        for label, grad in (("training", True), ("evaluation", False))
    }
    tried = ", or what a trial finds to be faster" if name == "auto" and trial.is_wanted(session.device) else ""
    chosen = ", ".join(f"{backend} in {label}" for label, backend in chosen.items())
    logger.info(f"attention backend {name}: {chosen}{tried}")
    logger.info(f"number of params: {sum(p.numel() for p in model.parameters() if p.requires_grad)}")
    if any(expert_modules(model)):
        single, whole = parameter_counts(model)
        logger.info(f"number of params single: {single}")
        logger.info(f"number of params whole: {whole}")
    if hasattr(model, "flops"):
        logger.info(f"number of GFLOPs: {model.flops() / 1e9}")


def compile_model(session: Session, model: nn.Module, training: bool = False) -> None:
    """As ``COMPILE`` says; ``model`` is on the session's device."""
    mode, backend = session.config.COMPILE, session.config.COMPILE_BACKEND
    if mode:
        session.logger.info(compile_in_place(model, session.device, mode, backend, training))


def check_average(config: Any, model: nn.Module) -> None:
    """Raise ``ValueError`` where weights shall be averaged whose checkpoints have no place for it."""
    if config.TRAIN.EMA_DECAY and any(module.expert_groups.size > 1 for _, module in expert_modules(model)):
        raise ValueError(
            f"TRAIN.EMA_DECAY={config.TRAIN.EMA_DECAY}: experts that several processes share cannot be averaged; set 0 "
            "or MODEL.SWIN_MOE.EXPERT_PARALLEL 1"
        )


def find_checkpoint(session: Session) -> str:
    """What to continue from: an explicit ``MODEL.RESUME``, else the output folder's newest checkpoint, else ``""``."""
    config, logger = session.config, session.logger
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # then training has gone on from RESUME
    if not config.TRAIN.AUTO_RESUME or (config.MODEL.RESUME and not restarted):
        return config.MODEL.RESUME
    found = distributed.on_main(lambda: session.files.auto_resume_helper(config.OUTPUT, logger=logger))
    if found:
        logger.info(f"auto resuming from {found}")
    else:
        logger.info(f"no checkpoint found in {config.OUTPUT}, ignoring auto resume")
    return found or config.MODEL.RESUME


def load_weights(session: Session, model: nn.Module, classes: list[str] | None) -> None:
    """Give ``model`` the weights that `find_checkpoint` finds, for evaluation.

    Raises ``ValueError`` where there are none, or where they are of another model or other classes.
    """
    path = find_checkpoint(session)
    if not path:
        raise ValueError("--eval needs weights: give --resume FILE, or --pretrained FILE")
    saved = _resume(session, path, model, None, None, None)
    check_classes(saved, classes, path)


def _resume(session: Session, path: str, *parts: Any) -> dict[str, Any]:
    session.config.defrost()
    session.config.MODEL.RESUME = path
    session.config.freeze()
    return session.files.resume(session.config, *parts, session.logger)


def restore(run: Run, path: str) -> None:
    """Continue ``run`` exactly from the checkpoint ``path``: weights, optimizer, schedule, position, generators."""
    config, logger = run.config, run.session.logger
    saved = _resume(run.session, path, run.model, run.optimizer, run.scheduler, run.scaler)
    check_classes(saved, run.classes, path)
    run.max_accuracy = saved.get("max_accuracy", 0.0)
    _restore_average(run, saved.get("model_ema"), path)
    per_epoch = run.progress.updates_per_epoch
    if "progress" in saved:
        run.progress = progress = Progress(**saved["progress"])
        if progress.updates_per_epoch != per_epoch:  # another batch size, number of processes or amount of data
            progress.updates = round(progress.updates * per_epoch / progress.updates_per_epoch)
            progress.updates_per_epoch = per_epoch
            run.scheduler.step_update(max(progress.updates - 1, 0))
    else:  # an official checkpoint: whole epochs only
        epoch = config.TRAIN.START_EPOCH
        run.progress = Progress(epoch=epoch, updates=epoch * per_epoch, updates_per_epoch=per_epoch)
    states = saved.get("rng", [])
    if len(states) == distributed.world_size():
        distributed.set_rng_state(states[distributed.rank()], run.session.device)
    else:
        logger.warning(
            f"{path} holds the generators of {len(states)} process(es), not of "
            f"{distributed.world_size()}: random draws start anew"
        )


def _restore_average(run: Run, state: dict[str, Tensor] | None, path: str) -> None:
    decay, logger = run.config.TRAIN.EMA_DECAY, run.session.logger
    if decay and state is not None:
        try:
            run.average = MovingAverage(run.model, decay, strict_state(state, run.model.state_dict()))
        except ValueError as err:
            raise ValueError(f"{path}: model_ema: {err}") from err
    elif decay:
        logger.warning(f"{path} holds no averaged weights: the average of TRAIN.EMA_DECAY begins at its weights")
    elif state is not None:
        logger.warning(f"{path} holds averaged weights, which end here: TRAIN.EMA_DECAY is 0")


def check_classes(saved: dict[str, Any], classes: list[str] | None, path: str) -> None:
    """Raise ``ValueError`` where a checkpoint names other classes than the data has."""
    theirs = saved.get("classes") or classes
    if classes and theirs != classes:  # data may have numbers for classes, without names
        strange = sorted(set(classes) ^ set(theirs))[:5]
        raise ValueError(
            f"{path} was trained on {len(theirs)} classes, the data has {len(classes)}; they differ in "
            f"{', '.join(strange) or 'their order'}"
        )


def fit(run: Run, compute_loss: ComputeLoss) -> float:
    """Train from where ``run`` is to ``TRAIN.EPOCHS``; validate and save after each epoch. Returns the best accuracy.

    Raises:
        Stopped: after SIGTERM or SIGINT, once the state is saved.
        FloatingPointError: after ``TRAIN.MAX_NONFINITE_STEPS`` updates in a row with non-finite gradients.
    """
    config, logger = run.config, run.session.logger
    if distributed.is_main():
        path = Path(config.OUTPUT) / "config.json"
        path.write_text(json.dumps(to_dict(config), indent=2) + "\n")
        logger.info(f"Full config saved to {path}")
        run.writer = SummaryWriter(config.OUTPUT, purge_step=run.progress.updates + 1)
    if config.SAVE_BEST:
        run.best_saved = distributed.on_main(lambda: utils.best_accuracy(config))
    if config.TRAIN.EMA_DECAY and run.average is None:
        run.average = MovingAverage(run.model, config.TRAIN.EMA_DECAY)
    logger.info("Start training")
    began = time.time()
    if config.TRAIN.TIME_LIMIT:
        run.deadline = time.monotonic() + 60 * config.TRAIN.TIME_LIMIT
    try:
        with _stop_on_signals(run):
            while run.progress.epoch < config.TRAIN.EPOCHS:
                train_one_epoch(run, compute_loss)
                _finish_epoch(run)
    finally:
        if run.writer is not None:
            run.writer.close()
    logger.info(f"Training time {timedelta(seconds=int(time.time() - began))}")
    return run.max_accuracy


def _finish_epoch(run: Run) -> None:
    """Validate, then save, so that the best accuracy in the file is up to date."""
    config, progress = run.config, run.progress
    epoch = progress.epoch
    if run.loader_val is not None:
        _validate_epoch(run, "val/")
        if run.average is not None:
            run.session.logger.info(f"the average of the weights, TRAIN.EMA_DECAY {config.TRAIN.EMA_DECAY}:")
            with run.average.in_place():
                _validate_epoch(run, "val/ema_")
        run.session.logger.info(f"Max accuracy: {run.max_accuracy:.2f}%")
    progress.epoch, progress.samples = epoch + 1, 0
    stop = distributed.any_rank(run.should_stop(), run.session.device)
    if stop or epoch % config.SAVE_FREQ == 0 or epoch == config.TRAIN.EPOCHS - 1:
        save(run)
    if run.after_epoch is not None:
        run.after_epoch(run)
    if stop and progress.epoch < config.TRAIN.EPOCHS:
        raise run.stopped()


def _validate_epoch(run: Run, prefix: str) -> None:
    """Validate the weights that the model has now. The best count, averaged or not."""
    config, epoch = run.config, run.progress.epoch
    acc1, acc5, loss = validate(run.session, run.model, run.loader_val)
    run.max_accuracy = max(run.max_accuracy, acc1)
    if config.SAVE_BEST and acc1 > run.best_saved:
        run.best_saved = acc1
        if _this_process_saves(run.session):
            run.session.files.save_best(config, epoch, run.model, acc1, run.classes, run.session.logger)
        elif run.shards is not None:
            run.model.state_dict()  # takes part in gathering what the main process writes
    write_scalars(run, {f"{prefix}loss": loss, f"{prefix}accuracy": acc1, f"{prefix}accuracy_top5": acc5})


def _this_process_saves(session: Session) -> bool:
    """Whether this process writes, or must be there when others do."""
    return distributed.is_main() or session.files.EVERY_PROCESS_SAVES


def save(run: Run) -> None:
    """Write all that an exact continuation needs. Every rank must call it."""
    progress = run.progress
    generators = distributed.gather_objects(distributed.rng_state(run.session.device))
    averages = {} if run.average is None else {"model_ema": run.average.state_dict()}
    if _this_process_saves(run.session):
        done = progress.samples // (run.config.DATA.BATCH_SIZE * distributed.world_size())
        run.session.files.save_checkpoint(
            run.config,
            progress.epoch if done else progress.epoch - 1,
            run.model,
            run.max_accuracy,
            run.optimizer,
            run.scheduler,
            run.scaler,
            run.session.logger,
            step=done,
            progress=asdict(progress),
            rng=generators,
            classes=run.classes,
            **averages,
        )
    elif run.shards is not None:  # takes part in gathering what the main process writes
        run.model.state_dict()
        run.optimizer.state_dict()
    distributed.barrier()


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """Note SIGTERM and SIGINT for the loop to save and stop; a second Ctrl-C, 3 seconds later, stops at once."""
    first = 0.0

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if run.stop_signal and number == signal.SIGINT and time.monotonic() - first > 3:
            raise KeyboardInterrupt
        first = first or time.monotonic()
        run.stop_signal = number
        run.session.logger.warning(f"signal {number}: saving as soon as all processes can, then stopping")

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train_one_epoch(run: Run, compute_loss: ComputeLoss) -> None:
    """The rest of the epoch at which ``run`` is."""
    config, progress, loader = run.config, run.progress, run.loader_train
    epoch, steps, group = progress.epoch, len(loader), config.TRAIN.ACCUMULATION_STEPS
    world_size = distributed.world_size()
    first = min(progress.samples // (config.DATA.BATCH_SIZE * world_size), steps)
    loader.sampler.set_epoch(epoch, first * config.DATA.BATCH_SIZE)
    progress.samples = first * config.DATA.BATCH_SIZE * world_size
    run.model.train()
    run.optimizer.zero_grad()
    meters = EpochMeters(run, first)
    bar = ProgressBar(f"epoch {epoch}", steps, distributed.is_main(), first)
    began, last_saved, stop = time.time(), first, False
    for step, batch in enumerate(loader, first):
        updates_now = (step + 1) % group == 0 or step + 1 == steps
        members = group if step < steps - steps % group else steps % group
        with run.around_batch(updates_now):
            with run.session.autocast():
                loss, values = compute_loss(run.replica, to_device(batch, run.session.device))
            norm = run.scaler(
                loss / members,
                run.optimizer,
                clip_grad=config.TRAIN.CLIP_GRAD,
                parameters=run.parameters,
                update_grad=updates_now,
                combine=run.combine_gradients,
            )
        meters.add(loss, norm, values)
        if updates_now:
            if run.average is not None:
                run.average.update(norm)
            run.optimizer.zero_grad()
            run.scheduler.step_update(progress.updates)
            progress.updates += 1
        progress.samples += config.DATA.BATCH_SIZE * world_size
        bar.update(step + 1)
        if step % config.PRINT_FREQ == 0:
            stop = meters.read(step) or stop
        if updates_now:
            # Processes must agree. On accelerators they do at a printed step: asking each time would make them wait.
            if world_size == 1 or run.session.device.type == "cpu":
                stop = distributed.any_rank(run.should_stop(), run.session.device) or stop
            due = config.SAVE_STEPS and step + 1 - last_saved >= config.SAVE_STEPS and step + 1 < steps
            if stop or due:
                meters.flush(step)
                save(run)
                last_saved = step + 1
            if stop:
                bar.close()
                report_skipped(run.session, loader, "training")
                raise run.stopped()
    meters.finish(steps - 1)
    bar.close()
    report_skipped(run.session, loader, "training")
    run.session.logger.info(f"EPOCH {epoch} training takes {timedelta(seconds=int(time.time() - began))}")
