"""Convert weights of Swin and SwinV2 classification models between four libraries' layouts.

python tools/convert_checkpoint.py swin_tiny_patch4_window7_224.pth swin_tiny.safetensors --to timm
python tools/convert_checkpoint.py model.safetensors swinv2.pth --to torchvision --window-size 8

Files are .pth, .pt, .bin or .safetensors; transformers also wants a config.json, which its SwinConfig and Swinv2Config
write. What is done with the weights is in `conversion`.
"""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from conversion import LAYOUTS, convert, detect
from storage import read_checkpoint, write_atomically

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
logger = logging.getLogger("convert_checkpoint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", help="a file, or the https address of one that is not .safetensors")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="layout of the target")
    parser.add_argument("--from", choices=LAYOUTS, dest="source_layout", help="layout of the source; else by its names")
    parser.add_argument("--window-size", type=int, help="of SwinV2, in every stage; for torchvision, where unknown")
    parser.add_argument("--force", action="store_true", help="replace an existing target")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        convert_file(args.source, args.target, args.to, args.source_layout, args.window_size, args.force)
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def convert_file(
    source: str | Path,
    target: Path,
    to: str,
    source_layout: str | None = None,
    window_size: int | None = None,
    force: bool = False,
) -> None:
    """Write the weights of ``source`` to ``target`` in the layout ``to``, and log a line that says what was done.

    Raises:
        ValueError: where the source cannot be read or converted.
        OSError: where the target exists, without ``force``, or cannot be written.
    """
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{target}: choose a name that ends in one of {', '.join(SUFFIXES)}")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with --force")
    state, others = read_weights(source)
    try:
        layout = source_layout or detect(state)
        converted, notes = convert(state, layout, to, window_size)
    except ValueError as err:
        raise ValueError(f"{source}: {err}") from err
    write_weights(converted, target, to)
    if others:
        notes.append(f"left out {', '.join(others)}, which is no weight")
    logger.info("; ".join([f"{source} ({layout}) -> {target} ({to}): {len(converted)} tensors", *notes]))


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict of a file, and what else is in it.

    Raises ``ValueError`` or ``OSError`` where it is not a file of weights.
    """
    if str(path).endswith(".safetensors"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; only a file here can be .safetensors")
        try:
            return load_file(path), []
        except safetensors.SafetensorError as err:
            raise ValueError(f"{path}: truncated or not a .safetensors file: {err}") from err
    saved: dict[str, Any] = read_checkpoint(path)
    state = saved.pop("model")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: its key 'model' does not hold tensors by name")
    return state, sorted(map(str, saved))


def write_weights(state: dict[str, Tensor], path: Path, layout: str) -> None:
    """Save a state dict, official ones in a .pth file as ``{"model": state}``; it appears whole or not at all."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if path.suffix != ".safetensors":
        return write_atomically({"model": state} if layout == "official" else state, path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # The format wants each tensor in memory of its own; transformers wants to be told whose they are.
        save_file({name: value.clone().contiguous() for name, value in state.items()}, temporary, {"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
