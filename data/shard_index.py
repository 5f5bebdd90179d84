"""Which shards there are, how many samples each has, and of which classes: patterns, folders and ``index.json``."""

import fnmatch
import glob
import json
import logging
import os
import re
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources import Faults
from .tar import PIPE, count_samples, import_webdataset

logger = logging.getLogger(__name__)
INDEX = "index.json"
MOST = 1 << 48  # a count or size above it is a mistake


def expand(shards: str | Path | Sequence[str | Path], skip: bool = False) -> list[str]:
    """Paths and commands of all shards that `ShardSet` takes; each local one exists, unless ``skip``.

    Raises ``OSError`` naming what is missing, ``ValueError`` where a pattern is wrong or a shard comes twice.
    """
    given = [shards] if isinstance(shards, str | Path) else list(shards)
    urls = [url for spec in given for url in _expand(str(spec), skip)]
    if not urls:
        raise ValueError(
            "no shards given; give a folder, a pattern such as shard-{000000..000099}.tar, or pipe:COMMAND"
        )
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ValueError(f"{url}: this shard is given twice, so its samples would count twice; give it once")
        seen.add(url)
    return urls


def _expand(spec: str, skip: bool) -> list[str]:
    path = Path(spec)
    if path.is_dir():
        return _in_folder(path, skip)
    if path.is_file():  # also one whose name looks like a pattern
        return [spec]
    return [url for pattern in _braces(spec) for url in _matches(pattern, skip)]


def _in_folder(folder: Path, skip: bool) -> list[str]:
    """The folder's shards by name; exactly those of its index, where it has one."""
    found = sorted(path.name for path in folder.glob("*.tar"))
    if (folder / INDEX).is_file():
        listed = read_index(folder / INDEX, "tar").shards
        for name in sorted(set(found) - set(listed)):
            raise ValueError(f"{folder / name}: {INDEX} beside it does not list it; move the shard away")
        for name in [] if skip else sorted(set(listed) - set(found)):
            raise FileNotFoundError(f"{folder / name}: {absent(folder / INDEX)}")
        found = sorted(listed)
    if not found:
        raise FileNotFoundError(f"{folder}: no .tar shards in this folder")
    return [str(folder / name) for name in found]


def absent(index: Path) -> str:
    return f"no such shard, but {index} lists it; copy it there"


def _braces(spec: str) -> list[str]:
    from_library = import_webdataset("shardlists").expand_urls
    try:
        return from_library(spec)
    except (AssertionError, ValueError) as err:  # an environment variable that is not set, unbalanced braces
        raise ValueError(f"{spec}: not a pattern of shards: {' '.join(str(err).split())}") from err


def _matches(pattern: str, skip: bool) -> list[str]:
    if pattern.startswith(PIPE):
        return [pattern]
    if "://" in pattern:
        raise ValueError(f"{pattern}: addresses are read by commands only; write for instance pipe:curl -sfL {pattern}")
    if glob.has_magic(pattern) and not Path(pattern).is_file():
        return _found(pattern, skip)
    if not skip and not Path(pattern).is_file():
        raise FileNotFoundError(f"{pattern}: no such shard")
    return [pattern]


def _found(pattern: str, skip: bool) -> list[str]:
    """What matches a glob, of the files and of the entries of an index beside them."""
    found = set(glob.glob(pattern))
    parent, name = os.path.split(pattern)
    for folder in glob.glob(parent) if glob.has_magic(parent) else [parent]:
        index = Path(folder, INDEX)
        listed = fnmatch.filter(read_index(index, "tar").shards, name) if index.is_file() else []
        missing = sorted({os.path.join(folder, shard) for shard in listed} - found)
        if missing and not skip:
            raise FileNotFoundError(f"{missing[0]}: {absent(index)}")
        found.update(missing)
    if not found:
        raise FileNotFoundError(f"{pattern}: no shard matches")
    return sorted(found)


@dataclass(frozen=True)
class Index:
    """What ``index.json`` says: shards by file name, the classes' names (or None) and their number (or None)."""

    path: Path
    shards: dict[str, dict[str, Any]]
    classes: list[str] | None
    num_classes: int | None


