"""Check a data set in any form: classes, synsets, sizes, unreadable and repeated images; a table and a contact sheet.

python tools/check_dataset.py datasets/imagenet --workers 16
python tools/check_dataset.py datasets/imagenet-zip --source zip --synsets imagenet1k
python tools/check_dataset.py datasets/flowers --splits train --synsets flowers.txt --output flowers-report

Every image is read and decoded. The table and what it names go to the terminal and to OUTPUT/summary.json, some images
of some classes to OUTPUT/contact_sheet.png. The exit code is 0 where nothing is wrong. It is 1 for unreadable images,
labels out of range, training classes without images, strange or misplaced synsets, and images that both splits have.
Images that come twice within a split are reported, and no fault.

Without --synsets, the data's classes are compared with ImageNet-1k's 1000 where most of them are among those, and a
subset of at most 500 is sound. Classes that --synsets gives must all be there.
"""

import argparse
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from timm.data import ImageNetInfo

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import nearest
from data.classes import read_class_list
from data.decoding import decode_pil
from data.lists import ListSource
from data.raw import RawSource
from data.shards import ShardSet
from data.sources import FolderSource, Source, class_names
from data.tiny_imagenet import TinyImageNetSource
from data.workers import start_worker
from data.zipped import ZipSource
from logger import ProgressBar
from tools.scan import equal_files

SPLITS = ("train", "val")
SHOWN = 20  # images, pairs or classes that are named; the others are counted
CHUNK = 32  # images of one task of a worker
AHEAD = 4  # tasks per worker that wait
IMAGENET = "imagenet1k"
WNID = re.compile(r"n\d{8}")

# The contact sheet, in pixels
TILE, GAP, CAPTION, TITLE = 96, 6, 38, 20
COLUMNS, ROWS = 12, 8
GROUPS = (12, 6, 4, 3, 2, 1)  # tiles that a class may have, so that a row holds whole classes

logger = logging.getLogger("check_dataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("data", type=Path, metavar="DATA_PATH", help="the data's folder, as for --data-path")
    parser.add_argument("--source", choices=tuple(SOURCES), default="folder", help="the form of the data")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="what to check")
    parser.add_argument("--synsets", help=f"classes in their order: {IMAGENET}, none, or a file with one a line")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; 0 for this one alone")
    parser.add_argument("--output", type=Path, help="folder for the results; check_<name> here if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the contact sheet's choice")
    parser.add_argument("--force", action="store_true", help="replace existing results")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        faults = check_dataset(**vars(args))
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {printable(err)}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted")
    if faults:
        sys.exit(f"{Path(__file__).name}: error: {printable(args.data)}: {printable('; '.join(faults))}")


