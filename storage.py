"""Checkpoint files: written whole or not at all, read as plain data, downloaded once, chosen by their names."""

import errno
import hashlib
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distributed

# What official checkpoints pickle besides tensors: a yacs config, read here as a plain dict, and NumPy scalars.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
OFFICIAL_PICKLES = [
    (OrderedDict, "yacs.config.CfgNode"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
]
CHECKPOINT_NAME = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")


def write_atomically(state: dict[str, Any], path: Path) -> None:
    """Save to a temporary file, flush it to the disk, rename it: a crash leaves the old file or the new one."""
    temporary = write_temporary(state, path)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_temporary(state: dict[str, Any], path: Path) -> Path:
    """Save to a temporary file beside ``path``, flush it to the disk, and return it; nothing stays where this fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint as plain data on the CPU, from a file or an ``https`` URL. Nothing in it is executed.

    A bare state dict is taken as ``{"model": …}``. With ``mmap`` tensors stay in the file until they are used; files of
    PyTorch before 1.6, which have another form, are read as a whole.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is truncated, or holds anything but tensors and plain data.
    """
    file = download(str(path)) if str(path).startswith("https:") else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with torch.serialization.safe_globals(OFFICIAL_PICKLES):
            mapped = mmap and zipfile.is_zipfile(file)
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as err:  # damaged bytes make an unpickler fail in any way, even seek to before the file
        if isinstance(err, MemoryError) or (isinstance(err, OSError) and err.errno != errno.EINVAL):
            raise  # the machine's fault, not the file's: an older file must not take its place
        if isinstance(err, pickle.UnpicklingError) and (culprit := re.search(r"GLOBAL (\S+)|function (\S+)", str(err))):
            raise ValueError(
                f"{path}: refused, since loading {culprit[1] or culprit[2]} could run code; only tensors and plain "
                "data are read. Save its state dict alone"
            ) from err
        raise ValueError(f"{path}: truncated or not a checkpoint; use another one, or copy it again") from err
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{path}: expected a checkpoint with the key 'model', found {type(saved).__name__}")
    if "model" not in saved:
        if not all(isinstance(value, Tensor) for value in saved.values()):
            raise ValueError(f"{path}: no key 'model' among {sorted(map(str, saved))[:8]}")
        saved = {"model": saved}
    return saved


def download(url: str) -> Path:
    """Fetch ``https://…/file.pth`` or ``https://…/file.pth#sha256=…`` once per machine, into torch's cache.

    The digest, or one that the file name ends in (``-0123abcd.pth``), is checked.

    Raises ``ValueError`` where the digest differs or the address cannot be reached.
    """
    address, _, fragment = url.partition("#")
    digest = fragment.removeprefix("sha256=") or None
    if digest is None and (named := re.search(r"-(?!\d+\.)([0-9a-f]{8,})\.pth$", address)):  # not a date
        digest = named[1]
    folder = hashlib.sha256(address.encode()).hexdigest()[:12]  # other addresses may end in the same name
    file = Path(torch.hub.get_dir()) / "checkpoints" / folder / address.rsplit("/", 1)[-1]
    error = None
    if distributed.local_rank() == 0 and not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(file), progress=False)
        except OSError as err:
            error = err
    distributed.barrier()  # also after a failure, or the others would wait
    if not file.exists():
        reason = "the first process of this machine says why" if error is None else error
        raise ValueError(f"{address}: cannot be downloaded: {reason}") from error
    if digest and not hashlib.sha256(file.read_bytes()).hexdigest().startswith(digest):
        raise ValueError(f"{file}: its sha256 does not begin with {digest}; delete it and download {address} again")
    return file


def newest_that_loads(
    folder: str | Path, candidates: list[Path], load: Callable[[Path], Any], logger: logging.Logger | None
) -> str | None:
    """The first of ``candidates``, the newest first, that ``load`` takes; as `auto_resume_helper`."""
    for path in candidates:
        try:
            load(path)
        except (ValueError, FileNotFoundError) as err:
            if logger is not None:
                logger.warning(f"auto-resume passed over {err}")
            continue
        return str(path)
    if candidates:
        raise ValueError(
            f"{folder}: none of its {len(candidates)} checkpoint(s) loads; move them away to start "
            "anew, or name one with --resume"
        )
    return None


def progress_of(path: Path) -> tuple[int, int]:
    """(epochs finished, batches of the next one) from a checkpoint's name."""
    epoch, step = CHECKPOINT_NAME.fullmatch(path.name).groups()
    return (int(epoch), int(step)) if step else (int(epoch) + 1, 0)
