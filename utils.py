"""Saving, loading and resuming, gradient scaling: the official ``utils.py``, on `checkpoint` and `storage`."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch.optim import Optimizer

import distributed
import storage
from checkpoint import (
    Size,
    WeightsError,
    architecture,
    classes_of,
    is_pretraining,
    is_rebuilt,
    keeps_head,
    other_coordinates,
    pretrained_state,
    released_names,
    strict_state,
)
from config import to_dict
from models.layers import patches_of
from optimizer import load_optimizer_state

EVERY_PROCESS_SAVES = False  # of the functions below, the main process alone calls those that write


def load_checkpoint(
    config: Any,
    model: nn.Module,
    optimizer: Optimizer | None,
    lr_scheduler: Any | None,
    loss_scaler: "NativeScalerWithGradNormCount | None",
    logger: logging.Logger,
) -> float:
    """Continue from ``MODEL.RESUME``: weights and, unless ``EVAL_MODE``, everything else.

    Returns the best accuracy so far and sets ``TRAIN.START_EPOCH`` (official ``utils.load_checkpoint``).
    """
    saved = resume(config, model, optimizer, lr_scheduler, loss_scaler, logger)
    return saved.get("max_accuracy", 0.0)


def resume(
    config: Any,
    model: nn.Module,
    optimizer: Optimizer | None,
    lr_scheduler: Any | None,
    loss_scaler: "NativeScalerWithGradNormCount | None",
    logger: logging.Logger,
    read: Callable[[str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """As `load_checkpoint`; returns what else the file holds (position, generators, class names, best accuracy).

    Under ``EVAL_MODE`` weights of another window, image size or number of channels are fitted as by `load_pretrained`.

    Args:
        read: gives a checkpoint's content, as `read_checkpoint` does.

    Raises ``ValueError`` where the file is not a checkpoint of this model.
    """
    path = config.MODEL.RESUME
    logger.info(f"==============> Resuming form {path}....................")  # sic: people parse it
    saved = (read or storage.read_checkpoint)(path)
    weights = _chosen_weights(config, saved, path)
    del saved["model"]
    with _named(path, logger):
        expected = model.state_dict()
        if other_coordinates(weights, expected):
            key = f"MODEL.{config.MODEL.TYPE.upper()}.PRETRAINED_WINDOW_SIZES"
            raise ValueError(f"its SwinV2 coordinates are of other {key}; give those")
        if not config.EVAL_MODE:
            check_architecture(config, weights, expected)
            if is_pretraining(weights) and not is_pretraining(expected):
                raise ValueError(
                    "a checkpoint of SimMIM's pre-training; begin fine-tuning by --pretrained, with a --tag of its own"
                )
            model.load_state_dict(strict_state(released_names(weights, expected)[0], expected))
    if config.EVAL_MODE:
        _load_weights(config, model, {**saved, "model": weights}, path, logger)
    if config.EVAL_MODE or optimizer is None or "optimizer" not in saved or "epoch" not in saved:
        return saved
    try:
        load_optimizer_state(optimizer, saved.pop("optimizer"))
    except (ValueError, KeyError) as err:
        raise ValueError(f"{path}: its optimizer state is not that of {type(optimizer).__name__} here: {err}") from err
    if lr_scheduler is not None and "lr_scheduler" in saved:
        lr_scheduler.load_state_dict(saved.pop("lr_scheduler"))
    if loss_scaler is not None and saved.get("scaler"):
        loss_scaler.load_state_dict(saved["scaler"])
    config.defrost()
    config.TRAIN.START_EPOCH = saved["epoch"] + 1
    config.freeze()
    logger.info(f"=> loaded successfully '{path}' (epoch {saved['epoch']})")
    return saved


def load_pretrained(
    config: Any,
    model: nn.Module,
    logger: logging.Logger,
    optimizer: Optimizer | None = None,
    resize_table: Callable[[Tensor, Size, Size], Tensor] | None = None,
) -> None:
    """Start from the weights of ``MODEL.PRETRAINED``, resized to this model (official ``utils.load_pretrained``).

    Args:
        optimizer: of the run, if there is one. `utils_moe.load_pretrained` needs it.
        resize_table: how position tables are resized; see `checkpoint.pretrained_state`.

    Raises ``ValueError`` where weights other than position tables, the first convolution's channels and the head do not
    fit; under ``EVAL_MODE`` also where the head does not.
    """
    start_from(config, model, logger, storage.read_checkpoint, resize_table)


def start_from(
    config: Any,
    model: nn.Module,
    logger: logging.Logger,
    read: Callable[[str], dict[str, Any]],
    resize_table: Callable[[Tensor, Size, Size], Tensor] | None = None,
) -> dict[str, Any]:
    """As `load_pretrained`, with what ``read`` gives of the path; returns that."""
    path = config.MODEL.PRETRAINED
    logger.info(f"==============> Loading weight {path} for fine-tuning......")
    saved = read(path)
    _load_weights(config, model, {**saved, "model": _chosen_weights(config, saved, path)}, path, logger, resize_table)
    logger.info(f"=> loaded successfully '{path}'")
    return saved


def _load_weights(
    config: Any, model: nn.Module, saved: dict, path: str, logger: logging.Logger, resize_table: Callable | None = None
) -> None:
    """Give ``model`` the weights of a checkpoint, fitted to its sizes; log what was changed."""
    resolution = getattr(getattr(model, "encoder", model), "patches_resolution", None)
    expected = model.state_dict()
    with _named(path, logger):
        check_architecture(config, saved["model"], expected)
        state, notes = pretrained_state(
            saved["model"],
            expected,
            rows_22k_to_1k(),
            _saved_resolution(saved.get("config")),
            None if resolution is None else tuple(resolution),
            resize_table,
        )
        if config.EVAL_MODE and classes_of(expected) and not keeps_head(saved["model"], expected):
            raise ValueError(
                f"head: {classes_of(saved['model']) or 'no'} classes in the file, {classes_of(expected)} in the model, "
                "so there is nothing to evaluate"
            )
        model.load_state_dict(state)
    if other_coordinates(saved["model"], state):
        key = f"MODEL.{config.MODEL.TYPE.upper()}.PRETRAINED_WINDOW_SIZES"
        notes.append(f"SwinV2's coordinates are those of {key}, not the file's")
    for note in notes:
        logger.info(note)
    theirs = {id(value) for value in saved["model"].values()}
    rebuilt, taken = sum(map(is_rebuilt, state)), sum(id(value) in theirs for value in state.values())
    logger.info(
        f"weights: {taken} as in the file, {len(state) - taken - rebuilt} changed or initialised as said above; "
        f"{rebuilt} buffers rebuilt"
    )


def _chosen_weights(config: Any, saved: dict[str, Any], path: str) -> dict[str, Tensor]:
    """The weights of a checkpoint to use; under ``EVAL_MODE`` with ``TEST.EMA`` the averaged ones."""
    if not (config.EVAL_MODE and config.TEST.EMA):
        return saved["model"]
    if "model_ema" not in saved:
        raise ValueError(f"{path}: holds no averaged weights (TRAIN.EMA_DECAY); set TEST.EMA False")
    return saved["model_ema"]


def _saved_resolution(config: dict | None) -> tuple[int, int] | None:
    """(H, W) of the first map of the model that a checkpoint was made with, if it says."""
    try:
        section = config["MODEL"][config["MODEL"]["TYPE"].upper()]
        size, patch = config["DATA"]["IMG_SIZE"], section["PATCH_SIZE"]
        return patches_of(to_2tuple(size), to_2tuple(patch), config["MODEL"].get("PAD_MAPS", False))
    except (KeyError, TypeError):
        return None


def check_architecture(config: Any, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ``ValueError``, naming the keys, where a file's model has other stages, or another width, than this one."""
    theirs, ours = architecture(state), architecture(expected)
    section = f"MODEL.{config.MODEL.TYPE.upper()}"
    for key in ("DEPTHS", "EMBED_DIM"):
        if theirs is not None and ours is not None and theirs[key] != ours[key]:
            raise ValueError(f"its model has {section}.{key}={theirs[key]}, this one {ours[key]}; give its own")


