"""Pack class folders into the official zip layout: train.zip beside train_map.txt, val.zip beside val_map.txt.

python tools/make_zip.py imagenet imagenet-zip
python tools/make_zip.py imagenet imagenet-zip --splits val --skip-unreadable

Images are stored as they are. Each is decoded first, and what was written is read back and compared. All is written in
a folder TARGET/.make_zip, and gets its names once it is complete. After an interruption, run the same command again:
the check of images goes on where it was, the writing begins anew.
"""

import argparse
import hashlib
import logging
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.sources import FolderSource, class_names
from data.zipped import ARCHIVES, MAPS, ZipSource, directory
from logger import ProgressBar
from tools.scan import survey

SPLITS = ("train", "val")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the date of every member, so that the same images give the same archive
logger = logging.getLogger("make_zip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="folder with train/<class>/<image> and val/<class>/<image>")
    parser.add_argument("target", type=Path, help="folder to write to")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="what to pack")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that check images")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out files that do not decode")
    parser.add_argument("--force", action="store_true", help="replace existing archives")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        make_zip(args.source, args.target, args.splits, args.workers, args.skip_unreadable, args.force)
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: interrupted; the same command goes on")


def make_zip(
    source: Path,
    target: Path,
    splits: list[str],
    workers: int,
    skip_unreadable: bool = False,
    force: bool = False,
) -> None:
    """Write the archive and the map of each split to ``target``; a line in the log for each.

    Raises:
        ValueError: where files are unreadable, without ``skip_unreadable``, or cannot be listed in a map.
        OSError: where the source is missing, a result exists, without ``force``, or cannot be written.
    """
    results = [target / table[split] for split in splits for table in (ARCHIVES, MAPS)]
    if (present := [path for path in results if path.exists()]) and not force:
        raise FileExistsError(f"{present[0]} exists; choose another folder, or replace it with --force")
    classes = class_names(source / ("train" if (source / "train").is_dir() else splits[0]))
    folders = {split: FolderSource(source / split, classes) for split in splits}
    work = target / ".make_zip"
    work.mkdir(parents=True, exist_ok=True)
    paths = [path for split in splits for path in folders[split].paths]
    readable, digests = survey(paths, workers, work / "checked.jsonl", "checking", skip_unreadable)
    needed, free = sum(map(os.path.getsize, paths)), shutil.disk_usage(work).free
    if needed > free:
        raise OSError(f"{target}: {needed / 1e9:.2f} GB are needed, but {free / 1e9:.2f} GB are free")
    begin, lines = 0, []
    try:
        for split, folder in folders.items():
            own = slice(begin, begin := begin + len(folder))
            members = chosen_members(folder, source / split, readable[own], digests[own])
            pack(members, work, split)
            lines.append(verify(members, work, split))
        for path in results:
            os.replace(work / path.name, path)
    finally:
        for path in results:
            (work / path.name).unlink(missing_ok=True)
    shutil.rmtree(work)
    for line in lines:
        logger.info(f"{target}/{line}")


class Member(NamedTuple):
    """An image to pack: its file, its path in the archive, the number of its class and its bytes' sha256."""

    file: str
    name: str
    label: int
    digest: bytes


def chosen_members(folder: FolderSource, root: Path, readable: np.ndarray, digests: np.ndarray) -> list[Member]:
    """The readable images of a split. Raises ``ValueError`` for a class without one, and for a name no map can hold."""
    chosen = np.flatnonzero(readable)
    for label in np.setdiff1d(folder.labels, folder.labels[chosen]):
        raise ValueError(f"{root / folder.classes[label]}: no image in it can be read; replace or delete the folder")
    members = []
    for index in chosen:
        name = Path(folder.paths[index]).relative_to(root).as_posix()
        if not name.isprintable():  # a tab, a line break, bytes that are no text
            raise ValueError(f"{root}: the name {name!r} cannot be written in a map; rename the file")
        members.append(Member(folder.paths[index], name, int(folder.labels[index]), digests[index].tobytes()))
    return members


def pack(members: list[Member], folder: Path, split: str) -> None:
    """Write ``folder``'s archive and map. Raises ``OSError`` where an image is no longer what it was when checked."""
    bar = ProgressBar(f"writing {ARCHIVES[split]}", len(members))
    with open(folder / ARCHIVES[split], "wb") as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for done, member in enumerate(members, 1):
                data = Path(member.file).read_bytes()
                if hashlib.sha256(data).digest() != member.digest:
                    raise OSError(f"{member.file}: changed while it was being packed; run the command again")
                info = zipfile.ZipInfo(member.name, EPOCH)
                info.external_attr = 0o644 << 16
                archive.writestr(info, data)
                bar.update(done)
        flush(file)
    bar.close()
    with open(folder / MAPS[split], "w", encoding="utf-8") as file:
        file.writelines(f"{member.name}\t{member.label}\n" for member in members)
        flush(file)


def flush(file: IO) -> None:
    """To the disk, so that a crash after the renaming leaves it whole."""
    file.flush()
    os.fsync(file.fileno())


def verify(members: list[Member], folder: Path, split: str) -> str:
    """Read the archive back as training does; returns a line with its count, size and digest.

    Raises ``OSError`` where it holds anything but the members.
    """
    written = ZipSource(folder, split)
    if [*written.paths] != [member.name for member in members] or len(directory(written.file)) != len(members):
        raise OSError(f"{written.file}: does not hold the {len(members)} images; run the command again")
    bar = ProgressBar(f"verifying {ARCHIVES[split]}", len(members))
    for index, member in enumerate(members):
        if hashlib.sha256(written.read(index)).digest() != member.digest or written.labels[index] != member.label:
            raise OSError(f"{written.name(index)}: differs from {member.file}; check the disk, run the command again")
        bar.update(index + 1)
    bar.close()
    with open(written.file, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    size, classes = written.file.stat().st_size, len(np.unique(written.labels))
    return f"{ARCHIVES[split]}: {len(members)} images of {classes} classes, {size / 1e6:.1f} MB, sha256 {digest}"


if __name__ == "__main__":
    main()
