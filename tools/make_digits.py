"""Write scikit-learn's handwritten digits (1,797 scans of 8x8 pixels) as an ImageNet-style folder of 32x32 PNG files.

python tools/make_digits.py datasets/digits
python tools/make_digits.py datasets/digits-10 --per-class 10
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIDE = 32
HELD_OUT = 0.2  # of each digit, for validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet, or hold these digits, finished")
    parser.add_argument("--per-class", type=int, metavar="N", help="N training images of each digit; all if left out")
    args = parser.parse_args()
    try:
        splits = choose(args.per_class)
    except ValueError as err:
        sys.exit(f"make_digits.py: error: {err}")
    if is_complete(args.folder, splits):
        sys.stdout.write(f"{args.folder} holds these digits already\n")
        return
    if args.folder.exists():
        sys.exit(
            f"make_digits.py: error: {args.folder} exists and is not a finished copy of these digits; move it away"
        )
    write_digits(args.folder, splits)
    counts = {split: len(names) for split, names in splits.items()}
    sys.stdout.write(f"{args.folder}: {counts['train']} training and {counts['val']} validation images of 10 classes\n")


def choose(per_class: int | None = None) -> dict[str, dict[str, int]]:
    """The training and validation images: for each its path, ``<digit>/<index>.png``, and its index.

    Args:
        per_class: training images of each digit, the first of those drawn for training; all if None.

    Raises ``ValueError`` where no digit has so many, or for less than one.
    """
    labels = load_digits().target
    train, val = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    most = np.bincount(labels[train]).min()
    if per_class is not None and not 1 <= per_class <= most:
        raise ValueError(f"--per-class {per_class}: there are 1 to {most} training images of each digit to choose from")
    if per_class is not None:  # in the drawn order: neighbours in the collection are by the same hand
        train = np.concatenate([train[labels[train] == digit][:per_class] for digit in range(10)])
    return {
        split: {f"{labels[index]}/{index:04d}.png": int(index) for index in members}
        for split, members in (("train", train), ("val", val))
    }


def is_complete(folder: Path, splits: dict[str, dict[str, int]]) -> bool:
    found = {path.relative_to(folder).as_posix() for path in folder.glob("*/*/*.png")}
    return found == {f"{split}/{name}" for split, names in splits.items() for name in names}


def write_digits(folder: Path, splits: dict[str, dict[str, int]]) -> None:
    """Write ``folder/{train,val}/<digit>/<index>.png``; the folder appears only once it is complete."""
    scans = load_digits().images
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, names in splits.items():
            for name, index in names.items():
                path = unfinished / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), enlarge(scans[index])):
                    raise OSError(f"cannot write {path}")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def enlarge(scan: np.ndarray) -> np.ndarray:
    """(8, 8) with values 0 to 16 to (32, 32) uint8, bicubic."""
    large = cv2.resize(scan * (255 / 16), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.clip(np.rint(large), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