@contextmanager
def _named(path: str, logger: logging.Logger) -> Iterator[None]:
    """Name the file in errors about its weights, and log every key that does not fit."""
    try:
        yield
    except ValueError as err:
        if isinstance(err, WeightsError):
            for line in err.mismatch.lines():
                logger.warning(line)
        raise ValueError(f"{path}: {err}") from err


def rows_22k_to_1k() -> list[int]:
    """For each ImageNet-1K class, its row in an ImageNet-22K head (made by ``tools/make_22k_map.py``)."""
    return [int(line) for line in (Path(__file__).parent / "data" / "map22kto1k.txt").read_text().split()]


def save_checkpoint(
    config: Any,
    epoch: int,
    model: nn.Module,
    max_accuracy: float,
    optimizer: Optimizer,
    lr_scheduler: Any,
    loss_scaler: "NativeScalerWithGradNormCount",
    logger: logging.Logger,
    step: int = 0,
    **extra: Any,
) -> Path:
    """Write ``OUTPUT/ckpt_epoch_{epoch}.pth`` after an epoch (official ``utils.save_checkpoint``).

    Args:
        step: batches of this epoch done so far, if it is not finished; the file is then named after it, and its
            ``epoch`` is the last finished one.
        extra: plain data and tensors to keep beside the official keys.

    Returns:
        The file's path. It appears complete or not at all; files of the same epoch's earlier steps are removed.
    """
    state = training_state(config, epoch, model, max_accuracy, optimizer, lr_scheduler, loss_scaler, step, **extra)
    path = checkpoint_path(config, epoch, step)
    logger.info(f"{path} saving......")
    storage.write_atomically(state, path)
    logger.info(f"{path} saved !!!")
    for other in path.parent.glob("ckpt_epoch_*_step_*.pth"):
        if storage.progress_of(other) < storage.progress_of(path):
            other.unlink()
    return path


