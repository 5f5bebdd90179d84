"""Checking image files in a pool of processes: does each decode, how large is it, and which files are the same?"""

import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data.workers import start_worker
from logger import ProgressBar

CHUNK = 32  # files of one task of a worker
AHEAD = 4  # tasks per worker that wait, so that memory stays small for millions of files
SHOWN = 10  # groups of equal files that get a line each

logger = logging.getLogger(__name__)


class Scanned(NamedTuple):
    """What was found out about a file.

    Attributes:
        digest: sha256 of its bytes, in hexadecimal digits; empty where it cannot be read.
        size: (width, height) in pixels, or None where it does not decode.
        error: why it cannot be read or decoded, on one line; None where it can.
    """

    path: str
    digest: str
    size: tuple[int, int] | None
    error: str | None


Stamp = tuple[int, int]  # a file's length in bytes and its time of change: is it still the file that was checked?


def scan(paths: Iterable[str], workers: int, journal: Path | None = None) -> Iterator[Scanned]:
    """Read and decode each file, as RGB, and yield the results in the order of ``paths``.

    Args:
        workers: processes that check; 0 checks in this one.
        journal: a file of results. A later call with the same first paths takes theirs from it, so that an
            interrupted check goes on; files changed since are checked again, with all that follow.

    Raises:
        OSError: where a worker dies, or another run holds the journal.
    """
    if journal is None:
        for result, _ in _examine_all(paths, workers):
            yield result
        return
    with open(journal, "a+b") as file:
        _lock(file, journal)
        file.seek(0)
        left, position = iter(paths), 0
        for path in left:
            known = _recall(file.readline(), path)
            if known is None:
                left = chain([path], left)
                break
            yield known
            position = file.tell()
        file.truncate(position)
        for result, stamp in _examine_all(left, workers):
            file.write(json.dumps([result, stamp]).encode() + b"\n")
            yield result


def survey(
    paths: Sequence[str], workers: int, journal: Path, label: str, skip_unreadable: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Scan files with a progress bar; a line in the log for each unreadable one, and for the first of equal ones.

    Returns:
        which files are images, (files,), bool, and the files' sha256, (files, 32), uint8, zeros where unreadable.

    Raises:
        ValueError: where a file is unreadable, unless ``skip_unreadable``; once all have been checked.
    """
    readable, digests = np.ones(len(paths), bool), np.zeros((len(paths), 32), np.uint8)
    bar, first = ProgressBar(label, len(paths)), ""
    for index, item in enumerate(scan(paths, workers, journal)):
        if item.error:
            bar.close()
            logger.warning(f"{item.path}: {item.error}")
            first = first or f"{item.path}: {item.error}"
            readable[index] = False
        if item.digest:
            digests[index] = np.frombuffer(bytes.fromhex(item.digest), np.uint8)
        bar.update(index + 1)
    bar.close()
    faults = int((~readable).sum())
    if faults and not skip_unreadable:
        raise ValueError(
            f"{faults} of {len(paths)} files cannot be read, first {first}; replace or delete them, or leave them out "
            f"with --skip-unreadable"
        )
    _report_equal(paths, equal_files(digests))
    return readable, digests


def equal_files(digests: np.ndarray) -> list[np.ndarray]:
    """Groups of files with the same bytes, as positions in ``digests``, (files, 32), uint8. Zeros stand for no file."""
    keys = np.ascontiguousarray(digests).view(np.uint64)
    order = np.lexsort(keys.T)
    same = (keys[order][1:] == keys[order][:-1]).all(1)
    groups = np.split(order, np.flatnonzero(~same) + 1)
    return [np.sort(group) for group in groups if len(group) > 1 and keys[group[0]].any()]


def _report_equal(paths: Sequence[str], groups: list[np.ndarray]) -> None:
    groups = sorted(groups, key=lambda group: group[0])
    for group in groups[:SHOWN]:
        logger.warning(f"the same bytes: {', '.join(paths[index] for index in group[:SHOWN])}")
    if groups:
        logger.warning(f"{sum(map(len, groups)) - len(groups)} file(s) repeat the bytes of another; all are kept")


def examine(path: str) -> tuple[Scanned, Stamp]:
    """Read and decode one file."""
    try:
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            data = file.read()
    except OSError as err:
        return Scanned(path, "", None, f"cannot be read: {err.strerror}"), (-1, -1)
    stamp, digest = (state.st_size, state.st_mtime_ns), hashlib.sha256(data).hexdigest()
    if not data:
        return Scanned(path, digest, None, "is empty"), stamp
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # what is odd but decodes is no matter here
            return Scanned(path, digest, image.convert("RGB").size, None), stamp
    except Exception as err:  # damaged bytes make a decoder fail in any way
        reason = re.sub(r" <_io\.BytesIO.*?>", "", " ".join(str(err).split()))
        return Scanned(path, digest, None, f"does not decode: {reason or type(err).__name__}"), stamp


def _examine_chunk(paths: list[str]) -> list[tuple[Scanned, Stamp]]:
    return [examine(path) for path in paths]


def _examine_all(paths: Iterable[str], workers: int) -> Iterator[tuple[Scanned, Stamp]]:
    if workers == 0:
        yield from map(examine, paths)
        return
    left, waiting = iter(paths), deque()
    # Forked, as the loaders' workers are: a spawned process would import the calling script first.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        while True:
            while len(waiting) < workers * AHEAD and (chunk := list(islice(left, CHUNK))):
                waiting.append((chunk, pool.submit(_examine_chunk, chunk)))
            if not waiting:
                return
            chunk, future = waiting.popleft()
            yield from future.result()
    except BrokenProcessPool as err:
        raise OSError(
            f"a worker died while checking files from {chunk[0]} on; out of memory? use fewer --workers"
        ) from err
    finally:
        pool.shutdown(cancel_futures=True)


def _recall(line: bytes, path: str) -> Scanned | None:
    """The result in a line of a journal, if it is whole, of this path, and the file has not changed since."""
    try:
        (known, digest, size, error), stamp = json.loads(line)
        state = os.stat(path)
    except (ValueError, TypeError, OSError):
        return None
    if known != path or stamp != [state.st_size, state.st_mtime_ns]:
        return None
    return Scanned(path, digest, size and tuple(size), error)


def _lock(file: BinaryIO, journal: Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers would inherit
    except (BlockingIOError, PermissionError) as err:  # POSIX leaves the choice to the system
        raise BlockingIOError(f"{journal}: another run is at work here; wait for it or end it") from err