def check_dataset(
    data: Path,
    source: str = "folder",
    splits: Sequence[str] = SPLITS,
    synsets: str | None = None,
    workers: int = 0,
    output: Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> list[str]:
    """Check a data set, log a table and write ``summary.json`` and ``contact_sheet.png``. Returns the faults.

    Raises:
        ValueError: where the data, or a list of classes, cannot be understood at all.
        OSError: where a part is missing, results exist, without ``force``, or they cannot be written.
    """
    for flag, value in (("--workers", workers), ("--seed", seed)):
        if value < 0:
            raise ValueError(f"{flag}={value}; choose at least 0")
    output = Path(f"check_{data.resolve().name}") if output is None else output
    results = {name: output / name for name in ("summary.json", "contact_sheet.png")}
    if (present := [path for path in results.values() if path.exists()]) and not force:
        raise FileExistsError(f"{present[0]} exists; choose another --output, or replace it with --force")
    reference = None if synsets in (None, "none") else read_reference(synsets)
    report = Report()
    parts = open_splits(data, source, [name for name in SPLITS if name in splits], report)
    output.mkdir(parents=True, exist_ok=True)
    examine_all(parts, workers)
    classes = Classes(parts, reference)
    report.summary = {"data": str(data), "source": source, "splits": {}}
    for part in parts:
        report.summary["splits"][part.name] = numbers = describe(part, classes)
        judge(part, classes, numbers, report)
    report.summary["repeated_between_splits"] = compare_images(parts, classes, report)
    if synsets != "none":
        report.summary["synsets"] = compare_synsets(classes.names, reference, source, report)
    sheet = contact_sheet(parts, classes, f"{data.resolve().name} ({source})", seed, workers)
    summary, picture = json.dumps(report.as_dict(), indent=2).encode(), encode_png(sheet)
    write_whole(results["contact_sheet.png"], picture)
    write_whole(results["summary.json"], summary)
    for line in [*report.lines(), f"written: {', '.join(map(str, results.values()))}"]:
        logger.info(printable(line))
    return report.faults


def read_reference(synsets: str) -> list[str]:
    """The classes that --synsets names, in their order."""
    return imagenet().label_names() if synsets == IMAGENET else read_class_list(synsets)


@cache
def imagenet() -> ImageNetInfo:
    """Names and words of ImageNet-1k's classes."""
    return ImageNetInfo(IMAGENET)


@dataclass
class Report:
    """What is found out: numbers for the table, faults, remarks, and by title the things that are named."""

    summary: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    named: dict[str, list[str]] = field(default_factory=dict)

    def name(self, title: str, things: Iterable[str], count: int) -> None:
        """Name the first of ``count`` things."""
        if count:
            shown = [printable(thing) for thing in islice(things, SHOWN)]
            self.named[title] = [*shown, *([f"... and {count - len(shown)} more"] if count > len(shown) else [])]

    def as_dict(self) -> dict[str, Any]:
        return {**self.summary, "named": self.named, "notes": self.notes, "faults": self.faults}

    def lines(self) -> Iterator[str]:
        yield from table(self.summary)
        for title, things in self.named.items():
            yield from ("", f"{title}:", *(f"  {thing}" for thing in things))
        yield ""
        yield from (f"note: {note}" for note in self.notes)
        yield from (f"fault: {fault}" for fault in self.faults)


def printable(text: Any) -> str:
    """On one line, with escapes for what a terminal cannot show, such as names that are no UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


# Sources


class ShardSource(Source):
    """Tar shards, for a few samples by their numbers: reading one takes a way through its shard. Labels are unknown."""

    def __init__(self, shards: ShardSet):
        self.shards, self.classes, self.num_classes = shards, shards.classes, shards.num_classes
        self.labels = np.full(len(shards), -1)
        shards.num_classes = None  # labels out of range are counted here, not refused

    def name(self, index: int) -> str:
        return self._sample(index)[0]

    def read(self, index: int) -> bytes:
        data = self._sample(index)[1]
        if isinstance(data, ValueError):
            raise data
        return data

    def _sample(self, index: int) -> tuple[str, bytes | ValueError]:
        shard = int(np.searchsorted(self.shards.first, index, side="right")) - 1
        with closing(self.shards.read(shard, [index - int(self.shards.first[shard])])) as samples:
            _, name, data, _ = next(samples)
        return name, data

    def pass_through(self, shard: int) -> Iterator[tuple[int, str, bytes | Exception, int]]:
        """(number, name, data, label) of all samples of a shard; an error for those that a damage keeps away."""
        first, count, done = int(self.shards.first[shard]), int(self.shards.counts[shard]), 0
        try:
            for position, *sample in self.shards.read(shard):
                yield first + position, *sample
                done = position + 1
        except (OSError, ValueError) as err:
            for position in range(done, count):
                yield first + position, self.shards.urls[shard], err, -1


def open_folder(root: Path, split: str, classes: list[str] | None) -> Source:
    """Also with class folders that ``classes`` lacks, numbered after it, and with empty ones: they are reported."""
    found = class_names(root / split)
    return FolderSource(root / split, list(dict.fromkeys([*(classes or []), *found])))


SOURCES: dict[str, Callable[[Path, str, list[str] | None], Source]] = {
    "folder": open_folder,
    "zip": lambda root, split, classes: ZipSource(root, split, classes=classes),
    "list": ListSource,
    "shards": lambda root, split, classes: ShardSource(ShardSet(root / split, classes=classes)),
    "raw": lambda root, split, classes: RawSource(root / split, classes),
    "tiny_imagenet": lambda root, split, classes: TinyImageNetSource(root, split),
}


class Found(NamedTuple):
    """What was found out about an image: its number, its label (-1 if unknown), and its mode, such as RGB or L.

    An error has ``size`` (0, 0) and no digest.
    """

    index: int
    label: int
    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    error: str = ""


class Split:
    """A source with what was found out about each of its images, some 60 bytes for one.

    Attributes:
        labels: (images,), int64; -1 where it is unknown.
        digests: (images, 32), uint8, SHA-256; zeros where unreadable.
        sizes: (images, 2), int32, width and height; zeros where unreadable.
        modes: how many images have each of PIL's modes.
        errors: why images are unreadable: the first different reasons.
    """

    def __init__(self, name: str, source: Source):
        self.name, self.source = name, source
        self.labels = np.full(len(source), -1)
        self.digests = np.zeros((len(source), 32), np.uint8)
        self.sizes = np.zeros((len(source), 2), np.int32)
        self.modes: Counter[str] = Counter()
        self.errors: dict[str, None] = {}

    def record(self, found: Found) -> None:
        self.labels[found.index] = found.label
        if found.error:
            if len(self.errors) < SHOWN:
                self.errors[found.error] = None
            return
        self.digests[found.index] = np.frombuffer(found.digest, np.uint8)
        self.sizes[found.index] = found.size
        self.modes[found.mode] += 1

    def readable(self) -> np.ndarray:
        return self.sizes[:, 0] > 0


def open_splits(root: Path, form: str, names: list[str], report: Report) -> list[Split]:
    """Open the splits, each with the classes of the first; where it does not fit them, that is a fault."""
    splits, known = [], None
    for name in names:
        try:
            source = SOURCES[form](root, name, known)
        except ValueError as err:
            if known is None:
                raise
            report.faults.append(str(err))
            source = SOURCES[form](root, name, None)
        splits.append(Split(name, source))
        known = known or source.classes
    return splits


class Classes:
    """The classes' names in the order of the first split's numbers, or None, and the number that labels must be below.

    Without names, it is that of --synsets, or else labels end with the largest one of the first split.
    """

    def __init__(self, splits: list[Split], reference: list[str] | None):
        source = splits[0].source
        self.names = source.classes
        known = len(self.names or []) or getattr(source, "num_classes", None) or len(reference or [])
        self.count = known or int(splits[0].labels.max()) + 1

    def name(self, split: Split, label: int) -> str:
        names = split.source.classes or self.names or []
        return names[label] if 0 <= label < len(names) else str(label)


# Reading


def examine_all(splits: list[Split], workers: int) -> None:
    """Read and decode all images, with a progress bar, and record what is found out."""
    bar, done = ProgressBar("checking", sum(len(split.labels) for split in splits)), 0
    tasks = ((number, piece) for number, split in enumerate(splits) for piece in pieces(split.source))
    with closing(bar), closing(in_pool(examine, tasks, [split.source for split in splits], workers)) as results:
        for (number, _), found in results:
            for each in found:
                splits[number].record(each)
            done += len(found)
            bar.update(done)


def pieces(source: Source) -> Iterable[range | int]:
    """What workers get at once: a run of numbers, or a shard's number."""
    if isinstance(source, ShardSource):
        return range(len(source.shards.urls))
    return (range(first, min(first + CHUNK, len(source))) for first in range(0, len(source), CHUNK))


def examine(sources: list[Source], task: tuple[int, range | int]) -> list[Found]:
    """Check a piece of a source."""
    number, piece = task
    source = sources[number]
    samples = source.pass_through(piece) if isinstance(source, ShardSource) else read_each(source, piece)
    return [inspect(*sample) for sample in samples]


def read_each(source: Source, piece: range) -> Iterator[tuple[int, str, bytes | np.ndarray | Exception, int]]:
    """(number, name, data, label) of some samples; an error for the data of one that cannot be read."""
    for index in piece:
        try:
            data = source.read(index)
        except (OSError, ValueError) as err:
            data = err
        yield index, source.name(index), data, int(source.labels[index])


def inspect(index: int, name: str, data: bytes | np.ndarray | Exception, label: int) -> Found:
    """Decode an image as training does."""
    try:
        if isinstance(data, Exception):
            raise data
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd but decodes is no matter here
            size = decode_pil(data, name).size
            mode = "RGB" if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data)).mode
    except (OSError, ValueError) as err:
        return Found(index, label, error=str(err) if name in str(err) else f"{name}: {err}")
    # With the shape, since pixels do not tell it.
    digest = hashlib.sha256(repr(size).encode() + data.tobytes() if isinstance(data, np.ndarray) else data).digest()
    return Found(index, label, digest, size, mode)


