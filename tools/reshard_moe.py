"""Swin-MoE checkpoints: gather all processes' files to one, split them over any number, make experts of a dense model.

python tools/reshard_moe.py gather swin_moe_small_32expert.pth whole.pth
python tools/reshard_moe.py split ckpt_epoch_89.pth official.pth --processes 8
python tools/reshard_moe.py upcycle dense.pth moe.pth --cfg configs/swinmoe/CONFIG.yaml --experts 8 --noise 0.01

A source is a checkpoint in any form that `expert_files` reads, named by its .pth or any of its files; main_moe.py reads
all of them too, on any number of processes. gather writes one file of ours, split the official .pth.rank0, .rank1, …,
both with optimizer states where the source has them. Nothing is overwritten; files get their names once all are
written, and are read back.
"""

import argparse
import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from checkpoint_moe import expert_layers, optimizer_by_position, upcycle
from config import get_config, to_dict
from expert_files import checkpoint_files, read_process
from models import build_model
from storage import write_temporary

logger = logging.getLogger("reshard_moe")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="gather | split | upcycle")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("source", help="a checkpoint in any form")
        sub.add_argument("target", type=Path, help="the file to write, or what files begin with; ends in .pth")
        sub.set_defaults(action=action)
        return sub

    command("gather", gather, "write the whole checkpoint as one file")
    sub = command("split", split, "write the official file of each process")
    sub.add_argument("--processes", type=int, required=True, help="that many files")
    sub = command("upcycle", make_experts, "turn MLPs of a dense Swin-MoE model into experts")
    sub.add_argument("--cfg", required=True, metavar="FILE", help="YAML configuration of the model with experts")
    sub.add_argument("--opts", nargs="+", metavar=("KEY", "VALUE"), help="keys to override, as KEY VALUE pairs")
    sub.add_argument("--experts", type=int, required=True, help="experts in each layer, over all processes")
    sub.add_argument("--noise", type=float, default=0.0, help="added to weights of experts, relative to their spread")
    sub.add_argument("--freeze", type=int, default=0, help="the first so many get no noise and are never trained")
    sub.add_argument("--seed", type=int, default=0, help="of the gates and the noise")
    args = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        args.pop("action")(**args)
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def gather(source: str, target: Path) -> None:
    """Write the whole of ``source`` to ``target``. Raises ``ValueError`` or ``OSError`` as all commands do."""
    check_free(target)
    content = read_process(source)
    report(source, target, content, write_all([(target, content)], target, content))


def split(source: str, target: Path, processes: int) -> None:
    """Write ``target.rank0``, …: for each process its weights and, where ``source`` has it, its optimizer's state."""
    if processes < 1:
        raise ValueError(f"--processes {processes}: at least 1")
    check_free(target)
    whole = read_process(source)
    save = secrets.token_hex(4)

    def contents() -> Iterator[tuple[Path, dict[str, Any]]]:
        for rank in range(processes):
            content = read_process(source, rank, processes)
            if "optimizer" in content:
                names = [group["params"] for group in content["optimizer"]["param_groups"]]
                content["optimizer"] = optimizer_by_position(content["optimizer"], names)
            yield target.with_name(f"{target.name}.rank{rank}"), {**content, "save": save}

    report(source, f"{target}.rank0 … .rank{processes - 1}", whole, write_all(contents(), target, whole))


