"""Checkpoints as pure functions: state dict in, state dict out. Reading and writing are in `storage` and `utils`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

State = Mapping[str, Tensor]
Size = tuple[int, int]  # (height, width)

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

    def lines(self) -> list[str]:
        """Every difference, one to a line."""
        return [
            *(f"missing: {name}" for name in self.missing),
            *(f"unexpected: {name}" for name in self.unexpected),
            *(f"of another shape: {shape}" for shape in self.shapes),
        ]


class WeightsError(ValueError):
    """Weights that are not a model's; ``mismatch`` says how they differ."""

    def __init__(self, mismatch: Mismatch):
        super().__init__(f"its weights are not this model's: {mismatch}")
        self.mismatch = mismatch


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

    Raises `WeightsError` where any other name or shape differs, or a table is of other windows.
    """
    mismatch = compare(state, expected)
    for name, index in _indices(state).items():
        if name in expected and _table_of(name) in expected and window_of(index) != window_of(expected[name]):
            mismatch.shapes.append(f"{_table_of(name)}: {_windows(index)} in the file, {_windows(expected[name])} here")
    if mismatch:
        raise WeightsError(mismatch)
    return {name: value if is_rebuilt(name) else state[name] for name, value in expected.items()}


def pretrained_state(
    state: State,
    expected: State,
    rows_22k_to_1k: Sequence[int] | None = None,
    old_resolution: Size | None = None,
    resolution: Size | None = None,
    resize_table: Callable[[Tensor, Size, Size], Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` made to fit a model of other sizes (official ``load_pretrained``, and more).

    Position tables are resized; the first convolution is adapted to another number of channels; a 21,841-class head
    becomes a 1,000-class one by the given rows; another head that does not fit is set to zero, and where the file has
    none the model's own stays.

    Args:
        resize_table: how bias tables are resized: `resize_bias_table` if None, or `resize_bias_table_geometric`.
        old_resolution, resolution: (H, W) of the first map, of the file's model and of this one, for the position
            embedding; square if None.

    Returns:
        The state dict, complete for ``expected``, and a note for each thing that was changed.

    Raises:
        WeightsError: where anything else does not fit.
        ValueError: for positions whose sides cannot be known.
    """
    state, notes = released_names(state, expected)
    indices = _indices(state)
    state = {name: value for name, value in state.items() if not is_rebuilt(name)}
    for name, value in list(state.items()):
        target = expected.get(name)
        if target is None:
            continue
        if name.endswith("relative_position_bias_table") and target.shape[1] == value.shape[1]:
            index = name.replace("bias_table", "index")
            old = window_of(indices[index]) if index in indices else _square(value.shape[0], lambda side: 2 * side - 1)
            fitted = (resize_table or resize_bias_table)(value, old, window_of(expected[index]))
        elif name.endswith("absolute_pos_embed") and target.shape[2] == value.shape[2]:
            grids = (grid or _square(x.shape[1]) for grid, x in ((old_resolution, value), (resolution, target)))
            fitted = resize_position_embedding(value, *grids)
        elif name == "patch_embed.proj.weight" and target.shape[0::2] == value.shape[0::2]:
            fitted = adapt_channels(value, target.shape[1])
        else:
            continue
        if fitted is not value:
            state[name] = fitted
            notes.append(f"{name}: from {_shape(value)} to {_shape(target)}")
    notes += _fit_head(state, expected, rows_22k_to_1k)
    return strict_state(state, expected), notes


def other_coordinates(state: State, expected: State) -> bool:
    """Whether SwinV2's coordinates in the file, of the same windows, have another scale: another pre-trained window."""
    return any(
        name.endswith("relative_coords_table")
        and name in expected
        and expected[name].shape == value.shape
        and not torch.allclose(expected[name].float().cpu(), value.float(), atol=1e-3)
        for name, value in state.items()
    )


def _indices(state: State) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.endswith("relative_position_index")}


def _table_of(index_name: str) -> str:
    return index_name.replace("relative_position_index", "relative_position_bias_table")


def _windows(index: Tensor) -> str:
    return "windows of {}x{}".format(*window_of(index))


def is_pretraining(state: State) -> bool:
    """Whether it is SimMIM's pre-training model: an encoder, and a decoder."""
    return any(name.startswith("encoder.") for name in state)


def architecture(state: State) -> dict[str, Any] | None:
    """A Swin's ``DEPTHS`` and ``EMBED_DIM``; None where the names are not those of one."""
    places = [match for name in state if (match := re.match(r"(?:encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.", name))]
    patches = next((value for name, value in state.items() if name.endswith("patch_embed.proj.weight")), None)
    if not places or patches is None:
        return None
    blocks = {(int(match[1]), int(match[2])) for match in places}
    depths = [sum(stage == s for stage, _ in blocks) for s in sorted({stage for stage, _ in blocks})]
    return {"DEPTHS": depths, "EMBED_DIM": patches.shape[0]}