def training_state(
    config: Any,
    epoch: int,
    model: nn.Module,
    max_accuracy: float,
    optimizer: Optimizer,
    lr_scheduler: Any,
    loss_scaler: "NativeScalerWithGradNormCount",
    step: int = 0,
    **extra: Any,
) -> dict[str, Any]:
    """The content of a checkpoint; arguments as of `save_checkpoint`."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": lr_scheduler.state_dict(),
        "max_accuracy": max_accuracy,
        "scaler": loss_scaler.state_dict(),
        "epoch": epoch - 1 if step else epoch,
        "config": to_dict(config),
        **extra,
    }


def checkpoint_path(config: Any, epoch: int | str, step: int = 0) -> Path:
    return Path(config.OUTPUT) / (f"ckpt_epoch_{epoch}_step_{step}.pth" if step else f"ckpt_epoch_{epoch}.pth")


def save_best(
    config: Any, epoch: int, model: nn.Module, accuracy: float, classes: list[str], logger: logging.Logger
) -> Path:
    """Write ``OUTPUT/ckpt_best.pth``, the weights of the best epoch so far, for evaluation."""
    path = Path(config.OUTPUT) / "ckpt_best.pth"
    state = {"model": model.state_dict(), "max_accuracy": accuracy, "epoch": epoch, "config": to_dict(config)}
    storage.write_atomically({**state, "classes": classes}, path)
    logger.info(f"{path} saved: {accuracy:.2f}% after epoch {epoch}")
    return path


def best_accuracy(config: Any) -> float:
    """That of ``OUTPUT/ckpt_best.pth``, which an earlier run may have written; -1 where there is none."""
    path = Path(config.OUTPUT) / "ckpt_best.pth"
    return storage.read_checkpoint(path, mmap=True)["max_accuracy"] if path.exists() else -1.0


def auto_resume_helper(output_dir: str | Path, logger: logging.Logger | None = None) -> str | None:
    """The checkpoint of ``output_dir`` that is furthest in training and loads, or None where there is none.

    Files that do not load are passed over and named in the log.

    Raises ``ValueError`` where none loads: training must not silently begin again.
    """
    paths = Path(output_dir).glob("ckpt_epoch_*.pth")
    candidates = [path for path in paths if storage.CHECKPOINT_NAME.fullmatch(path.name)]
    candidates.sort(key=storage.progress_of, reverse=True)
    return storage.newest_that_loads(output_dir, candidates, storage.read_checkpoint, logger)


def get_grad_norm(parameters: Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """The norm of all gradients together, on their device."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_type)


