"""Write scikit-learn's handwritten digits (1,797 scans of 8x8 pixels) as an ImageNet-style folder of 32x32 PNG files.

python tools/make_digits.py datasets/digits
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet, or hold finished digits")
    folder = parser.parse_args().folder
    if is_complete(folder):
        sys.stdout.write(f"{folder} holds the digits already\n")
        return
    if folder.exists():
        sys.exit(f"make_digits.py: error: {folder} exists and is not a finished copy of the digits; move it away")
    counts = write_digits(folder)
    sys.stdout.write(f"{folder}: {counts['train']} training and {counts['val']} validation images of 10 classes\n")


def is_complete(folder: Path) -> bool:
    return len(list(folder.glob("*/*/*.png"))) == len(load_digits().target)


def write_digits(folder: Path) -> dict[str, int]:
    """Write ``folder/{train,val}/<digit>/<index>.png``; the folder appears only once it is complete.

    Returns the number of images of each split.
    """
    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=HELD_OUT, stratify=digits.target, random_state=0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, members in (("train", train), ("val", val)):
            for index in members:
                path = unfinished / split / str(digits.target[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), enlarge(digits.images[index])):
                    raise OSError(f"cannot write {path}")
        unfinished.chmod(0o755)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {"train": len(train), "val": len(val)}


def enlarge(scan: np.ndarray) -> np.ndarray:
    """(8, 8) with values 0 to 16 to (32, 32) uint8, bicubic."""
    large = cv2.resize(scan * (255 / 16), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.clip(np.rint(large), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
