"""Checkpoints of Swin-MoE on disk: the official ``utils_moe.py`` around the pure functions of `checkpoint_moe`.

Read are files of any number of processes, by any other number:

- ours: ``ckpt_epoch_N.pth``, the whole checkpoint where one process holds all experts, and else all but the experts,
  with a list of the files ``ckpt_epoch_N.pth.<save>.expertsRofW`` beside it, one for each process that holds some;
- official: ``ckpt_epoch_N.pth.rankR``, everything that process R has; those of experts alone with
  ``ckpt_epoch_N.pth.master`` for the rest; ``ckpt_epoch_N.pth.global``.

One file alone would have to be gathered on the main process: a model of ten billion parameters takes 120 GB with its
optimizer. So every process writes what it holds, at once and without communication, and reads what it needs: tensors
are mapped from the files, and only the rows and columns that a process takes are read. A checkpoint of ours counts once
``ckpt_epoch_N.pth`` is there, which is written last and lists its parts with their sizes; parts bear the name of the
save that they belong to, so a save that breaks off never touches those of a complete checkpoint. Optimizer states are
kept by parameter name; PyTorch loads names like numbers. All processes must see all files.
"""

import logging
import os
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import distributed
import utils
from checkpoint_moe import (
    COUNTER,
    expert_layers,
    gate_experts,
    gather_experts,
    is_expert,
    merge_master,
    names_in_groups,
    optimizer_by_name,
    optimizer_by_position,
    prefix_of,
    process_optimizer,
    process_state,
)
from config import to_dict
from models.expert_parallel import expert_modules
from models.swin_transformer_moe import SwinTransformerMoE
from optimizer import needs_no_decay
from utils import NativeScalerWithGradNormCount, reduce_tensor

__all__ = [
    "NativeScalerWithGradNormCount",
    "auto_resume_helper",
    "load_checkpoint",
    "load_pretrained",
    "reduce_tensor",
    "save_checkpoint",
]

SUFFIXED = re.compile(r"(.+\.pth)\.(?:rank(\d+)|master|global|[0-9a-f]{8}\.experts\d+of\d+)")
EVERY_PROCESS_SAVES = True  # its experts


@dataclass(frozen=True)
class Place:
    """A process among those that hold a model's experts between them; of several such groups, one writes."""

    rank: int = 0
    processes: int = 1
    writes: bool = True


def place_of(model: nn.Module) -> Place:
    """Where this process stands. Of copies of all experts the first ones' processes write; of none the main process."""
    groups = next((module.expert_groups for _, module in expert_modules(model)), None)
    if groups is None:
        return Place(writes=distributed.is_main())
    return Place(groups.rank, groups.size, distributed.rank() < groups.size)


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


def read_process(path: str | Path, rank: int = 0, processes: int = 1, with_optimizer: bool = True) -> dict[str, Any]:
    """A checkpoint in any form as process ``rank`` of ``processes`` needs it; by default the whole.

    Args:
        path: of any of its files, or ``….pth`` for those that begin so.

    Returns:
        As `utils.read_checkpoint`, but with the optimizer's state by name.

    Raises:
        FileNotFoundError: where it, or one of its files, is missing.
        ValueError: where its files cannot be read or do not belong together, or experts do not divide so.
    """
    saved = read_saved(path)
    try:
        content = {**saved.others, "model": process_state(saved.states, rank, processes, saved.files)}
        if with_optimizer and saved.optimizers:
            layers = expert_layers(saved.states, saved.files)
            optimizers = [_named_optimizer(*pair) for pair in zip(saved.states, saved.optimizers, strict=True)]
            content["optimizer"] = process_optimizer(optimizers, layers, rank, processes)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    return content


