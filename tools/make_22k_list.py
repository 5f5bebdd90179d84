"""Write ImageNet-22K's two JSON lists for a folder of synset folders, ROOT/<synset>/<image>.

python tools/make_22k_list.py imagenet22k --val-per-class 50
python tools/make_22k_list.py imagenet22k --train-folder train --val-folder val --official-labels

Labels are the alphabetical positions of the synsets, or with --official-labels the rows of the released 22K heads. Each
image is decoded first. After an interruption, run the same command again: the check of images goes on where it was. A
list gets its name once it is complete and has been read back.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import zlib
from itertools import compress, groupby
from pathlib import Path

import numpy as np
from timm.data import ImageNetInfo
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.lists import LISTS, ListSource
from data.sources import class_names, known_classes
from tools.scan import survey

# The heads have rows for the 21841 of 21843 synsets that have images, in alphabetical order; the last two synsets took
# the rows of the two without (a note in the official data/imagenet22k_dataset.py).
MOVED = {21841: 9205, 21842: 15027}
logger = logging.getLogger("make_22k_list")
Entry = tuple[str, int]  # path relative to the root, label


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("root", type=Path, help="the data's folder; the lists are written there")
    parser.add_argument("--train-folder", default=".", help="the folder in ROOT that holds the synset folders")
    split = parser.add_mutually_exclusive_group(required=True)
    split.add_argument("--val-per-class", type=int, help="images of each synset to draw for validation")
    split.add_argument("--val-folder", help="the folder in ROOT that holds synset folders for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--official-labels", action="store_true", help="labels of the released 22K models")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that check images")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that do not decode")
    parser.add_argument("--force", action="store_true", help="replace existing lists")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        make_lists(**vars(args))
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted; the same command goes on")


def make_lists(
    root: Path,
    train_folder: str = ".",
    val_per_class: int | None = None,
    val_folder: str | None = None,
    seed: int = 0,
    official_labels: bool = False,
    workers: int = 0,
    skip_unreadable: bool = False,
    force: bool = False,
) -> None:
    """Write the lists of training and validation images to ``root``; a line in the log for each.

    Exactly one of ``val_per_class`` and ``val_folder`` is given.

    Raises:
        ValueError: where files are unreadable, without ``skip_unreadable``, or a synset has no label or no image.
        OSError: where a folder is missing, or a list exists, without ``force``.
    """
    root = Path(os.path.abspath(root))
    if val_per_class is not None and val_per_class < 1:
        raise ValueError(f"--val-per-class={val_per_class}; choose at least 1")
    if (present := [root / name for name in LISTS.values() if (root / name).exists()]) and not force:
        raise FileExistsError(f"{present[0]} exists; replace it with --force")
    train_root, val_root = inside(root, train_folder), val_folder and inside(root, val_folder)
    names = [name for name in class_names(train_root) if train_root / name != val_root]
    labels = official_rows(names, train_root) if official_labels else {name: row for row, name in enumerate(names)}
    train, val = list_images(root, train_root, labels), []
    if val_root:
        known_classes(val_root, class_names(val_root), names)
        val = list_images(root, val_root, labels, whole=False)
    paths, journal = [f"{root}/{path}" for path, _ in train + val], root / ".make_22k_list.jsonl"
    readable, _ = survey(paths, workers, journal, "checking", skip_unreadable)
    val = list(compress(val, readable[len(train) :]))
    train = keep_readable(train, readable[: len(train)], train_root)
    if val_per_class:
        train, val = draw(train, {label: name for name, label in labels.items()}, val_per_class, seed)
    if not val:
        raise ValueError(f"{val_root or train_root}: no image for validation")
    write(root, {"train": train, "val": val})
    journal.unlink()


def inside(root: Path, folder: str) -> Path:
    """A folder of ``root``. Raises ``ValueError`` where it lies elsewhere, for paths of a list cannot lead there."""
    path = Path(os.path.abspath(root / folder))
    if not path.is_relative_to(root):
        raise ValueError(f"{folder}: not inside {root}; the lists can name files in that folder only")
    return path


def official_rows(names: list[str], folder: Path) -> dict[str, int]:
    """The row of each synset in the released 22K heads. Raises ``ValueError`` for one that has none."""
    order = ImageNetInfo("imagenet21k_goog").label_names()
    rows = {name: MOVED.get(row, row) for row, name in enumerate(order) if row not in MOVED.values()}
    known_classes(folder, names, list(rows))
    return {name: rows[name] for name in names}


def list_images(root: Path, folder: Path, labels: dict[str, int], whole: bool = True) -> list[Entry]:
    """The images of the synsets, sorted. Raises ``FileNotFoundError`` for a synset without any, if ``whole``."""
    try:
        found = ImageFolder.make_dataset(str(folder), labels, IMG_EXTENSIONS, allow_empty=not whole)
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{folder}: {err}") from err
    return [(path[len(str(root)) + 1 :], label) for path, label in found]


def keep_readable(entries: list[Entry], readable: np.ndarray, folder: Path) -> list[Entry]:
    """Raises ``ValueError`` where a synset has no readable image."""
    kept = list(compress(entries, readable))
    if lost := {label for _, label in entries} - {label for _, label in kept}:
        path = next(path for path, label in entries if label in lost)
        raise ValueError(f"{folder}: no image beside {path} can be read; replace or delete that synset's folder")
    return kept


def draw(entries: list[Entry], names: dict[int, str], count: int, seed: int) -> tuple[list[Entry], list[Entry]]:
    """Split off ``count`` images of each synset at random, or all but one where it has no more."""
    train, val = [], []
    for label, group in groupby(entries, key=lambda entry: entry[1]):
        images = list(group)
        name = names[label]
        # By the synset's own name, so that another synset in the data changes nothing here.
        generator = np.random.default_rng([seed, zlib.crc32(os.fsencode(name))])
        drawn = np.zeros(len(images), bool)
        drawn[generator.permutation(len(images))[: min(count, len(images) - 1)]] = True
        if drawn.sum() < count:
            logger.warning(f"{name}, label {label}: {drawn.sum()} of {len(images)} images for validation, not {count}")
        train += compress(images, ~drawn)
        val += compress(images, drawn)
    return train, val


def write(root: Path, lists: dict[str, list[Entry]]) -> None:
    """Write both lists, read them back, and give them their names."""
    temporary = {split: root / f".{LISTS[split]}.tmp" for split in lists}
    try:
        reports = [write_list(entries, root, temporary[split], split) for split, entries in lists.items()]
        for split, file in temporary.items():
            os.replace(file, root / LISTS[split])
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)
    for report in reports:
        logger.info(report)


def write_list(entries: list[Entry], root: Path, path: Path, split: str) -> str:
    """Write a list and read it back as training does; returns a line with its counts and digest."""
    with open(path, "w", encoding="ascii") as file:
        file.write("[" + ",\n".join(json.dumps(entry) for entry in entries) + "]\n")
        file.flush()
        os.fsync(file.fileno())
    written = ListSource(root, split, file=path.name)
    if list(zip(written.paths, written.labels.tolist(), strict=True)) != entries:
        raise OSError(f"{path}: differs from what was written; check the disk, run the command again")
    digest, classes = hashlib.sha256(path.read_bytes()).hexdigest(), len(np.unique(written.labels))
    return f"{root / LISTS[split]}: {len(entries)} images of {classes} classes, sha256 {digest}"


if __name__ == "__main__":
    main()
