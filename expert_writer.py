"""Checkpoints of Swin-MoE on disk: writing them, every process its files, in the forms that `expert_files` reads.

One file alone would have to be gathered on the main process: a model of ten billion parameters takes 120 GB with its
optimizer. So every process writes what it holds, at once and without communication. A checkpoint of ours counts once
``ckpt_epoch_N.pth`` is there, which is written last and lists its parts with their sizes; parts bear the name of the
save that they belong to, so a save that breaks off never touches those of a complete checkpoint. Optimizer states are
kept by parameter name; PyTorch loads names like numbers.
"""

import os
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import distributed
import storage
from checkpoint_moe import (
    expert_layers,
    gather_experts,
    is_expert,
    optimizer_by_name,
    optimizer_by_position,
    process_optimizer,
)
from expert_files import checkpoint_files, escaped, files_by_base
from models.expert_parallel import expert_modules


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


class Writer:
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
            for part in self.path.parent.glob(f"{escaped(self.path.name)}.{self.save}.*"):
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
                temporary[name] = storage.write_temporary(content, self.path.with_name(name))
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


def remove_replaced(path: Path, kept: Collection[str]) -> None:
    """Remove other files of this checkpoint, what broken saves of it left, and those of earlier steps."""
    for file in checkpoint_files(path):
        if file.name not in kept:
            file.unlink()
    for file in path.parent.glob(f".{escaped(path.name)}*.tmp"):
        file.unlink()
    if not storage.CHECKPOINT_NAME.fullmatch(path.name):
        return
    for base, files in files_by_base(path.parent).items():
        if "_step_" in base and storage.progress_of(Path(base)) < storage.progress_of(path):
            for file in files:
                file.unlink()
