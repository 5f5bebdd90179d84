"""Pack image folders into shards: tar archives for WebDataset, or pixels decoded beforehand.

python tools/make_shards.py datasets/imagenet datasets/imagenet-shards --workers 16
python tools/make_shards.py datasets/imagenet datasets/imagenet-256 --shortest-side 256 --quality 90
python tools/make_shards.py datasets/imagenet datasets/imagenet-raw --format raw --shortest-side 256

SOURCE/<split>/<class>/<image> becomes TARGET/<split>/shard-000000.tar and so on with an index.json, the images shuffled
over all shards. Without --shortest-side and --quality, tar shards hold the files' own bytes.

Each image is decoded first, and each shard is read back and compared. All is written in a folder
TARGET/.<split>.partial, which gets its name once it is complete. After an interruption, run the same command again:
finished shards are kept.
"""

import argparse
import fcntl
import hashlib
import io
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.decoding import decode_pil
from data.raw import RECORD, RawSource, digest, records_path
from data.shard_index import INDEX
from data.shards import ShardSet, draws
from data.sources import FolderSource, class_names
from data.workers import start_worker
from logger import ProgressBar
from tools.scan import survey

SPLITS = ("train", "val")
SHARD_SIZES = {"tar": 1000, "raw": 10_000}  # a process maps only so many raw shards at a time
QUALITY = 90  # of images that are made smaller, unless --quality says another
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
PROGRESS = "progress"  # folder of what only an unfinished run needs
logger = logging.getLogger("make_shards")


@dataclass(frozen=True)
class Options:
    """How images are stored. With ``quality`` None, only images that are made smaller are encoded anew."""

    format: str = "tar"
    shard_size: int = SHARD_SIZES["tar"]
    shortest_side: int | None = None
    quality: int | None = None
    subsampling: str = "4:2:0"
    seed: int = 0

    def __post_init__(self):
        if self.format not in SHARD_SIZES:
            raise ValueError(f"--format {self.format}; choose from {', '.join(SHARD_SIZES)}")
        for flag, value, least in (
            ("--shard-size", self.shard_size, 1),
            ("--shortest-side", self.shortest_side, 1),
            ("--seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} {value}; choose a number from {least} on")
        if self.quality is not None and (self.format == "raw" or not 1 <= self.quality <= 100):
            raise ValueError(f"--quality {self.quality} is that of JPEG files in tar shards, from 1 to 100")


@dataclass(frozen=True)
class Job:
    """One shard to write: its place, and its images' numbers in the source, paths, labels and files' SHA-256."""

    folder: Path
    name: str
    numbers: list[int]
    paths: list[str]
    labels: list[int]
    digests: np.ndarray  # (images, 32), uint8
    classes: list[str]
    options: Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="folder with train/<class>/<image> and val/<class>/<image>")
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="what to pack")
    parser.add_argument("--format", choices=tuple(SHARD_SIZES), default="tar", help="encoded images, or their pixels")
    parser.add_argument("--shard-size", type=int, help="images per shard; else 1000, or 10000 raw ones")
    parser.add_argument("--shortest-side", type=int, help="shrink images whose shortest side is longer; bicubic")
    parser.add_argument("--quality", type=int, help="encode all images anew, as JPEG of this quality from 1 to 100")
    parser.add_argument("--subsampling", choices=SUBSAMPLINGS, default="4:2:0", help="of the colours of these JPEGs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0 for this one alone")
    parser.add_argument("--seed", type=int, default=0, help="of the images' order")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that do not decode")
    parser.add_argument("--force", action="store_true", help="replace finished shards")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    size = SHARD_SIZES[args.format] if args.shard_size is None else args.shard_size
    try:
        options = Options(args.format, size, args.shortest_side, args.quality, args.subsampling, args.seed)
        make_shards(args.source, args.target, args.splits, options, args.workers, args.skip_unreadable, args.force)
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted; the same command goes on")