def _named_optimizer(state: dict[str, Tensor], optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state by name, from a file that may have numbers."""
    if all(isinstance(name, str) for group in optimizer["param_groups"] for name in group["params"]):
        return optimizer
    return optimizer_by_name(optimizer, names_in_groups(state, optimizer, _exempt))


def _exempt(name: str, value: Tensor) -> bool:
    """Whether a parameter of Swin-MoE has no weight decay. Its class says it; no model is at hand."""
    model = SwinTransformerMoE
    return needs_no_decay(name, value, model.no_weight_decay(None), model.no_weight_decay_keywords(None))


@dataclass
class Saved:
    """A checkpoint as its files have it, tensors mapped: states of all processes by rank, and what there is once."""

    states: list[dict[str, Tensor]]
    files: list[str]
    others: dict[str, Any]
    optimizers: list[dict[str, Any]] = field(default_factory=list)


def read_saved(path: str | Path) -> Saved:
    """The files of a checkpoint; arguments and errors as of `read_process`."""
    if str(path).startswith("https:"):
        return _saved([utils.read_checkpoint(path)], [str(path)])
    path = Path(path)
    match = SUFFIXED.fullmatch(path.name)
    base = path.with_name(match[1]) if match else path
    ending = path.name.removeprefix(base.name)
    ranks, whole = _rank_files(base), base.with_name(f"{base.name}.global")
    if base.is_file() and not ending.startswith((".rank", ".master", ".global")):
        return _read_native(base)
    if ranks and ending != ".global":
        return _read_ranks(base, ranks)
    if whole.is_file():
        return _saved([utils.read_checkpoint(whole, mmap=True)], [whole.name])
    raise FileNotFoundError(f"{path}: no such checkpoint, and no {base.name}, {base.name}.rank0 or {whole.name} either")


def _saved(contents: list[dict[str, Any]], files: list[str]) -> Saved:
    """Contents of files by rank, each complete."""
    states = [content.pop("model") for content in contents]
    optimizers = [content.pop("optimizer") for content in contents if "optimizer" in content]
    if optimizers and len(optimizers) < len(states):
        raise ValueError(f"{files[0]} …: only {len(optimizers)} of {len(states)} files hold an optimizer's state")
    return Saved(states, files, contents[0], optimizers)


def _read_native(path: Path) -> Saved:
    shared = utils.read_checkpoint(path, mmap=True)
    listed = shared.pop("expert_parts", None)
    if listed is None:
        return _saved([shared], [path.name])
    contents = []
    for entry in listed["files"]:
        part = path.with_name(entry["file"])
        if not part.is_file():
            raise FileNotFoundError(f"{part}: missing; {path.name} needs it")
        if (size := part.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{part}: {size} bytes, of {entry['bytes']} that {path.name} lists; copy it again")
        contents.append(utils.read_checkpoint(part, mmap=True))
    others = {name: value for name, value in shared.items() if name not in ("model", "optimizer")}
    states = [{**shared["model"], **content["model"]} for content in contents]
    # An official optimizer state numbers parameters in the order of the weights: it must not get lost.
    saved = Saved([{name: state[name] for name in listed["names"]} for state in states], [], others)
    saved.files = [entry["file"] for entry in listed["files"]]
    if "optimizer" in shared:
        optimizer = shared["optimizer"]
        states = [{**optimizer["state"], **content["optimizer"]} for content in contents]
        saved.optimizers = [{**optimizer, "state": state} for state in states]
    return saved


def _rank_files(base: Path) -> dict[int, Path]:
    matches = (SUFFIXED.fullmatch(path.name) for path in base.parent.glob(f"{_escaped(base.name)}.rank*"))
    return {int(match[2]): base.with_name(match[0]) for match in matches if match and match[2]}


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _read_ranks(base: Path, files: dict[int, Path]) -> Saved:
    lacking = sorted(set(range(max(files) + 1)) - files.keys())
    if lacking:
        raise FileNotFoundError(
            f"{base}.rank{lacking[0]}: missing; {len(files)} other .rank file(s) of this checkpoint are there"
        )
    paths = [files[rank] for rank in range(len(files))]
    contents = [utils.read_checkpoint(path, mmap=True) for path in paths]
    names = [path.name for path in paths]
    _check_same_save(contents, names)
    if all(is_expert(name) for name in contents[0]["model"]):
        master = base.with_name(f"{base.name}.master")
        if not master.is_file():
            raise FileNotFoundError(f"{master}: missing; {names[0]} holds experts alone")
        shared = utils.read_checkpoint(master, mmap=True)
        _check_same_save([contents[0], {"epoch": contents[0].get("epoch"), **shared}], [names[0], master.name])
        states = merge_master([content["model"] for content in contents], shared["model"], master.name)
        contents = [{**content, "model": state} for content, state in zip(contents, states, strict=True)]
    for content in contents:
        content.pop("save", None)
    return _saved(contents, names)


def _check_same_save(contents: Sequence[dict[str, Any]], files: Sequence[str]) -> None:
    """Raise ``ValueError`` where files are of different epochs or, if they are ours, of different saves."""
    for key in ("epoch", "save"):
        first = contents[0].get(key)
        for content, file in zip(contents, files, strict=True):
            if content.get(key) != first:
                raise ValueError(
                    f"{file}: its {key} is {content.get(key)}, that of {files[0]} {first}; they are of different saves"
                )


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
    writer = _Writer(path, place_of(model), content, group_names(model, optimizer))
    logger.info(f"{path} saving......")
    if config.TRAIN.MOE.CHECKPOINT == "native":
        kept = writer.native()
    elif config.TRAIN.MOE.SAVE_MASTER:
        kept = writer.whole()
    else:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        kept = writer.ranks(trained if zero_redundancy else None)
    distributed.together(lambda: _remove_replaced(path, kept) if distributed.is_main() else None)
    logger.info(f"{path} saved !!!")
    return path


def save_best(
    config: Any, epoch: int, model: nn.Module, accuracy: float, classes: list[str], logger: logging.Logger
) -> Path:
    """As `utils.save_best`, in our form. Every process must call it."""
    path = Path(config.OUTPUT) / "ckpt_best.pth"
    content = {"model": model.state_dict(), "max_accuracy": accuracy, "epoch": epoch, "config": to_dict(config)}
    content |= {"classes": classes, **_frozen(model)}
    kept = _Writer(path, place_of(model), content, []).native()
    distributed.together(lambda: _remove_replaced(path, kept) if distributed.is_main() else None)
    logger.info(f"{path} saved: {accuracy:.2f}% after epoch {epoch}")
    return path


def _frozen(model: nn.Module) -> dict[str, list[int]]:
    """What a checkpoint must say of `freeze_experts`."""
    frozen = getattr(model, "frozen_experts", None)
    return {"frozen_experts": frozen} if frozen else {}


class _Writer:
    """Writes one checkpoint, every process its files; methods return the names of all files.

    Args:
        content: of this process, with its own experts and an optimizer's state by position.
        names: of the parameters of each of the optimizer's groups.
    """

    def __init__(self, path: Path, place: Place, content: dict[str, Any], names: list[list[str]]):
        self.path, self.place, self.content, self.names = path, place, content, names
        self.save = distributed.broadcast_object(secrets.token_hex(4))

    def native(self) -> set[str]:
        content = self._by_name()
        if self.place.processes == 1:
            return self._write({self.path.name: content} if distributed.is_main() else {}).keys()
        experts, shared = _split(content)
        try:
            name = f"{self.path.name}.{self.save}.experts{self.place.rank}of{self.place.processes}"
            written = self._write({name: experts} if self.place.writes else {})
            order = [name.replace(f"experts{self.place.rank}of", f"experts{r}of") for r in range(self.place.processes)]
            files = [{"file": part, "bytes": written[part]} for part in order]
            shared["expert_parts"] = {"files": files, "names": list(content["model"])}
            last = self._write({self.path.name: shared} if distributed.is_main() else {})
        except Exception:
            for part in self.path.parent.glob(f"{_escaped(self.path.name)}.{self.save}.*"):
                part.unlink(missing_ok=True)
            raise
        return written.keys() | last.keys()

    def whole(self) -> set[str]:
        contents = distributed.gather_objects(_on_cpu(self._by_name()) if self.place.writes else None)
        contents = [content for content in contents if content is not None]
        whole = distributed.together(lambda: self._gathered(contents) if contents else None)
        return self._write({f"{self.path.name}.global": whole} if whole else {}).keys()

    def _gathered(self, contents: list[dict[str, Any]]) -> dict[str, Any]:
        """The official content of one process that holds all, out of the contents of all, by rank."""
        states = [content["model"] for content in contents]
        whole = {**contents[0], "model": gather_experts(states)}
        if "optimizer" in whole:
            optimizers = [content["optimizer"] for content in contents]
            named = process_optimizer(optimizers, expert_layers(states), 0, 1)
            whole["optimizer"] = optimizer_by_position(named, self.names)
        return whole

    def ranks(self, trained: set[str] | None) -> set[str]:
        """Whole states, or only ``trained`` experts with the rest in ``.master``. Without experts all are the same."""
        place, content = self.place, {**self.content, "save": self.save}
        if not any(map(is_expert, content["model"])):
            place = Place(distributed.rank(), distributed.world_size())
        name = f"{self.path.name}.rank{place.rank}"
        files = {name: content}
        if trained is not None:
            own = {key: value for key, value in content["model"].items() if is_expert(key) and key in trained}
            rest = {key: value for key, value in content["model"].items() if key not in own}
            files[name] = {**content, "model": own}
            if place.rank == 0:
                files[f"{self.path.name}.master"] = {**content, "model": rest}
        return self._write(files if place.writes else {}).keys()

    def _by_name(self) -> dict[str, Any]:
        if "optimizer" not in self.content:
            return self.content
        return {**self.content, "optimizer": optimizer_by_name(self.content["optimizer"], self.names)}

    def _write(self, files: dict[str, dict[str, Any]]) -> dict[str, int]:
        """Write this process's files, which appear once all processes have written theirs. All names and sizes."""
        temporary: dict[str, Path] = {}

        def write() -> dict[str, int]:
            for name, content in files.items():
                temporary[name] = utils.write_temporary(content, self.path.with_name(name))
            return {name: path.stat().st_size for name, path in temporary.items()}

        def show() -> None:
            for name, path in temporary.items():
                os.replace(path, self.path.with_name(name))

        try:
            sizes = distributed.together(write)
            distributed.together(show)
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)
        gathered = distributed.gather_objects(sizes)
        return distributed.broadcast_object({name: size for own in gathered for name, size in own.items()})


