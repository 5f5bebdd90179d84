"""Write data/map22kto1k.txt: for each ImageNet-1K class, its row in an ImageNet-22K head of 21,841 classes.

python tools/make_22k_map.py

Rows are positions in timm's list of ImageNet-21K synsets. One 1K synset, n04399382, is not in it; the official map
gives it row 5564.
"""

import sys
from pathlib import Path

from timm.data import ImageNetInfo

ABSENT = {"n04399382": 5564}
MAP = Path(__file__).parent.parent / "data" / "map22kto1k.txt"


def build_map() -> list[int]:
    """The 1,000 rows, in the order of ImageNet-1K's classes."""
    rows = {synset: row for row, synset in enumerate(ImageNetInfo("imagenet21k_goog").label_names())}
    return [ABSENT[synset] if synset in ABSENT else rows[synset] for synset in ImageNetInfo("imagenet1k").label_names()]


if __name__ == "__main__":
    MAP.write_text("".join(f"{row}\n" for row in build_map()))
    sys.stdout.write(f"{MAP}: {len(build_map())} rows\n")