def make_shards(
    source: Path,
    target: Path,
    splits: list[str],
    options: Options,
    workers: int = 0,
    skip_unreadable: bool = False,
    force: bool = False,
) -> None:
    """Write each split's shards to a folder in ``target``; a line in the log for each.

    Raises:
        ValueError: where files are unreadable, without ``skip_unreadable``, or classes do not fit.
        OSError: where the source is missing, a result exists, without ``force``, or cannot be written.
    """
    for split in splits:
        check_free(target / split, force)
    classes = class_names(source / ("train" if (source / "train").is_dir() else splits[0]))
    for split in splits:
        folder = FolderSource(source / split, None if split == "train" else classes)  # training has no empty class
        partial = target / f".{split}.partial"
        with only_run(partial / PROGRESS):
            line = pack(folder, partial, target / split, options, workers, skip_unreadable)
        logger.info(f"{source / split} -> {target / split}: {line}")


def check_free(target: Path, force: bool) -> None:
    """Raise ``FileExistsError`` where ``target`` may not be replaced: only shards may, and only with ``force``."""
    if target.exists() and not (target / INDEX).is_file():
        raise FileExistsError(f"{target} exists and is no set of shards; choose another folder, or move it away")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another folder, or replace it with --force")


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep ``folder`` for this run. Raises ``BlockingIOError`` where another one is at work there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not handed on to forked processes
        except BlockingIOError as err:
            raise BlockingIOError(f"{folder}: another run is at work here; wait for it or end it") from err
        yield


def pack(
    folder: FolderSource, partial: Path, target: Path, options: Options, workers: int, skip_unreadable: bool
) -> str:
    """Check the images, write their shards in ``partial`` and rename it to ``target``. Returns a line on the result."""
    check_same_run(folder, partial, options)
    checked = partial / PROGRESS / "checked.jsonl"
    readable, digests = survey(folder.paths, workers, checked, f"checking {target.name}", skip_unreadable)
    jobs = plan_jobs(folder, partial, options, readable, digests)
    bar, done, entries = ProgressBar(f"packing {target.name}", int(readable.sum())), 0, []
    try:
        for entry in write_all(jobs, workers):
            entries.append(entry)
            done += entry["samples"]
            bar.update(done)
    finally:
        bar.close()
    entries.sort(key=lambda entry: entry["name"])
    put_in_place(partial, target, index_of(entries, options, folder.classes))
    size, left_out = sum(entry["bytes"] for entry in entries), len(readable) - done
    return f"{done} images in {len(entries)} {options.format} shards, {size / 1e6:.1f} MB" + (
        f"; {left_out} unreadable ones left out" if left_out else ""
    )


def check_same_run(folder: FolderSource, partial: Path, options: Options) -> None:
    """Raise ``FileExistsError`` where ``partial`` holds shards of another run: other files or options."""
    plan = hashlib.sha256(json.dumps([asdict(options), folder.classes]).encode())
    for path, label in zip(folder.paths, folder.labels.tolist(), strict=True):
        state = os.stat(path)
        plan.update(f"{path!r} {label} {state.st_size} {state.st_mtime_ns}\n".encode())
    file = partial / PROGRESS / "plan"
    if any(partial.glob("shard-*")) and (not file.is_file() or file.read_text() != plan.hexdigest()):
        raise FileExistsError(
            f"{partial} holds shards of an unfinished run with other files or options; finish that one, or delete it"
        )
    file.write_text(plan.hexdigest())


def plan_jobs(
    folder: FolderSource, partial: Path, options: Options, readable: np.ndarray, digests: np.ndarray
) -> list[Job]:
    """Deal the readable images out to shards in shuffled order; only the last shard may be smaller.

    Raises ``ValueError`` for a class whose images are all unreadable.
    """
    for label in np.setdiff1d(folder.labels, folder.labels[readable]):
        raise ValueError(f"{folder.classes[label]}: no image of this class can be read; replace or delete the folder")
    order = np.argsort(draws(len(folder), options.seed), kind="stable")
    order = order[readable[order]]
    jobs = []
    for first in range(0, len(order), options.shard_size):
        numbers = order[first : first + options.shard_size]
        paths, labels = [folder.paths[number] for number in numbers], folder.labels[numbers].tolist()
        name = f"shard-{len(jobs):06d}.{options.format}"
        jobs.append(Job(partial, name, numbers.tolist(), paths, labels, digests[numbers], folder.classes, options))
    return jobs


