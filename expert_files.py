"""Checkpoints of Swin-MoE on disk: their files, and reading them, whatever number of processes wrote or reads them.

Read are files of any number of processes, by any other number:

- ours: ``ckpt_epoch_N.pth``, the whole checkpoint where one process holds all experts, and else all but the experts,
  with a list of the files ``ckpt_epoch_N.pth.<save>.expertsRofW`` beside it, one for each process that holds some;
- official: ``ckpt_epoch_N.pth.rankR``, everything that process R has; those of experts alone with
  ``ckpt_epoch_N.pth.master`` for the rest; ``ckpt_epoch_N.pth.global``.

Tensors are mapped from the files, so only the rows and columns that a process takes are read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

import storage
from checkpoint_moe import (
    expert_layers,
    is_expert,
    merge_master,
    names_in_groups,
    optimizer_by_name,
    process_optimizer,
    process_state,
)
from models.swin_transformer_moe import SwinTransformerMoE
from optimizer import needs_no_decay

SUFFIXED = re.compile(r"(.+\.pth)\.(?:rank(\d+)|master|global|[0-9a-f]{8}\.experts\d+of\d+)")


def read_process(path: str | Path, rank: int = 0, processes: int = 1, with_optimizer: bool = True) -> dict[str, Any]:
    """A checkpoint in any form as process ``rank`` of ``processes`` needs it; by default the whole.

    Args:
        path: of any of its files, or ``….pth`` for those that begin so.

    Returns:
        As `storage.read_checkpoint`, but with the optimizer's state by name.

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
        return _saved([storage.read_checkpoint(path)], [str(path)])
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
        return _saved([storage.read_checkpoint(whole, mmap=True)], [whole.name])
    raise FileNotFoundError(f"{path}: no such checkpoint, and no {base.name}, {base.name}.rank0 or {whole.name} either")


def _saved(contents: list[dict[str, Any]], files: list[str]) -> Saved:
    """Contents of files by rank, each complete."""
    states = [content.pop("model") for content in contents]
    optimizers = [content.pop("optimizer") for content in contents if "optimizer" in content]
    if optimizers and len(optimizers) < len(states):
        raise ValueError(f"{files[0]} …: only {len(optimizers)} of {len(states)} files hold an optimizer's state")
    return Saved(states, files, contents[0], optimizers)


def _read_native(path: Path) -> Saved:
    shared = storage.read_checkpoint(path, mmap=True)
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
        contents.append(storage.read_checkpoint(part, mmap=True))
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
    matches = (SUFFIXED.fullmatch(path.name) for path in base.parent.glob(f"{escaped(base.name)}.rank*"))
    return {int(match[2]): base.with_name(match[0]) for match in matches if match and match[2]}


def escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


def _read_ranks(base: Path, files: dict[int, Path]) -> Saved:
    lacking = sorted(set(range(max(files) + 1)) - files.keys())
    if lacking:
        raise FileNotFoundError(
            f"{base}.rank{lacking[0]}: missing; {len(files)} other .rank file(s) of this checkpoint are there"
        )
    paths = [files[rank] for rank in range(len(files))]
    contents = [storage.read_checkpoint(path, mmap=True) for path in paths]
    names = [path.name for path in paths]
    _check_same_save(contents, names)
    if all(is_expert(name) for name in contents[0]["model"]):
        master = base.with_name(f"{base.name}.master")
        if not master.is_file():
            raise FileNotFoundError(f"{master}: missing; {names[0]} holds experts alone")
        shared = storage.read_checkpoint(master, mmap=True)
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


def files_by_base(folder: Path) -> dict[str, list[Path]]:
    """All files of checkpoints, by the name that they begin with. The one that counts comes first."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("ckpt_epoch_*.pth*")):
        match = SUFFIXED.fullmatch(path.name)
        base = match[1] if match else path.name
        if storage.CHECKPOINT_NAME.fullmatch(base):
            files.setdefault(base, []).append(path)
    return files


def checkpoint_files(path: Path) -> list[Path]:
    """All files of the checkpoint ``….pth``, of any form, that are there."""
    found = []
    for file in sorted(path.parent.glob(f"{escaped(path.name)}*")):
        match = SUFFIXED.fullmatch(file.name)
        if file.name == path.name or (match and match[1] == path.name):
            found.append(file)
    return found


def check_resumable(path: Path) -> None:
    """Raise as `read_process` where training cannot go on from a checkpoint. Its tensors are not read."""
    saved = read_saved(path)
    try:
        expert_layers(saved.states, saved.files)
    except ValueError as err:
        raise ValueError(f"{path}: {err}") from err
    if not saved.optimizers or "epoch" not in saved.others:
        raise ValueError(f"{path}: holds weights alone, from which training cannot go on")
