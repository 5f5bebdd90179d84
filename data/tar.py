"""Reading tar shards: local files and commands, by `webdataset`, with errors that name shard and member.

A sample is ``<key>.jpg`` (or another image suffix) and ``<key>.cls``, which holds the class number as text.
"""

import importlib
import os
import re
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from .sources import UNKNOWN

PIPE = "pipe:"
IMAGE_SUFFIXES = frozenset(suffix[1:] for suffix in IMG_EXTENSIONS)
SECONDS_TO_END = 5  # for a command that was told to end, before it is killed

Data = bytes | ValueError  # a sample's encoded image, or what is wrong with the sample


def read_samples(url: str) -> Iterator[dict[str, Any]]:
    """`webdataset`'s samples of a shard: ``__key__`` and, by suffix, the members' bytes."""
    wds = import_webdataset("tariterators")
    member = ""

    def note(name: str) -> bool:
        nonlocal member
        member = name
        return True

    with _opened(url) as stream:
        files = wds.tar_file_expander([{"url": url, "stream": _Ending(stream)}], select_files=note)
        with _named(url, lambda: member):
            yield from wds.group_by_keys(files)


class _Ending:
    """A stream that may be read a few times after its end. tarfile would go on for as long as a damaged size says."""

    def __init__(self, stream: Any):
        self.stream, self.left = stream, 16

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= not data
        if self.left < 0:
            raise EOFError("unexpected end of data")
        return data


@contextmanager
def _named(url: str, member: Callable[[], str]) -> Iterator[None]:
    """Turn what reading an archive raises into ``ValueError`` or ``OSError`` with the shard and the member."""
    try:
        yield
    except Exception as err:  # nothing narrower: tarfile raises whatever a damaged header leads to
        text = err if isinstance(err, OSError) or not err.args else err.args[0]  # webdataset adds to the arguments
        reason = " ".join(str(text).split(" @ ")[0].split()) or type(err).__name__
        where = f"at or after member {printable(member())}" if member() else "from the beginning"
        kind = OSError if isinstance(err, OSError) else ValueError
        raise kind(f"{url}: damaged {where}: {reason}; copy or pack the shard again") from err


@contextmanager
def _opened(url: str) -> Iterator[Any]:
    """A stream of the shard's bytes. Raises ``OSError`` where the command of a pipe fails."""
    if not url.startswith(PIPE):
        with open(url, "rb", buffering=1 << 20) as file:
            yield file
        return
    # In a session of its own: Ctrl-C is for the main process, which may want some more batches before it saves.
    pipe = import_webdataset("gopen").Pipe(
        url[len(PIPE) :], mode="rb", shell=True, stdin=subprocess.DEVNULL, start_new_session=True, ignore_errors=True
    )
    owner = os.getpid()
    try:
        yield pipe
        for _ in range(64):  # the archive's padding, without which the command cannot end
            if not pipe.read(1 << 16):
                break
        _check_exit(url, pipe.proc)
    except (ValueError, OSError) as err:
        _check_exit(url, pipe.proc, err)
        raise
    finally:
        if os.getpid() == owner:  # a forked worker must not end the command of the main process
            _end(pipe)


def _check_exit(url: str, command: subprocess.Popen, cause: Exception | None = None) -> None:
    """Raise ``OSError`` where the command has failed; one that still runs is taken for sound."""
    try:
        code = command.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return
    if code:
        raise OSError(f"{url}: the command ended with exit code {code}; try it by hand") from cause


def _end(pipe: Any) -> None:
    """End a command and what it has started, whether or not it has written everything."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if pipe.proc.poll() is None:
            os.killpg(pipe.proc.pid, number)
            with suppress(subprocess.TimeoutExpired):
                pipe.proc.wait(timeout=SECONDS_TO_END)
    pipe.close()


def unpack(sample: dict[str, Any], url: str, num_classes: int | None, labelled: bool = True) -> tuple[str, Data, int]:
    """(name, data, label) of a sample; a ``ValueError`` and `UNKNOWN` where it is no labelled image.

    Args:
        labelled: whether it needs a label; if not, 0 stands for one that is missing.
    """
    name = f"{url}@/{printable(sample['__key__'])}"
    images = sorted(IMAGE_SUFFIXES.intersection(sample))
    if len(images) != 1:
        members = ", ".join(printable(suffix) for suffix in sample if not suffix.startswith("__"))
        return name, ValueError(f"{name}: {len(images)} images among its members ({members}); expected 1"), UNKNOWN
    name, data, text = f"{name}.{images[0]}", sample[images[0]], sample.get("cls")
    if text is None and not labelled:
        text = b"0"
    if text is None:
        return name, ValueError(f"{name}: no label; expected a member .cls with the number of its class"), UNKNOWN
    if not re.fullmatch(rb"\s*[0-9]{1,9}\s*", text):
        return name, ValueError(f"{name}: its .cls is {text[:20]!r}; expected the number of its class"), UNKNOWN
    label = int(text)
    if num_classes is not None and label >= num_classes:
        return name, ValueError(f"{name}: label {label}, but there are {num_classes} classes, from 0"), UNKNOWN
    if not data:
        return name, ValueError(f"{name}: 0 bytes; pack the shard again without it"), UNKNOWN
    return name, data, label


def printable(name: str) -> str:
    """A member's name on one line, whatever bytes it is made of."""
    return repr(name)[1:-1]


def import_webdataset(module: str) -> Any:
    try:
        return importlib.import_module(f"webdataset.{module}")
    except ImportError as err:
        raise ValueError("tar shards need webdataset, not installed; run: python -m pip install webdataset") from err


def count_samples(path: Path) -> int:
    """The samples of a local shard, by the members' headers.

    Raises ``ValueError`` naming the shard and the last good member where it is damaged.
    """
    member, key, samples = "", None, 0
    wds = import_webdataset("tariterators")
    with open(path, "rb") as file, _named(str(path), lambda: member), tarfile.open(fileobj=file, mode="r:") as archive:
        while (info := archive.next()) is not None:
            if archive.offset < info.offset_data:  # a negative size would be read for ever
                raise ValueError("a size below 0")
            member, archive.members = info.name, []
            prefix = wds.base_plus_ext(info.name)[0]
            if info.isreg() and prefix is not None and not _is_meta(info.name):
                samples += prefix != key
                key = prefix
        # tarfile takes a damaged header for the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise ValueError("a damaged header, or no end of the archive")
    return samples


def _is_meta(name: str) -> bool:
    """Whether `webdataset` passes over a member."""
    return bool(re.match(r"__[^/]*__($|/)", name)) or (
        "/" not in name and name.startswith("__") and name.endswith("__")
    )