def released_names(state: State, expected: State) -> tuple[dict[str, Tensor], list[str]]:
    """The names of released files as the expected model has them, and a note for each thing that was left out.

    SimMIM's pre-training files hold the backbone under ``encoder.``, beside a decoder and a mask token; early SwinV2
    files say ``rpe_mlp`` for ``cpb_mlp``.
    """
    notes, kept = [], dict(state)
    if is_pretraining(state) and not is_pretraining(expected):
        kept = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
        left_out = [name for name in state if not name.startswith("encoder.")]
        if "mask_token" in kept:
            del kept["mask_token"]
            left_out.append("encoder.mask_token")
        notes.append(f"the encoder of a pre-training file; left out: {', '.join(left_out) or 'nothing'}")
    return {name.replace("rpe_mlp", "cpb_mlp"): value for name, value in kept.items()}, notes


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """The first convolution (embed_dim, C, h, w) for images of another number of channels; itself for the same.

    To one channel: summed, as for a grey image given to every channel. To others: repeated in turn, and scaled by C /
    in_chans so that the output keeps its size.
    """
    channels = weight.shape[1]
    if channels == in_chans:
        return weight
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(in_chans) % channels] * (channels / in_chans)


def classes_of(state: State) -> int:
    """Of its head; 0 where it has none."""
    return state["head.bias"].shape[0] if "head.bias" in state else 0


def keeps_head(state: State, expected: State) -> bool:
    """Whether `pretrained_state` gives the model what the file's head has learnt."""
    return classes_of(state) == classes_of(expected) or (classes_of(state), classes_of(expected)) == (21841, 1000)


def _fit_head(state: dict[str, Tensor], expected: State, rows_22k_to_1k: Sequence[int] | None) -> list[str]:
    """Give ``state`` a head of the expected class count, in place. Returns notes."""
    wanted, found = classes_of(expected), classes_of(state)
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
        state[name] = torch.zeros_like(expected[name]) if found else expected[name]
    change = "set to zero" if found else "as initialised"
    return [f"head: {found or 'no'} classes in the file, {wanted} in the model; {change}"]


def resize_bias_table(table: Tensor, old: Size, new: Size) -> Tensor:
    """Resize a relative position bias table ((2h - 1) * (2w - 1), nH) bicubically, as the official main scripts do.

    Args:
        old, new: (height, width) of the windows.
    """
    if old == new:
        return table
    (H, W), target = ((2 * h - 1, 2 * w - 1) for h, w in (old, new))
    grid = table.T.reshape(1, -1, H, W)
    grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous()


def resize_bias_table_geometric(table: Tensor, old: Size, new: Size) -> Tensor:
    """Resize a relative position bias table ((2h - 1) * (2w - 1), nH) as official SimMIM fine-tuning does.

    The old offsets are spread over the new range in a geometric progression, dense near 0 where neighbours are, and a
    cubic spline through them is read at the new offsets.

    Args:
        old, new: (height, width) of the windows.

    Raises ``ValueError`` for an old window of one row or column, which tells nothing of other offsets.
    """
    if old == new:
        return table
    if min(old) < 2:
        raise ValueError(f"a table of {old[0]}x{old[1]} windows cannot be resized to {new[0]}x{new[1]} windows")
    places = [_progression(before, after) for before, after in zip(old, new, strict=True)]
    wanted = [np.arange(-(side - 1), side) for side in new]
    grids = table.T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1).double().cpu().numpy()
    kx, ky = (min(3, len(place) - 1) for place in places)  # a spline of cubics needs four places
    splines = [RectBivariateSpline(*places, grid, kx=kx, ky=ky) for grid in grids]
    resized = np.stack([spline(*wanted) for spline in splines])  # nH, 2h - 1, 2w - 1
    return torch.from_numpy(resized.reshape(len(grids), -1).T.copy()).to(table)


def _progression(old: int, new: int) -> np.ndarray:
    """Where the offsets of a window of side ``old`` lie in one of side ``new``: 2 old - 1 places, symmetric."""
    steps = np.cumsum(_progression_ratio(old - 1, new - 1) ** np.arange(old - 1))
    return np.concatenate([-steps[::-1], [0.0], steps])


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


def resize_position_embedding(embedding: Tensor, old: Size, new: Size) -> Tensor:
    """Resize an absolute position embedding (1, H * W, C) bicubically, as the official main scripts do.

    Args:
        old, new: (H, W) of the maps.
    """
    if old == new:
        return embedding
    grid = embedding.unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def window_of(index: Tensor) -> Size:
    """(height, width) of the window whose ``relative_position_index`` (N, N) this is."""
    from_first = (index[:, 0] - index[0, 0]).tolist()  # 0, 1, ..., w - 1, then 2w - 1 where the next row begins
    count = len(from_first)
    # A single column has the numbers, and the table, of a single row, and is taken for one.
    width = next((i for i, step in enumerate(from_first) if i > 1 and step == 2 * i - 1), count)
    return count // width, width


def _square(count: int, rows: Callable[[int], int] = lambda side: side) -> Size:
    """The side whose table has ``count`` = ``rows(side)`` ** 2 positions, twice."""
    side = next((side for side in range(1, count + 1) if rows(side) ** 2 >= count), 0)
    if rows(side) ** 2 != count:
        raise ValueError(f"a table of {count} positions is not square, so it cannot be resized")
    return side, side


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