def in_pool(
    work: Callable[[Any, Any], Any], tasks: Iterable[Any], shared: Any, workers: int
) -> Iterator[tuple[Any, Any]]:
    """(task, ``work(shared, task)``) in the tasks' order, by processes that inherit ``shared`` rather than copy it.

    Raises ``OSError`` where a worker dies.
    """
    if workers == 0:
        yield from ((task, work(shared, task)) for task in tasks)
        return
    left, waiting = iter(tasks), deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _inherit, (work, shared))
    try:
        while True:
            for task in islice(left, workers * AHEAD - len(waiting)):
                waiting.append((task, pool.submit(_work, task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            yield task, future.result()
    except BrokenProcessPool as err:
        raise OSError("a worker died while it was checking images; out of memory? use fewer --workers") from err
    finally:
        pool.shutdown(cancel_futures=True)


def _inherit(*state: Any) -> None:
    global _STATE
    _STATE = state
    start_worker()


def _work(task: Any) -> Any:
    work, shared = _STATE
    return work(shared, task)


# Judging


def describe(split: Split, classes: Classes) -> dict[str, Any]:
    """The numbers of a split. Those per class are of classes with images; medians may end in .5."""
    labels, counts = np.unique(split.labels[split.labels >= 0], return_counts=True)
    inside, readable = labels < classes.count, split.readable()
    images_of_class = {classes.name(split, label): int(count) for label, count in zip(labels, counts, strict=True)}
    per_class = extremes(counts[inside])
    if per_class:
        for which, place in (("smallest", np.argmin), ("largest", np.argmax)):
            per_class[f"{which}_class"] = classes.name(split, labels[place(counts[inside])])
    return {
        "images": len(split.labels),
        "unreadable": int((~readable).sum()),
        "labels_out_of_range": int(counts[~inside].sum()),
        "classes": classes.count,
        "classes_without_images": classes.count - int(inside.sum()),
        "images_per_class": per_class,
        "width": extremes(split.sizes[readable, 0]),
        "height": extremes(split.sizes[readable, 1]),
        "modes": dict(sorted(split.modes.items())),
        "images_of_class": images_of_class,
    }


def judge(split: Split, classes: Classes, numbers: dict[str, Any], report: Report) -> None:
    """Name what is wrong in a split by itself, or against the first split's classes."""
    unreadable, empty = numbers["unreadable"], numbers["classes_without_images"]
    report.name(f"unreadable in {split.name}", split.errors, unreadable)
    if unreadable:
        report.faults.append(f"{unreadable} unreadable image(s) in {split.name}")
    outside = np.flatnonzero(split.labels >= classes.count)
    lines = (f"{split.source.name(int(i))}: label {split.labels[i]}" for i in outside)
    report.name(f"labels out of range in {split.name}", lines, len(outside))
    if len(outside):
        report.faults.append(f"{len(outside)} label(s) in {split.name} not from 0 to {classes.count - 1}")
    present = set(split.labels.tolist())
    names = (classes.name(split, label) for label in range(classes.count) if label not in present)
    report.name(f"classes without images in {split.name}", names, empty)
    if empty:  # training refuses them in its own split
        (report.faults if split.name == "train" else report.notes).append(
            f"{empty} of {classes.count} classes without images in {split.name}"
        )
    known = set(classes.names or split.source.classes or [])
    strange = [name for name in split.source.classes or [] if name not in known]
    if strange:
        report.faults.append(f"{len(strange)} class(es) of {split.name} that train lacks: {few(strange)}")


def extremes(values: np.ndarray) -> dict[str, Any] | None:
    """Smallest, median and largest; None where there are no values."""
    if not len(values):
        return None
    return {"smallest": int(values.min()), "median": float(np.median(values)), "largest": int(values.max())}


def few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def compare_images(splits: list[Split], classes: Classes, report: Report) -> int:
    """Report the images with the same bytes (or the same pixels, where those are stored).

    Returns how many images of the second split the first one has, too. Each split's own repetitions go to its numbers.
    """
    ends = np.cumsum([len(split.labels) for split in splits])
    groups = equal_files(np.concatenate([split.digests for split in splits]))
    within: dict[str, list[tuple]] = {split.name: [] for split in splits}
    between: list[tuple] = []
    for group in sorted(groups, key=lambda group: group[0]):
        numbers = np.searchsorted(ends, group, side="right")
        members = [(splits[n], int(i - ends[n] + len(splits[n].labels))) for n, i in zip(numbers, group, strict=True)]
        for earlier, later in pairwise(members):
            if earlier[0] is later[0]:
                within[later[0].name].append((earlier, later))
        between += [(members[0], other) for other in members[1:] if other[0] is not members[0][0]]
    for name, pairs in within.items():
        report.summary["splits"][name]["repeated"] = len(pairs)
        report.name(f"the same image twice in {name}", (pair_line(pair, classes) for pair in pairs), len(pairs))
        if pairs:
            report.notes.append(f"{len(pairs)} image(s) of {name} repeat another one of it")
    title = " and ".join(split.name for split in splits)
    report.name(f"the same image in {title}", (pair_line(pair, classes) for pair in between), len(between))
    if between:
        report.faults.append(f"{len(between)} image(s) of {splits[1].name} that {splits[0].name} has, too")
    return len(between)


def pair_line(pair: tuple[tuple[Split, int], tuple[Split, int]], classes: Classes) -> str:
    one, other = (split.source.name(index) for split, index in pair)
    first, second = (classes.name(split, int(split.labels[index])) for split, index in pair)
    return f"{one} = {other}" + (f" (classes {first} and {second})" if first != second else "")


def compare_synsets(
    names: list[str] | None, reference: list[str] | None, form: str, report: Report
) -> dict[str, Any] | None:
    """Compare the classes, in the order of their numbers, with a reference; with ImageNet-1k's if that seems meant.

    A reference that is given must be there as a whole. Returns None where nothing is compared.
    """
    if names is None:
        report.notes.append("the data has class numbers, but no names; they are not compared with synsets")
        return None
    guessed, reference = reference is None, reference or imagenet().label_names()
    title = "ImageNet-1k" if reference == imagenet().label_names() else "the list of --synsets"
    position = {name: number for number, name in enumerate(reference)}
    known = [name for name in names if name in position]
    # Tiny-ImageNet has classes that ImageNet-1k lacks.
    if guessed and (form == "tiny_imagenet" or 2 * len(known) <= len(names)):
        if any(WNID.fullmatch(name) for name in names):
            report.notes.append(f"synsets are not compared with {title}'s; --synsets {IMAGENET} does it")
        return None
    strange = [name for name in names if name not in position]
    missing = sorted(set(reference) - set(names), key=position.get)
    in_order = known == sorted(known, key=position.get)
    report.name("strange classes", (with_hint(name, reference) for name in strange), len(strange))
    if strange:
        report.faults.append(f"{len(strange)} class(es) that {title} does not have: {few(strange)}")
    if missing and (not guessed or 2 * len(known) > len(reference)):
        report.name("missing classes", missing, len(missing))
        report.faults.append(f"{len(missing)} of {title}'s {len(reference)} classes missing: {few(missing)}")
    if not in_order:
        report.faults.append(
            f"classes in another order than {title}'s; the official code, and with it released weights, number "
            f"ImageNet's synsets alphabetically"
        )
    if not strange and in_order:
        part = f"{len(known)} of its {len(reference)} classes, in its order, numbered anew"
        report.notes.append(f"synsets: {title}, " + (part if missing else "all its classes in its order"))
    return {"reference": title, "known": len(known), "strange": strange, "missing": missing, "in_order": in_order}


def with_hint(name: str, reference: list[str]) -> str:
    """A strange class with ImageNet's words for it, if it is a synset, or else with a name that is near."""
    return f"{name}: {words(name)}" if words(name) else f"{name}{nearest(name, reference)}"


def words(name: str) -> str:
    """ImageNet's words for a synset; empty if it is none."""
    try:
        return imagenet().label_name_to_description(name)
    except KeyError:
        return ""


# Writing


def table(summary: dict[str, Any]) -> Iterator[str]:
    """Aligned columns, one for each split."""
    splits = summary["splits"].values()
    rows = [[f"{summary['data']} ({summary['source']})", *summary["splits"]]]
    for key in ("images", "unreadable", "labels_out_of_range", "repeated", "classes", "classes_without_images"):
        rows.append([key.replace("_", " "), *(str(numbers[key]) for numbers in splits)])
    for key in ("images_per_class", "width", "height"):
        for which in ("smallest", "median", "largest"):
            rows.append([f"{key.replace('_', ' ')}, {which}", *(cell(numbers[key], which) for numbers in splits)])
    for mode in sorted({mode for numbers in splits for mode in numbers["modes"]}):
        rows.append([f"mode {mode}", *(str(numbers["modes"].get(mode, 0)) for numbers in splits)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        yield "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])


def cell(values: dict[str, Any] | None, which: str) -> str:
    """One of `extremes`, with its class if it has one; a dash where there is none."""
    if values is None:
        return "-"
    name = values.get(f"{which}_class")
    return (f"({name[:40]}) " if name else "") + f"{values[which]:.10g}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The contact sheet


def contact_sheet(splits: list[Split], classes: Classes, title: str, seed: int, workers: int) -> Image.Image:
    """Random images of random classes, as many from each split, with the classes' names and numbers of images."""
    chosen, tiles = choose_tiles(splits, classes, np.random.default_rng(seed))
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (TILE + GAP) + GAP, TITLE + rows * (TILE + CAPTION) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    title = f"{title}: {len(chosen)} of {classes.count} classes, seed {seed}"
    draw.text((GAP, GAP), fit(title, sheet.width - 2 * GAP, draw, font), "black", font)
    tasks = [(position, tile) for position, tile in enumerate(tiles) if tile is not None]
    with closing(in_pool(thumbnail, tasks, [split.source for split in splits], workers)) as pictures:
        for (position, (number, index)), picture in pictures:
            split, label = splits[number], int(splits[number].labels[index])
            x, y = GAP + position % COLUMNS * (TILE + GAP), TITLE + position // COLUMNS * (TILE + CAPTION)
            draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), "lightgrey")
            sheet.paste(picture, (x + (TILE - picture.width) // 2, y + (TILE - picture.height) // 2))
            name, count = classes.name(split, label), f"{split.name}, {(split.labels == label).sum()} image(s)"
            for line, text in enumerate((name, words(name), count)):
                draw.text((x, y + TILE + 1 + 11 * line), fit(text, TILE, draw, font), "black", font)
    return sheet


def choose_tiles(
    splits: list[Split], classes: Classes, generator: np.random.Generator
) -> tuple[list[int], list[tuple[int, int] | None]]:
    """The classes to show, and for each tile the (split, image) in it, or None where a class has no more images.

    A class has the same number of tiles from each split: the largest one for which all classes fit on the sheet.
    """
    readable = [np.where(split.readable(), split.labels, -1) for split in splits]
    present = np.unique(np.concatenate(readable))
    present = present[(present >= 0) & (present < classes.count)]
    groups = [group for group in GROUPS if group % len(splits) == 0]
    group = next((group for group in groups if group * len(present) <= COLUMNS * ROWS), groups[-1])
    chosen = np.sort(generator.choice(present, min(len(present), COLUMNS * ROWS // group), replace=False)).tolist()
    each, tiles = group // len(splits), []
    for label in chosen:
        for number, labels in enumerate(readable):
            images = generator.permutation(np.flatnonzero(labels == label))[:each].tolist()
            tiles += [(number, image) for image in images] + [None] * (each - len(images))
    return chosen, tiles


def thumbnail(sources: list[Source], task: tuple[int, tuple[int, int]]) -> Image.Image:
    """An image that fits a tile."""
    number, index = task[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = decode_pil(sources[number].read(index), sources[number].name(index))
    image.thumbnail((TILE, TILE))
    return image


def fit(text: str, width: int, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """The text, shortened to ``width`` pixels; letters that the font may lack become question marks."""
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