def make_experts(
    source: str,
    target: Path,
    cfg: str | None,
    experts: int,
    noise: float = 0.0,
    freeze: int = 0,
    seed: int = 0,
    opts: Sequence[str] | None = None,
) -> None:
    """Write a Swin-MoE of which all experts are MLPs of the dense model in ``source``, and the gates are new."""
    if experts < 1 or not 0 <= freeze <= experts or noise < 0:
        raise ValueError(f"--experts {experts} --freeze {freeze} --noise {noise}: must be positive, and freeze within")
    check_free(target)
    dense = read_process(source, with_optimizer=False)["model"]
    config = get_config(SimpleNamespace(cfg=cfg, opts=opts))
    config.defrost()
    if config.MODEL.TYPE != "swin_moe":
        raise ValueError(f"{cfg}: MODEL.TYPE={config.MODEL.TYPE!r} has no experts; choose one of configs/swinmoe")
    config.MODEL.SWIN_MOE.NUM_EXPERTS = experts
    if "head.weight" in dense:
        config.MODEL.NUM_CLASSES = len(dense["head.weight"])
    warn_of_other_logits(config.MODEL.SWIN_MOE)
    torch.manual_seed(seed)
    expected = build_model(config).state_dict()
    generator = torch.Generator().manual_seed(seed)
    try:
        state = upcycle(dense, expected, noise, freeze, generator)
    except ValueError as err:
        raise ValueError(f"{source}: {err}") from err
    content = {"model": state, "config": to_dict(config)}
    if freeze:
        content["frozen_experts"] = list(range(freeze))
    report(source, target, content, write_all([(target, content)], target, content))


def warn_of_other_logits(section: Any) -> None:
    """Say which settings keep the new model from starting with the dense model's logits."""
    if section.TOP_VALUE == 1 or not section.NORMALIZE_GATE:
        logger.warning(
            f"MODEL.SWIN_MOE.TOP_VALUE={section.TOP_VALUE} NORMALIZE_GATE={section.NORMALIZE_GATE}: gates scale what "
            "experts give, so logits are not the dense model's; with NORMALIZE_GATE True and TOP_VALUE 2 they are"
        )
    if section.CAPACITY_FACTOR > 0 and section.PATH == "capacity":
        logger.warning(
            f"MODEL.SWIN_MOE.CAPACITY_FACTOR={section.CAPACITY_FACTOR}: tokens that find no place pass by, which "
            "changes logits too; with CAPACITY_FACTOR 0 or PATH dropless none do"
        )


def check_free(target: Path) -> None:
    """Raise where files of this name cannot be written, or would be taken for other ones."""
    if target.suffix != ".pth":
        raise ValueError(f"{target}: choose a name that ends in .pth")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder")
    if existing := checkpoint_files(target):
        raise FileExistsError(f"{existing[0]} exists; choose another name, or move it away")


def write_all(contents: Iterable[tuple[Path, dict[str, Any]]], target: Path, whole: dict[str, Any]) -> str:
    """Write files that appear once all are written, and read them back as ``target``, which must be ``whole``.

    Returns the digest. Raises ``OSError`` where something else is read; nothing stays then.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents:
            temporary[path] = write_temporary(content, path)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for written in temporary.values():
            written.unlink(missing_ok=True)
    expected = digest(whole)
    try:
        if (found := digest(read_process(target))) != expected:
            raise ValueError(f"its sha256 is {found}, not {expected}")
    except (ValueError, OSError) as err:
        for path in temporary:
            path.unlink()
        raise OSError(f"{target}: differs from what was written; check the disk, run the command again: {err}") from err
    return expected


def report(source: Any, target: Any, content: dict[str, Any], sha256: str) -> None:
    layers = expert_layers([content["model"]])
    counts = sorted({layer.experts for layer in layers.values()})
    numbers = sum(value.numel() for value in content["model"].values())
    others = ", ".join(sorted(content.keys() - {"model"})) or "nothing else"
    logger.info(
        f"{source} -> {target}: {len(content['model'])} tensors of {numbers} numbers, {len(layers)} layer(s) of "
        f"{', '.join(map(str, counts)) or 'no'} experts; {others}; sha256 {sha256}"
    )


def digest(content: Any) -> str:
    """SHA-256 of a checkpoint's content, in whatever files it is: names, types, shapes and bytes."""
    result = hashlib.sha256()
    for name, value in leaves(content):
        result.update(f"{name} ".encode())
        if isinstance(value, Tensor):
            result.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            result.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            result.update(repr(value).encode())
    return result.hexdigest()


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Tensors and plain values in nested data, by path; keys are sorted."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from leaves(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}/{i}")
    else:
        yield name, value


if __name__ == "__main__":
    main()