def reduce_tensor(tensor: Tensor) -> Tensor:
    """The mean over ranks."""
    return distributed.all_reduce_sum(tensor.clone()) / distributed.world_size()


class NativeScalerWithGradNormCount:
    """Backward, unscale, clip, step, in one call; a step with non-finite gradients leaves everything as it was.

    Args:
        device_type: where gradients live; the accelerator, or the CPU, if None.
        enabled: scale the loss, as float16 needs; the official default on an accelerator.
    """

    state_dict_key = "amp_scaler"

    def __init__(self, device_type: str | None = None, enabled: bool | None = None):
        device_type = device_type or distributed.pick_device().type
        enabled = device_type != "cpu" if enabled is None else enabled
        self._scaler = torch.amp.GradScaler(device_type, enabled=enabled)

    def __call__(
        self,
        loss: Tensor,
        optimizer: Optimizer,
        clip_grad: float | None = None,
        parameters: Iterable[Tensor] | None = None,
        create_graph: bool = False,
        update_grad: bool = True,
        combine: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """Add the gradients of ``loss``; with ``update_grad``, also step.

        Args:
            combine: called before a step where gradients have yet to be brought together from several processes; it
                gives their norm, the same on all.

        Returns:
            The gradient norm before clipping, on the device, or None without ``update_grad``. It is not finite where
            the step was skipped.
        """
        self._scaler.scale(loss).backward(create_graph=create_graph)
        if not update_grad:
            return None
        if parameters is None:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
        parameters = list(parameters)
        norm = combine() if combine is not None else None
        if norm is not None and self._scaler.is_enabled():
            scale = self._scaler.scale(torch.ones_like(norm))
            _spread_non_finite(parameters, norm)
            norm = norm / scale
        self._scaler.unscale_(optimizer)
        if norm is None:
            norm = get_grad_norm(parameters)
        if clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            _step_if_finite(optimizer, norm)
        return norm

    def get_scale(self) -> float:
        """The loss scale; 1 where losses are not scaled. Reads a device value."""
        return self._scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state; a fresh one's where losses are not scaled, since the official code loads no empty one."""
        return self._scaler.state_dict() or torch.amp.GradScaler("cpu").state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:  # SimMIM's official files may hold an empty one
            self._scaler.load_state_dict(state_dict)


def _spread_non_finite(parameters: list[Tensor], norm: Tensor) -> None:
    """Where ``norm`` is not finite, make a gradient of this process so: a `GradScaler` looks at nothing else.

    The gradients that are not finite may be those of another process, and all must skip the step.
    """
    gradient = next(p.grad for p in parameters if p.grad is not None)
    gradient.add_(torch.where(torch.isfinite(norm), 0.0, torch.nan).to(gradient.dtype))


def _step_if_finite(optimizer: Optimizer, norm: Tensor) -> None:
    """Step unless ``norm`` is infinite or NaN; decided on the device where the optimizer can (as for GradScaler)."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif torch.isfinite(norm).item():
        optimizer.step()
