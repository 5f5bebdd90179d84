"""Checkpoints as pure functions: state dict in, state dict out. Reading and writing are in `utils`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

State = Mapping[str, Tensor]

# Buffers that a model computes for itself from its sizes. A checkpoint's copy is never needed.
REBUILT_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask")


@dataclass(frozen=True)
class Mismatch:
    """How a state dict differs from the one that a model expects."""

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]  # "name: 3x4 in the file, 3x5 in the model"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {label} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for label, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape", self.shapes),
            )
            if names
        ]
        return "; ".join(parts) or "no differences"


def is_rebuilt(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in REBUILT_BUFFERS


def compare(state: State, expected: State) -> Mismatch:
    """Differences in names and shapes, rebuilt buffers apart."""
    names = [name for name in expected if not is_rebuilt(name)]
    return Mismatch(
        missing=[name for name in names if name not in state],
        unexpected=[name for name in state if name not in expected and not is_rebuilt(name)],
        shapes=[
            f"{name}: {_shape(state[name])} in the file, {_shape(expected[name])} in the model"
            for name in names
            if name in state and state[name].shape != expected[name].shape
        ],
    )


def strict_state(state: State, expected: State) -> dict[str, Tensor]:
    """``state`` for a model of exactly these weights, with rebuilt buffers from ``expected``.

    Raises ``ValueError`` with a report where any other name or shape differs.
    """
    mismatch = compare(state, expected)
    if mismatch:
        raise ValueError(f"its weights are not this model's: {mismatch}")
    return {name: value if is_rebuilt(name) else state[name] for name, value in expected.items()}


def pretrained_state(
    state: State, expected: State, rows_22k_to_1k: Sequence[int] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` made to fit a model of another resolution, window or class count (official ``load_pretrained``).

    Position tables are resized bicubically; a 21,841-class head becomes a 1,000-class one by the given rows; another
    head that does not fit is set to zero.

    Returns:
        The state dict, complete for ``expected``, and a note for each thing that was changed.

    Raises:
        ValueError: where anything else does not fit.
    """
    state = {name: value for name, value in state.items() if not is_rebuilt(name)}
    notes = []
    for name, value in list(state.items()):
        target = expected.get(name)
        if target is None or target.shape == value.shape:
            continue
        if name.endswith("relative_position_bias_table"):
            state[name] = resize_bias_table(value, target)
        elif name.endswith("absolute_pos_embed"):
            state[name] = resize_position_embedding(value, target)
        else:
            continue
        notes.append(f"{name}: resized from {_shape(value)} to {_shape(target)}")
    notes += _fit_head(state, expected, rows_22k_to_1k)
    return strict_state(state, expected), notes


def _fit_head(state: dict[str, Tensor], expected: State, rows_22k_to_1k: Sequence[int] | None) -> list[str]:
    """Give ``state`` a head of the expected class count, in place. Returns notes."""
    wanted, found = (s["head.bias"].shape[0] if "head.bias" in s else 0 for s in (expected, state))
    if found == wanted:
        return []
    if wanted == 0:
        del state["head.weight"], state["head.bias"]
        return [f"head: {found} classes in the file, none in the model; left out"]
    if found == 21841 and wanted == 1000 and rows_22k_to_1k is not None:
        rows = torch.as_tensor(rows_22k_to_1k)
        for name in ("head.weight", "head.bias"):
            state[name] = state[name][rows]
        return ["head: ImageNet-22K rows mapped to ImageNet-1K classes"]
    for name in ("head.weight", "head.bias"):
        state[name] = torch.zeros_like(expected[name])
    return [f"head: {found or 'no'} classes in the file, {wanted} in the model; set to zero"]


def resize_bias_table(table: Tensor, like: Tensor) -> Tensor:
    """Resize a relative position bias table ((2w - 1)^2, nH) bicubically, as the official main scripts do.

    Raises ``ValueError`` where the number of heads differs.
    """
    old, new = _table_sides(table, like)
    grid = table.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.reshape(-1, new * new).T


def resize_bias_table_geometric(table: Tensor, like: Tensor) -> Tensor:
    """Resize a relative position bias table ((2w - 1)^2, nH) as official SimMIM fine-tuning does.

    The old offsets are spread over the new range in a geometric progression, dense near 0 where neighbours are, and a
    cubic spline through them is read at the new offsets.

    Raises ``ValueError`` where the number of heads differs.
    """
    old, new = _table_sides(table, like)
    if old == new:
        return table
    steps = np.cumsum(_progression_ratio(old // 2, new // 2) ** np.arange(old // 2))
    places = np.concatenate([-steps[::-1], [0.0], steps])
    wanted = np.arange(new) - new // 2
    grids = table.T.reshape(-1, old, old).double().cpu().numpy()
    resized = np.stack([RectBivariateSpline(places, places, grid)(wanted, wanted) for grid in grids])  # nH, new, new
    return torch.from_numpy(resized.reshape(-1, new * new).T.copy()).to(table)


def _table_sides(table: Tensor, like: Tensor) -> tuple[int, int]:
    """2w - 1 of the old and of the new window of two bias tables with the same heads."""
    if table.shape[1] != like.shape[1]:
        raise ValueError(f"relative_position_bias_table has {table.shape[1]} heads, the model {like.shape[1]}")
    return _side(table.shape[0]), _side(like.shape[0])


def _progression_ratio(terms: int, total: int) -> float:
    """The ratio between 1.01 and 1.5 at which 1 + q + q^2 + ... of so many terms comes nearest to ``total``."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**terms) / (1 - ratio) > total:
            high = ratio
        else:
            low = ratio
    return ratio


def resize_position_embedding(embedding: Tensor, like: Tensor) -> Tensor:
    """Resize an absolute position embedding (1, L, C) bicubically, as the official main scripts do.

    Raises ``ValueError`` where the number of channels differs.
    """
    if embedding.shape[2] != like.shape[2]:
        raise ValueError(f"absolute_pos_embed has {embedding.shape[2]} channels, the model {like.shape[2]}")
    old, new = _side(embedding.shape[1]), _side(like.shape[1])
    grid = embedding.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def _side(count: int) -> int:
    side = int(count**0.5 + 0.5)
    if side * side != count:
        raise ValueError(f"a table of {count} positions is not square, so it cannot be resized")
    return side


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