def read_index(path: Path, kind: str) -> Index:
    """Read ``{"format": kind, "shards": [{"name", "samples", "bytes", "sha256"}], "classes", "num_classes"}``.

    The format is tar or raw. ``bytes``, ``sha256``, ``classes`` and ``num_classes`` may be missing or null.

    Raises ``ValueError`` or ``OSError``, naming the file and what is wrong in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{path}: no such index; tools/make_shards.py writes it beside its shards") from err
    except (ValueError, RecursionError) as err:
        raise ValueError(f"{path}: not a JSON file: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{path}: not an index that tools/make_shards.py wrote; move it away to do without")
    if content.get("format") != kind:
        raise ValueError(f"{path}: shards of format {content.get('format')!r} where {kind!r} ones are expected")
    shards = {}
    for number, entry in enumerate(content["shards"]):
        _check_entry(path, number, entry)
        if entry["name"] in shards:
            raise ValueError(f"{path}: shard {entry['name']!r} is listed twice")
        shards[entry["name"]] = entry
    return Index(path, shards, *_classes_of(path, content))


def _check_entry(path: Path, number: int, entry: Any) -> None:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name.isprintable() or not name or Path(name).name != name:
        raise ValueError(
            f"{path}: shard {number} has the name {reprlib.repr(name)}; expected that of a file beside the index"
        )
    for key in ("samples", "bytes"):
        value = entry.get(key)
        if (value is not None or key == "samples") and (type(value) is not int or not 0 <= value < MOST):
            raise ValueError(f"{path}: shard {name!r} has {key!r}: {reprlib.repr(value)}; expected a whole number")
    samples, size = entry["samples"], entry.get("bytes")
    if size is not None and samples > size:  # arrays of that length would be made
        raise ValueError(f"{path}: shard {name!r} has 'samples': {samples}, more than its {size} bytes can hold")


def _classes_of(path: Path, content: dict[str, Any]) -> tuple[list[str] | None, int | None]:
    classes, count = content.get("classes"), content.get("num_classes")
    names = [] if classes is None else classes
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError(f"{path}: 'classes' is neither null nor a list of printable names")
    if count is None:
        return classes, None if classes is None else len(classes)
    if type(count) is not int or not 0 < count < MOST or (classes is not None and len(classes) != count):
        raise ValueError(f"{path}: 'num_classes' is {reprlib.repr(count)} with {len(names)} names of classes")
    return classes, count


def find_indices(urls: list[str], given: str | Path | None) -> list[Index | None]:
    """For each shard the given index, or the one beside it, if any."""
    read: dict[Path, Index | None] = {}

    def beside(url: str) -> Index | None:
        if given is None and url.startswith(PIPE):
            return None
        path = Path(url).parent / INDEX if given is None else Path(given)
        if path not in read:
            read[path] = read_index(path, "tar") if given is not None or path.is_file() else None
        return read[path]

    return [beside(url) for url in urls]


def agreed_classes(classes: list[tuple[list[str] | None, int | None]]) -> tuple[list[str] | None, int | None]:
    """The classes' names and number that all indices give."""
    if any(pair != classes[0] for pair in classes):
        raise ValueError(f"the shards' {INDEX} files name different classes; shards of one set have the same")
    return classes[0] if classes else (None, None)


def settle_names(
    where: str | Path,
    own: list[str] | None,
    own_count: int | None,
    classes: Sequence[str] | None,
    num_classes: int | None,
) -> tuple[list[str] | None, int | None]:
    """The names of the classes and the number that labels must be below, from an index's own and the known ones.

    Raises ``ValueError`` where the names differ.
    """
    if own is not None and classes is not None and list(classes) != own:
        strange = sorted(set(classes) ^ set(own))[:5]
        raise ValueError(
            f"{where}: packed with {len(own)} classes, the training data has {len(classes)}; they differ in "
            f"{', '.join(strange) or 'their order'}"
        )
    names = own if classes is None else list(classes)
    return names, num_classes or (own_count if names is None else len(names))


def count_all(urls: list[str], indices: list[Index | None], samples: int | Sequence[int] | None) -> list[int]:
    counts = [
        None if index is None else _listed(url, index)["samples"] for url, index in zip(urls, indices, strict=True)
    ]
    if None in counts and samples is not None:
        return _spread(urls, samples)
    unknown = [url for url, count in zip(urls, counts, strict=True) if count is None]
    for url in unknown:
        if url.startswith(PIPE):
            raise ValueError(
                f"{url}: how many samples it has is not known; give the {INDEX} that tools/make_shards.py wrote, or "
                f"the number of samples of the {len(urls)} shard(s)"
            )
    counts = [count_samples(Path(url)) if count is None else count for url, count in zip(urls, counts, strict=True)]
    if unknown:
        logger.info(f"{unknown[0]} and {len(unknown) - 1} more shard(s) without {INDEX}: counted {sum(counts)} samples")
    if samples is not None and samples != (sum(counts) if isinstance(samples, int) else type(samples)(counts)):
        raise ValueError(f"{urls[0]}: {sum(counts)} samples in {len(urls)} shard(s) by the {INDEX}, not {samples}")
    return counts


def find_faults(urls: list[str], indices: list[Index | None]) -> Faults:
    """By their positions, the local shards that are missing or not of the index's size, and how."""
    faults = {}
    for number, (url, index) in enumerate(zip(urls, indices, strict=True)):
        if index is None or url.startswith(PIPE):
            continue
        size, expected = Path(url).stat().st_size if Path(url).is_file() else None, _listed(url, index).get("bytes")
        if size is None:
            faults[number] = f"{url}: {absent(index.path)}"
        elif expected not in (None, size):
            faults[number] = f"{url}: {size} bytes, but {expected} by {index.path}; copy it again"
    return faults


def _listed(url: str, index: Index) -> dict[str, Any]:
    """The entry in the index of a local shard, or of one that a command's words name."""
    words = re.split(r"[\s'\"/\\=:?&;|<>()]+", url) if url.startswith(PIPE) else [Path(url).name]
    names = {word for word in words if word in index.shards}
    if len(names) != 1:
        raise ValueError(
            f"{url}: {index.path} lists {'no' if not names else 'more than one'} shard of this name; its "
            f"{len(index.shards)} shard(s) begin with {', '.join(list(index.shards)[:2])}"
        )
    return index.shards[names.pop()]


def _spread(urls: list[str], samples: int | Sequence[int]) -> list[int]:
    """The shards' counts as given, or from their sum."""
    if isinstance(samples, int):
        each = -(-samples // len(urls))
        counts = [each] * (len(urls) - 1) + [samples - each * (len(urls) - 1)]
    else:
        counts = [int(count) for count in samples]
    if len(counts) != len(urls) or min(counts) < 0:
        raise ValueError(f"{urls[0]}: samples={samples} does not fit {len(urls)} shard(s); give the count of each")
    return counts
