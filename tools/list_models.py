"""List the models of configs/: size, cost, published accuracy, and whether there are released weights.

python tools/list_models.py
python tools/list_models.py 'swinv2_*_256' --json

A model of the list is built by `import models.registry; timm.create_model("official_NAME")`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from config import nearest
from models.registry import CATALOGUE, PREFIX, Entry


def or_dash(form: str, scale: float = 1.0) -> Callable[[float | None], str]:
    """Writes numbers in units of ``scale``, and a dash for None."""
    return lambda value: "-" if value is None else format(value / scale, form)


# Column: key of `describe`, and how its value is written.
COLUMNS = {
    "name": ("name", str),
    "family": ("family", str),
    "image": ("image_size", lambda size: "x".join(map(str, size))),
    "classes": ("num_classes", str),
    "params (M)": ("parameters", or_dash(".1f", 1e6)),
    "GFLOPs": ("flops", or_dash(".1f", 1e9)),
    "top-1 (%)": ("top1", or_dash(".1f")),
    "weights": ("weights", lambda address: "yes" if address else "no"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("filter", nargs="?", default="*", help="of the names, with * and ?; all models if left out")
    parser.add_argument("--json", action="store_true", help="JSON, with exact numbers, instead of a table")
    args = parser.parse_args()
    try:
        rows = [describe(entry) for entry in select(args.filter)]
    except ValueError as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")
    sys.stdout.write(json.dumps(rows, indent=2) + "\n" if args.json else table(rows))


def select(pattern: str) -> list[Entry]:
    """The models whose names, with or without timm's prefix, match. Raises ``ValueError`` where none does."""
    pattern = pattern.removeprefix(PREFIX)
    chosen = [entry for name, entry in CATALOGUE.items() if fnmatchcase(name, pattern)]
    if not chosen:
        raise ValueError(f"no model matches {pattern!r}{nearest(pattern, CATALOGUE)}; * stands for any characters")
    return chosen


def describe(entry: Entry) -> dict[str, Any]:
    """A model's facts as plain data; None for those that are not known."""
    config = entry.config
    with torch.device("meta"):
        model = timm.create_model(PREFIX + entry.name)
    return {
        "name": entry.name,
        "family": entry.family,
        "image_size": list(to_2tuple(config.DATA.IMG_SIZE)),
        "num_classes": entry.num_classes,
        "parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "flops": model.flops(),
        "top1": published(entry.expected),
        "expected": entry.expected,
        "weights": entry.weights or None,
    }


def published(expected: str) -> float | None:
    """The top-1 accuracy, in percent, of the released weights, else of the paper, from an ``# Expected:`` line."""
    numbers = re.findall(r"([\d.]+) %[^(,;]*\(([^)]*)\)", expected)
    released = [number for number, source in numbers if "released" in source]
    return float((released or [number for number, _ in numbers])[0]) if numbers else None


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns, texts to the left and numbers to the right."""
    cells = [list(COLUMNS)]
    for row in rows:
        cells.append([write(row[key]) for key, write in COLUMNS.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
