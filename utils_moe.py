"""Checkpoints of Swin-MoE under the official names of ``utils_moe.py``: any form, any number of processes.

Files are read by `expert_files` and written by `expert_writer`; what becomes of experts on other numbers of processes
is in `checkpoint_moe`. All processes must see all files.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import distributed
import storage
import utils
from checkpoint_moe import COUNTER, gate_experts, is_expert, optimizer_by_position, prefix_of
from config import to_dict
from expert_files import check_resumable, files_by_base, read_process
from expert_writer import Writer, place_of, remove_replaced
from utils import NativeScalerWithGradNormCount, reduce_tensor

__all__ = [
    "NativeScalerWithGradNormCount",
    "auto_resume_helper",
    "load_checkpoint",
    "load_pretrained",
    "reduce_tensor",
    "save_checkpoint",
]

EVERY_PROCESS_SAVES = True  # its experts


def load_checkpoint(
    config: Any,
    model: nn.Module,
    optimizer: Optimizer | None,
    lr_scheduler: Any | None,
    loss_scaler: NativeScalerWithGradNormCount | None,
    logger: logging.Logger,
) -> float:
    """As `utils.load_checkpoint`, for any form of checkpoint and number of processes. Every process must call it."""
    return resume(config, model, optimizer, lr_scheduler, loss_scaler, logger).get("max_accuracy", 0.0)


def resume(
    config: Any,
    model: nn.Module,
    optimizer: Optimizer | None,
    lr_scheduler: Any | None,
    loss_scaler: NativeScalerWithGradNormCount | None,
    logger: logging.Logger,
) -> dict[str, Any]:
    """As `utils.resume`, for any form of checkpoint and any number of processes. Every process must call it.

    Raises ``OSError`` where only another process could not read it.
    """
    training = optimizer is not None and not config.EVAL_MODE

    def read(path: str) -> dict[str, Any]:
        saved = _read_for(model, path, with_optimizer=training)
        if training and "optimizer" in saved:
            try:
                saved["optimizer"] = optimizer_by_position(saved["optimizer"], group_names(model, optimizer))
            except ValueError as err:
                raise ValueError(f"{path}: its optimizer state is not that of this model: {err}") from err
        return saved

    parts = (optimizer, lr_scheduler, loss_scaler, logger)
    saved = distributed.together(lambda: utils.resume(config, model, *parts, read=read))
    if training and saved.get("frozen_experts"):
        freeze_experts(model, optimizer, saved["frozen_experts"])
    return saved


def load_pretrained(config: Any, model: nn.Module, logger: logging.Logger, optimizer: Optimizer | None = None) -> None:
    """As `utils.load_pretrained`, for any form of checkpoint and any number of processes. Every process must call it.

    Args:
        optimizer: needed to train from a file whose experts are in part frozen, as upcycling may make it.

    Raises ``OSError`` where only another process could not read it.
    """
    read = partial(_read_for, model, with_optimizer=False)
    saved = distributed.together(lambda: utils.start_from(config, model, logger, read))
    if saved.get("frozen_experts") and not config.EVAL_MODE:
        if optimizer is None:
            raise ValueError(
                f"{config.MODEL.PRETRAINED} has frozen experts; load_pretrained must be given the optimizer"
            )
        freeze_experts(model, optimizer, saved["frozen_experts"])
        logger.info(f"frozen experts: {saved['frozen_experts']}")


def _read_for(model: nn.Module, path: str, with_optimizer: bool) -> dict[str, Any]:
    """What this process needs of a checkpoint, with the model's ranks of biases, and counters where it has them.

    Tutel of mid-2022 has other ones than later versions.
    """
    place, own = place_of(model), model.state_dict()
    saved = read_process(path, place.rank, place.processes, with_optimizer)

    def shaped(name: str, value: Any) -> Any:
        if not is_expert(name) or name not in own or not isinstance(value, Tensor) or not value.ndim:
            return value
        return value.reshape(own[name].shape) if value.numel() == own[name].numel() else value

    state = saved["model"]
    saved["model"] = {n: shaped(n, state[n]) for n in state if n in own or not n.endswith(COUNTER)}
    if "optimizer" in saved:
        entries = saved["optimizer"]["state"]
        state = {n: {key: shaped(n, value) for key, value in entry.items()} for n, entry in entries.items()}
        saved["optimizer"] = {**saved["optimizer"], "state": state}
    return saved


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters of each group of an optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def save_checkpoint(
    config: Any,
    epoch: int | str,
    model: nn.Module,
    max_accuracy: float,
    optimizer: Optimizer,
    lr_scheduler: Any,
    loss_scaler: NativeScalerWithGradNormCount,
    logger: logging.Logger,
    zero_redundancy: bool = False,
    step: int = 0,
    **extra: Any,
) -> Path:
    """Write a checkpoint of ``OUTPUT/ckpt_epoch_{epoch}.pth`` in the form of ``TRAIN.MOE.CHECKPOINT``.

    Every process must call it (official ``utils_moe.save_checkpoint``). The official form is one ``.rank`` file for
    each process, or with ``TRAIN.MOE.SAVE_MASTER`` one ``.global``, for which the main process gathers the whole.

    Args:
        zero_redundancy: weights alone, the official form of them as ``.rank`` files of experts and one ``.master``.
        step, extra: as of `utils.save_checkpoint`.

    Returns:
        The path to resume from, with which the files' names begin. Other files of this epoch, and those of earlier
        steps, are removed.

    Raises ``OSError`` on every process where one could not write; what was there before stays.
    """
    path = utils.checkpoint_path(config, epoch, step)
    parts = (max_accuracy, optimizer, lr_scheduler, loss_scaler)
    content = utils.training_state(config, epoch, model, *parts, step, **extra)
    content |= _frozen(model)
    if zero_redundancy:
        content = {key: content[key] for key in ("model", "frozen_experts") if key in content}
    writer = Writer(path, place_of(model), content, group_names(model, optimizer))
    logger.info(f"{path} saving......")
    if config.TRAIN.MOE.CHECKPOINT == "native":
        kept = writer.native()
    elif config.TRAIN.MOE.SAVE_MASTER:
        kept = writer.whole()
    else:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = writer.ranks(trained if zero_redundancy else None)
    distributed.together(lambda: remove_replaced(path, kept) if distributed.is_main() else None)
    logger.info(f"{path} saved !!!")
    return path


def save_best(
    config: Any, epoch: int, model: nn.Module, accuracy: float, classes: list[str], logger: logging.Logger
) -> Path:
    """As `utils.save_best`, in our form. Every process must call it."""
    path = Path(config.OUTPUT) / "ckpt_best.pth"
    content = {"model": model.state_dict(), "max_accuracy": accuracy, "epoch": epoch, "config": to_dict(config)}
    content |= {"classes": classes, **_frozen(model)}
    kept = Writer(path, place_of(model), content, []).native()
    distributed.together(lambda: remove_replaced(path, kept) if distributed.is_main() else None)
    logger.info(f"{path} saved: {accuracy:.2f}% after epoch {epoch}")
    return path


def _frozen(model: nn.Module) -> dict[str, list[int]]:
    """What a checkpoint must say of `freeze_experts`."""
    frozen = getattr(model, "frozen_experts", None)
    return {"frozen_experts": frozen} if frozen else {}


def auto_resume_helper(
    output_dir: str | Path, save_master: bool = False, logger: logging.Logger | None = None
) -> str | None:
    """As `utils.auto_resume_helper`, for all forms: the checkpoint that is furthest in training and complete.

    Args:
        save_master: of the official function; files of every form are found without it.
    """
    del save_master
    bases = files_by_base(Path(output_dir))
    candidates = []
    for base in sorted(bases, key=lambda name: storage.progress_of(Path(name)), reverse=True):
        names = {path.name for path in bases[base]}
        ranks = [path for path in bases[base] if path.suffix.startswith(".rank")]
        forms = [base] if base in names else []
        forms += [ranks[0].name] if ranks else []
        forms += [f"{base}.global"] if f"{base}.global" in names else []
        candidates += [Path(output_dir) / form for form in forms]
    return storage.newest_that_loads(output_dir, candidates, check_resumable, logger)


def freeze_experts(model: nn.Module, optimizer: Optimizer, experts: Sequence[int]) -> None:
    """Keep these experts, of all layers, as they are: no gradient, no weight decay. Checkpoints remember it.

    Experts of a layer lie in one parameter, so those rows are put back after each step.
    """
    place, state = place_of(model), model.state_dict()
    held: list[tuple[Tensor, Tensor, Tensor]] = []
    for name, parameter in model.named_parameters():
        if not is_expert(name) or not parameter.requires_grad:
            continue
        total, local = gate_experts(state, prefix_of(name), "the model"), len(parameter)
        if outside := [expert for expert in experts if not 0 <= expert < total]:
            raise ValueError(f"frozen expert {outside[0]}: {name} has {total}")
        first = place.rank * total // place.processes
        rows = [expert - first for expert in experts if first <= expert < first + local]
        if rows:
            index = torch.tensor(rows, device=parameter.device)
            parameter.register_hook(lambda grad, index=index: grad.index_fill(0, index, 0))
            held.append((parameter, index, parameter.detach()[index].clone()))

    @torch.no_grad()
    def put_back(*_: Any) -> None:
        for parameter, index, values in held:
            parameter.index_copy_(0, index, values)

    optimizer.register_step_post_hook(put_back)
    model.frozen_experts = sorted(experts)