def _split(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a process's checkpoint is of its experts, and the rest."""
    experts: dict[str, Any] = {"model": {k: v for k, v in content["model"].items() if is_expert(k)}}
    shared = {**content, "model": {k: v for k, v in content["model"].items() if not is_expert(k)}}
    if "optimizer" in content:
        state = content["optimizer"]["state"]
        experts["optimizer"] = {name: entry for name, entry in state.items() if is_expert(name)}
        rest = {name: entry for name, entry in state.items() if not is_expert(name)}
        shared["optimizer"] = {**content["optimizer"], "state": rest}
    return experts, shared


def _on_cpu(value: Any) -> Any:
    """Plain data with all tensors on the CPU: processes may have devices of other numbers."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _files_by_base(folder: Path) -> dict[str, list[Path]]:
    """All files of checkpoints, by the name that they begin with. The one that counts comes first."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("ckpt_epoch_*.pth*")):
        match = SUFFIXED.fullmatch(path.name)
        base = match[1] if match else path.name
        if utils.CHECKPOINT_NAME.fullmatch(base):
            files.setdefault(base, []).append(path)
    return files


def checkpoint_files(path: Path) -> list[Path]:
    """All files of the checkpoint ``….pth``, of any form, that are there."""
    found = []
    for file in sorted(path.parent.glob(f"{_escaped(path.name)}*")):
        match = SUFFIXED.fullmatch(file.name)
        if file.name == path.name or (match and match[1] == path.name):
            found.append(file)
    return found


def _remove_replaced(path: Path, kept: Collection[str]) -> None:
    """Remove other files of this checkpoint, what broken saves of it left, and those of earlier steps."""
    for file in checkpoint_files(path):
        if file.name not in kept:
            file.unlink()
    for file in path.parent.glob(f".{_escaped(path.name)}*.tmp"):
        file.unlink()
    if not utils.CHECKPOINT_NAME.fullmatch(path.name):
        return
    for base, files in _files_by_base(path.parent).items():
        if "_step_" in base and utils.progress_of(Path(base)) < utils.progress_of(path):
            for file in files:
                file.unlink()


def auto_resume_helper(
    output_dir: str | Path, save_master: bool = False, logger: logging.Logger | None = None
) -> str | None:
    """As `utils.auto_resume_helper`, for all forms: the checkpoint that is furthest in training and complete.

    Args:
        save_master: of the official function; files of every form are found without it.
    """
    del save_master
    bases = _files_by_base(Path(output_dir))
    candidates = []
    for base in sorted(bases, key=lambda name: utils.progress_of(Path(name)), reverse=True):
        names = {path.name for path in bases[base]}
        ranks = [path for path in bases[base] if path.suffix.startswith(".rank")]
        forms = [base] if base in names else []
        forms += [ranks[0].name] if ranks else []
        forms += [f"{base}.global"] if f"{base}.global" in names else []
        candidates += [Path(output_dir) / form for form in forms]
    return utils.newest_that_loads(output_dir, candidates, _check_resumable, logger)


def _check_resumable(path: Path) -> None:
    """Raise as `read_process` where training cannot go on from a checkpoint. Its tensors are not read."""
    saved = read_saved(path)
    try:
        expert_layers(saved.states, saved.files)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    if not saved.optimizers or "epoch" not in saved.others:
        raise ValueError(f"{path}: holds weights alone, from which training cannot go on")


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