def write_all(jobs: list[Job], workers: int) -> Iterator[dict[str, Any]]:
    """The shards' entries as they are finished. If one fails or the run is stopped, those begun are finished first."""
    if workers == 0:
        yield from map(write_shard, jobs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=start_worker)
    try:
        for future in as_completed([pool.submit(write_shard, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as err:
        raise OSError("a worker died while writing a shard; out of memory? use fewer --workers") from err
    finally:
        pool.shutdown(cancel_futures=True)


def put_in_place(partial: Path, target: Path, index: dict[str, Any]) -> None:
    """Write the index, give the folder its name, and delete what only an unfinished run needs."""
    write_json(index, partial / INDEX)
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(target / PROGRESS)
    shutil.rmtree(old, ignore_errors=True)


# One shard


def write_shard(job: Job) -> dict[str, Any]:
    """Write a shard, read it again, and put it in its place. Returns its entry of the index. A finished one is kept.

    Raises ``ValueError`` or ``OSError`` where an image cannot be read, or something else is read than was written.
    """
    note = job.folder / PROGRESS / f"{job.name}.json"
    if note.is_file():
        entry = json.loads(note.read_text())
        if is_whole(job.folder, entry):
            return entry
    scratch = job.folder / PROGRESS / job.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        entry, written = WRITERS[job.options.format](scratch / job.name, job)
        write_json(index_of([entry], job.options, job.classes), scratch / INDEX)
        check_written(job, scratch, entry, written)
        for path in scratch.glob("shard-*"):
            os.replace(path, job.folder / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_json(entry, note)
    return entry


def write_tar(path: Path, job: Job) -> tuple[dict[str, Any], list[str]]:
    """Write ``<key>.<suffix>`` and ``<key>.cls`` for each image. Returns the index's entry and the images' digests."""
    written = []
    with HashingFile(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for number, source, label, expected in zip(job.numbers, job.paths, job.labels, job.digests, strict=True):
            key, (data, suffix) = key_of(number, source), encode(read(source, expected), source, job.options)
            add(archive, f"{key}.{suffix}", data)
            add(archive, f"{key}.cls", b"%d" % label)
            written.append(checksum(data))
    return {"name": path.name, "samples": len(written), "bytes": file.size, "sha256": file.digest}, written


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a member without date and owner, so that the same images give the same archive."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def write_raw(path: Path, job: Job) -> tuple[dict[str, Any], list[str]]:
    """Write pixels and records. Returns as `write_tar`."""
    written, records = [], np.zeros(len(job.paths), RECORD)
    with HashingFile(path) as file:
        for record, source, label, expected in zip(records, job.paths, job.labels, job.digests, strict=True):
            pixels = np.asarray(shrink(decode_pil(read(source, expected), source), job.options.shortest_side))
            record["offset"], record["label"] = file.size, label
            record["height"], record["width"] = pixels.shape[:2]
            file.write(pixels.tobytes())
            written.append(checksum(pixels))
    with HashingFile(records_path(path)) as records_file:
        np.save(records_file, records)
    entry = {"name": path.name, "samples": len(written), "bytes": file.size, "sha256": file.digest}
    return {**entry, "records_sha256": records_file.digest}, written


WRITERS = {"tar": write_tar, "raw": write_raw}


def check_written(job: Job, scratch: Path, entry: dict[str, Any], written: list[str]) -> None:
    """Read a shard as training does and compare labels and digests; what was encoded anew is decoded.

    Raises ``ValueError`` or ``OSError`` where it is not what was written.
    """
    if job.options.format == "tar":
        encoded = job.options.quality is not None or job.options.shortest_side is not None
        images = read_tar(scratch, encoded)
    else:
        source = RawSource(scratch)
        images = ((source.read(i), int(source.labels[i])) for i in range(len(source)))
    found = [(checksum(data), label) for data, label in images]
    if found != list(zip(written, job.labels, strict=True)) or not is_whole(scratch, entry):
        raise OSError(f"{job.folder / job.name}: something else is read from it than was written; check the disk")


def read_tar(folder: Path, decode: bool) -> Iterator[tuple[bytes, int]]:
    """(data, label) of the images in a folder's shards. Raises ``ValueError`` naming one that is wrong."""
    shards = ShardSet(folder)
    for shard in range(len(shards.urls)):
        for _, name, data, label in shards.read(shard):
            if isinstance(data, ValueError):
                raise data
            if decode:
                decode_pil(data, name)
            yield data, label


def is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    """Whether a shard's files are there with the digests of its entry."""
    path = folder / entry["name"]
    files = {path: entry["sha256"]}
    if "records_sha256" in entry:
        files[records_path(path)] = entry["records_sha256"]
    return all(file.is_file() and digest(file) == expected for file, expected in files.items())


def key_of(number: int, path: str) -> str:
    """A sample's key: its number in the source, which makes it unique, then class and file for people to read.

    A dot would end it, as `webdataset` has it, and a plain tar header holds 100 bytes.
    """
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{number:08d}-{Path(path).parent.name[:40]}-{Path(path).stem[:40]}")


def read(path: str, expected: np.ndarray) -> bytes:
    """A file's bytes. Raises ``OSError`` where their SHA-256 is another than when the file was checked."""
    data = Path(path).read_bytes()
    if hashlib.sha256(data).digest() != expected.tobytes():
        raise OSError(f"{path}: changed while it was being packed; leave the files alone and run the command again")
    return data


def encode(data: bytes, path: str, options: Options) -> tuple[bytes, str]:
    """An image's bytes and their suffix: the file's own, or JPEG where it is made smaller or --quality asks for it."""
    own = data, path.rsplit(".", 1)[-1].lower()
    if options.shortest_side is None and options.quality is None:
        return own
    image = decode_pil(data, path)
    smaller = shrink(image, options.shortest_side)
    if smaller is image and options.quality is None:
        return own
    result = io.BytesIO()
    smaller.save(result, "JPEG", quality=options.quality or QUALITY, subsampling=options.subsampling)
    return result.getvalue(), "jpg"


def shrink(image: Image.Image, shortest_side: int | None) -> Image.Image:
    """The image with that shortest side, bicubic with antialiasing; the same one where it is not larger."""
    shortest = min(image.size)
    if shortest_side is None or shortest <= shortest_side:
        return image
    width, height = (round(side * shortest_side / shortest) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


class HashingFile:
    """A new file that knows its size and SHA-256 once it is closed; then it is on the disk."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self.digest = ""

    def __enter__(self) -> "HashingFile":
        self.file = open(self.path, "xb")
        self.hash = hashlib.sha256()
        return self

    def write(self, data: bytes) -> int:
        self.size += len(data)
        self.hash.update(data)
        return self.file.write(data)

    def __exit__(self, *_: Any) -> None:
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.digest = self.hash.hexdigest()


def checksum(data: bytes | np.ndarray) -> str:
    """A digest of an image's bytes, or of its pixels and their shape."""
    shape = getattr(data, "shape", None)
    return hashlib.sha256(f"{shape} ".encode() + (data if shape is None else data.tobytes())).hexdigest()


def index_of(entries: list[dict[str, Any]], options: Options, classes: list[str]) -> dict[str, Any]:
    return {"format": options.format, "num_classes": len(classes), "classes": classes, "shards": entries}


def write_json(content: Any, path: Path) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
