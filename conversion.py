"""Weights of Swin and SwinV2 in the layouts of four libraries: state dict in, state dict out.

A layout is how a library names and packs the same weights. Each converts to and from the official one, where the
others meet. Reading and writing are in ``tools/convert_checkpoint.py``.

i is a stage, j a block of it, both from 0; C channels, N tokens per window.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from checkpoint import Mismatch, Size, State, is_rebuilt, window_of
from models.layers import relative_coords_table, relative_position_index

# How a library's names begin where the official ones begin otherwise. The first that fits counts.
BLOCK = "layers.{i}.blocks.{j}."
RENAMES = {
    "official": {},
    "timm": {
        "layers.{i}.downsample.": "layers.{i+1}.downsample.",  # it merges patches before a stage, not after one
        "head.": "head.fc.",
    },
    "torchvision": {
        "patch_embed.proj.": "features.0.0.",
        "patch_embed.norm.": "features.0.2.",
        f"{BLOCK}mlp.fc1.": "features.{2i+1}.{j}.mlp.0.",
        f"{BLOCK}mlp.fc2.": "features.{2i+1}.{j}.mlp.3.",
        BLOCK: "features.{2i+1}.{j}.",
        "layers.{i}.downsample.": "features.{2i+2}.",
    },
    "transformers": {  # as in the files of save_pretrained, but for what `PREFIX` says
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "patch_embed.norm.": "embeddings.norm.",
        "absolute_pos_embed": "embeddings.position_embeddings",
        f"{BLOCK}norm1.": f"encoder.{BLOCK}layernorm_before.",
        f"{BLOCK}norm2.": f"encoder.{BLOCK}layernorm_after.",
        f"{BLOCK}attn.q.": f"encoder.{BLOCK}attention.self.query.",
        f"{BLOCK}attn.k.": f"encoder.{BLOCK}attention.self.key.",
        f"{BLOCK}attn.v.": f"encoder.{BLOCK}attention.self.value.",
        f"{BLOCK}attn.proj.": f"encoder.{BLOCK}attention.output.dense.",
        f"{BLOCK}attn.cpb_mlp.": f"encoder.{BLOCK}attention.self.continuous_position_bias_mlp.",
        f"{BLOCK}attn.": f"encoder.{BLOCK}attention.self.",
        f"{BLOCK}mlp.fc1.": f"encoder.{BLOCK}intermediate.dense.",
        f"{BLOCK}mlp.fc2.": f"encoder.{BLOCK}output.dense.",
        "layers.{i}.downsample.": "encoder.layers.{i}.downsample.",
        "norm.": "layernorm.",
        "head.": "classifier.",
    },
}
LAYOUTS = tuple(RENAMES)

# What names may begin with besides: the backbones of official SimMIM and of transformers' classifiers.
PREFIX = {"official": "encoder.", "transformers": "swin.|swinv2."}

# Other names of the same weights: in early official SwinV2 files, and in memory in transformers 5.
ALIASES = {
    "official": {".attn.rpe_mlp.": ".attn.cpb_mlp."},
    "transformers": {
        ".attention.q_proj.": ".attention.self.query.",
        ".attention.k_proj.": ".attention.self.key.",
        ".attention.v_proj.": ".attention.self.value.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".attention.relative_position_bias.": ".attention.self.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    },
}

# The buffers that a library's model wants to find. transformers 4 does with Swin's; 5 passes over it.
BUFFERS = {
    ("torchvision", "swin"): ("relative_position_index",),
    ("torchvision", "swinv2"): ("relative_position_index", "relative_coords_table"),
    ("transformers", "swin"): ("relative_position_index",),
}

TABLES = {"relative_position_index": relative_position_index, "relative_coords_table": relative_coords_table}

# The official names of a model: what it always has, what tells the families apart, what it may have as a whole.
ALWAYS = ("patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias")
MAYBE = (("patch_embed.norm.weight", "patch_embed.norm.bias"), ("absolute_pos_embed",), ("head.weight", "head.bias"))
IN_DOWNSAMPLE = ("reduction.weight", "norm.weight", "norm.bias")
IN_BLOCK = (
    *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)
POSITION_BIAS = {
    "swin": ("attn.relative_position_bias_table",),
    "swinv2": ("attn.logit_scale", "attn.cpb_mlp.0.weight", "attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight"),
}
QKV_BIAS = {"swin": ("attn.qkv.bias",), "swinv2": ("attn.q_bias", "attn.v_bias")}  # the model's qkv_bias
MAYBE_IN_BLOCK = {
    "swin": (QKV_BIAS["swin"], ("attn.relative_position_index",)),
    "swinv2": (QKV_BIAS["swinv2"], ("attn.relative_position_index",), ("attn.relative_coords_table",)),
}

# Relatives that are not converted, by a name that only they have.
RELATIVES = {
    r"\.spatial_mlp\.": "is of SwinMLP, which the libraries do not have",
    r"\._moe_layer\.|\.experts\.": "is of Swin-MoE, which the libraries do not have",
    r"(^|\.)mask_token$|^decoder\.": "is of SimMIM pre-training, not of a classification model; the backbone alone, "
    "without mask token and decoder, can be converted",
}


def convert(
    state: State, source: str, target: str, window_size: int | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` in another layout; its parameters stay the same, bit by bit.

    Args:
        source, target: of `LAYOUTS`.
        window_size: side of all windows. Only torchvision's SwinV2 needs it, where ``state`` does not tell.

    Returns:
        The state dict, and notes on what was left out and on what the target's model must be told.

    Raises:
        ValueError: where something has no place in the target, is unknown or missing; it says what and why.
    """
    if window_size is not None and window_size < 1:
        raise ValueError(f"--window-size {window_size}: must be at least 1")
    official = to_official(state, source)
    converted, notes = from_official(official, target, window_size)
    here, there = (Counter(name.rsplit(".", 1)[-1] for name in each if is_rebuilt(name)) for each in (state, converted))
    if left_out := here - there:
        notes.append(f"left out {_counts(left_out)}, which the model computes")
    if added := there - here:
        # Files of timm and transformers do not say with which windows their model was built, or pre-trained.
        trusted = ", for windows that never were of another size" if added["relative_coords_table"] else ""
        notes.append(f"added {_counts(added)}{trusted}")
    return converted, notes


def detect(names: Iterable[str]) -> str:
    """The layout that names of a state dict are in. Raises ``ValueError`` where it is none."""
    names = list(names)
    if any("embeddings.patch_embeddings." in name for name in names):
        return "transformers"
    if any(name.startswith("features.") for name in names):
        return "torchvision"
    if any("patch_embed.proj." in name for name in names):
        merging = {match[1] for name in names if (match := re.search(r"layers\.(\d+)\.downsample\.", name))}
        # One stage alone merges nothing; then the head tells, without which both layouts are the same.
        return "timm" if (merging and "0" not in merging) or "head.fc.weight" in names else "official"
    raise ValueError(f"no weights of a Swin model in a known layout, by names such as {_some(names)}")


def family_of(official: State) -> str:
    """swin or swinv2, by their position bias. Raises ``ValueError`` where it is neither's."""
    for family, (telling, *_) in POSITION_BIAS.items():
        if any(name.endswith(telling) for name in official):
            return family
    raise ValueError("neither Swin nor SwinV2: no relative_position_bias_table and no logit_scale in its attention")


def to_official(state: State, layout: str) -> dict[str, Tensor]:
    """``state`` of ``layout`` with official names and packing, without masks.

    Raises ``ValueError`` for names that are unknown or missing and for values that the official model cannot hold.
    """
    for name in state:
        for pattern, what in RELATIVES.items():
            if re.search(pattern, name):
                raise ValueError(f"{name} {what}")
    origin = _official_names(state, layout)
    official = {name: state[old] for name, old in origin.items()}
    family = family_of(official)
    if layout == "torchvision":
        _split_bias(official, family)
    if layout == "transformers":
        _pack_qkv(official, family)
    _check_names(official, family, origin)
    for name, index in official.items():
        if name.endswith("relative_position_index"):  # torchvision's is flat
            if (N := math.isqrt(index.numel())) ** 2 != index.numel():
                raise ValueError(f"{origin[name]} is not of N x N pairs of tokens")
            official[name] = index.reshape(N, N)
    return official


def from_official(official: State, layout: str, window_size: int | None = None) -> tuple[dict[str, Tensor], list[str]]:
    """The inverse of `to_official`: ``official`` in ``layout``, and notes as from `convert`.

    Raises ``ValueError`` where the library's model has no place for something, or needs what is not known.
    """
    family = family_of(official)
    _check_place(official, family, layout)
    notes = [] if "head.weight" in official else ["it has no head"]
    notes += _pretrained_windows(official) if layout != "torchvision" else []
    state = _with_buffers(official, family, layout, window_size)
    if layout == "torchvision":
        _join_bias(state, family)
    if layout == "transformers":
        _unpack_qkv(state, family)
    state = {_rename(name, list(RENAMES[layout].items())): value for name, value in state.items()}
    if layout == "transformers":
        state = {name if name.startswith("classifier.") else f"{family}.{name}": state[name] for name in state}
    return state, notes


# Names. A place such as {2i+1} in a template is a number, and says which i it stands for.

PLACE = re.compile(r"\{(\d*)([ij])\+?(\d*)\}")


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    """``name`` with its beginning replaced by the first (old, new) that fits, or as it is."""
    for old, new in rules:
        match = re.match(PLACE.sub(r"(\\d+)", old.replace(".", r"\.")), name)
        if match and (numbers := _solve(old, match.groups())) is not None:
            return _fill(new, numbers) + name[match.end() :]
    return name


def _solve(template: str, found: Iterable[str]) -> dict[str, int] | None:
    """i and j from the numbers at a template's places, or None where there are none that fit."""
    numbers = {}
    for (factor, letter, offset), number in zip(PLACE.findall(template), found, strict=True):
        numbers[letter], rest = divmod(int(number) - int(offset or 0), int(factor or 1))
        if rest or numbers[letter] < 0:
            return None
    return numbers


def _fill(template: str, numbers: dict[str, int]) -> str:
    return PLACE.sub(lambda place: str(int(place[1] or 1) * numbers[place[2]] + int(place[3] or 0)), template)


def _official_names(state: State, layout: str) -> dict[str, str]:
    """For each official name the one in ``state``; masks, which depend on the images' size, are passed over.

    Raises ``ValueError`` for names that are not of the layout: which do not come back when they are renamed back.
    """
    rules = list(RENAMES[layout].items())
    back = [(new, old) for old, new in rules]
    prefixes = PREFIX.get(layout, "").split("|")
    origin, unknown = {}, []
    for name in state:
        plain = name
        for prefix in prefixes:
            plain = plain.removeprefix(prefix)
        for alias, usual in ALIASES.get(layout, {}).items():
            plain = plain.replace(alias, usual)
        official = _rename(plain, back)
        if official.endswith("attn_mask"):
            continue
        if _rename(official, rules) != plain:
            unknown.append(name)
        elif official in origin:
            raise ValueError(f"{origin[official]} and {name} are names of the same weight")
        else:
            origin[official] = name
    if unknown:
        raise ValueError(f"not in the layout of {layout}: {_some(unknown)}")
    return origin


def _check_names(official: State, family: str, origin: dict[str, str]) -> None:
    """Raise ``ValueError`` unless these are all names of a model, and no others; ``origin`` has their old names."""
    depths = _depths(official)
    blocks = [f"layers.{i}.blocks.{j}." for i, depth in enumerate(depths) for j in range(depth)]
    expected = {*ALWAYS, *(block + name for block in blocks for name in IN_BLOCK + POSITION_BIAS[family])}
    expected.update(f"layers.{i}.downsample.{name}" for i in range(len(depths) - 1) for name in IN_DOWNSAMPLE)
    groups = [*MAYBE, *([block + name for block in blocks for name in names] for names in MAYBE_IN_BLOCK[family])]
    for group in groups:
        if any(name in official for name in group):
            expected.update(group)
    unknown = [origin.get(name, name) for name in official if name not in expected]
    if mismatch := Mismatch(sorted(expected - official.keys()), unknown, shapes=[]):
        raise ValueError(f"not the weights of a {family} classification model: {mismatch}")


def _depths(official: State) -> list[int]:
    """The number of blocks of each stage."""
    blocks = {match.groups() for name in official if (match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))}
    depths = Counter(int(i) for i, _ in blocks)
    return [depths[i] for i in range(len(depths))]


def _attentions(official: State) -> list[str]:
    """How the names of each attention begin."""
    return [f"layers.{i}.blocks.{j}.attn." for i, depth in enumerate(_depths(official)) for j in range(depth)]


def _counts(names: Counter) -> str:
    return ", ".join(f"{count} {name}" for name, count in names.items())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# Attention: q, k and v are packed in one matrix, or are three. SwinV2's k has no bias.


def _pack_qkv(state: dict[str, Tensor], family: str) -> None:
    """transformers' separate q, k, v to the official packing, in place; incomplete ones stay for `_check_names`."""
    for attention in _attentions(state):
        if family == "swinv2":
            _move(state, {f"{attention}{part}.bias": f"{attention}{part}_bias" for part in "qv"})
        for kind in ("weight", "bias"):
            parts = [f"{attention}{part}.{kind}" for part in "qkv"]
            if all(part in state for part in parts):
                state[f"{attention}qkv.{kind}"] = torch.cat([state.pop(part) for part in parts])


def _unpack_qkv(state: dict[str, Tensor], family: str) -> None:
    """The inverse of `_pack_qkv`."""
    for attention in _attentions(state):
        if family == "swinv2":
            _move(state, {f"{attention}{part}_bias": f"{attention}{part}.bias" for part in "qv"})
        for kind in ("weight", "bias"):
            if (name := f"{attention}qkv.{kind}") in state:
                parts = state.pop(name).chunk(3)
                state.update({f"{attention}{part}.{kind}": x.clone() for part, x in zip("qkv", parts, strict=True)})


def _split_bias(state: dict[str, Tensor], family: str) -> None:
    """torchvision's bias of q, k and v in SwinV2 to the official q_bias and v_bias, in place.

    Raises ``ValueError`` where that of k is not zero.
    """
    for attention in _attentions(state) if family == "swinv2" else ():
        if (name := f"{attention}qkv.bias") in state:
            q, k, v = state.pop(name).chunk(3)
            if k.any():
                raise ValueError(
                    f"{_rename(name, list(RENAMES['torchvision'].items()))} is not zero for k, which has no bias in "
                    "SwinV2; torchvision's model passes over these values, so they can be set to zero"
                )
            state[f"{attention}q_bias"], state[f"{attention}v_bias"] = q.clone(), v.clone()


def _join_bias(state: dict[str, Tensor], family: str) -> None:
    """The inverse of `_split_bias`."""
    for attention in _attentions(state) if family == "swinv2" else ():
        q, v = state.pop(f"{attention}q_bias"), state.pop(f"{attention}v_bias")
        state[f"{attention}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])


def _move(state: dict[str, Tensor], names: dict[str, str]) -> None:
    for old, new in names.items():
        if old in state:
            state[new] = state.pop(old)


# What a library's model can hold, and what it must find.


def _check_place(official: State, family: str, layout: str) -> None:
    """Raise ``ValueError`` where weights have no place in the library's model, or do not suffice for it."""
    if layout == "official":
        return
    if "patch_embed.norm.weight" not in official:
        raise ValueError(f"patch_embed.norm is missing (patch_norm=False); models of {layout} always have it")
    if "absolute_pos_embed" in official:
        if layout != "transformers":
            raise ValueError(f"absolute_pos_embed has no place: models of {layout} have no such embedding")
        if family == "swinv2":  # it is one position longer than the map
            raise ValueError("absolute_pos_embed has no place: transformers' SwinV2 fails with such an embedding")
    if layout == "torchvision":
        if f"layers.0.blocks.0.{QKV_BIAS[family][0]}" not in official:
            raise ValueError("the bias of q, k, v is missing (qkv_bias=False); models of torchvision always have it")
        if (channels := official["patch_embed.proj.weight"].shape[1]) != 3:
            raise ValueError(f"patch_embed.proj is for {channels} channels; models of torchvision take images of 3")


def _check_windows(windows: list[Size | None], family: str, layout: str, window_size: int | None) -> None:
    """Raise ``ValueError`` where the library's model cannot have such windows, or the user says others."""
    known = [window for window in windows if window is not None]
    for h, w in known:
        if window_size is not None and (h, w) != (window_size, window_size):
            raise ValueError(f"--window-size {window_size}: these weights are of windows of {h}x{w}")
        if layout == "transformers" and h != w:
            raise ValueError(f"windows of {h}x{w}: those of models of transformers are square")
    if (layout == "torchvision" or (layout, family) == ("transformers", "swin")) and len(set(known)) > 1:
        raise ValueError(f"windows differ in size between stages; {family} models of {layout} have one size for all")
    areas = [h * w for h, w in known]
    if layout != "timm" and areas != sorted(areas, reverse=True):  # as those of timm's swin_s3 do
        raise ValueError("windows grow from stage to stage, as those of no models but timm's can")


def _window(official: State, attention: str) -> Size | None:
    """(height, width) of the windows of an attention, by its tables, or None where they do not tell."""
    if (index := official.get(f"{attention}relative_position_index")) is not None:
        return window_of(index)
    if (coords := official.get(f"{attention}relative_coords_table")) is not None:  # 1, 2h - 1, 2w - 1, 2
        return (coords.shape[1] + 1) // 2, (coords.shape[2] + 1) // 2
    if (table := official.get(f"{attention}relative_position_bias_table")) is not None:  # (2h - 1) * (2w - 1), nH
        side = math.isqrt(len(table))
        return ((side + 1) // 2, (side + 1) // 2) if side * side == len(table) else None
    return None


def _with_buffers(official: State, family: str, layout: str, window_size: int | None) -> dict[str, Tensor]:
    """``official`` with the `BUFFERS` of the layout and no others; an official file keeps what there is.

    Raises ``ValueError`` for windows that the layout cannot have, or that must be known and are not.
    """
    windows = {attention: _window(official, attention) for attention in _attentions(official)}
    _check_windows(list(windows.values()), family, layout, window_size)
    if layout == "official":
        return dict(official)
    state = {name: value for name, value in official.items() if not is_rebuilt(name)}
    for attention, window in windows.items():
        for name in BUFFERS.get((layout, family), ()):
            value = official.get(attention + name)
            if value is None:
                value = TABLES[name](window or _told(window_size, family))
            if layout == "torchvision" and name == "relative_position_index":
                value = value.flatten()
            state[attention + name] = value
    return state


def _told(window_size: int | None, family: str) -> int:
    """The user's ``window_size``. Raises ``ValueError`` where it is needed and missing, or of no use."""
    if family == "swin":
        raise ValueError("relative_position_index is missing, and windows that are not square need it")
    if window_size is None:
        raise ValueError("SwinV2 weights without tables do not tell the size of windows; give it with --window-size")
    return window_size


def _pretrained_windows(official: State) -> list[str]:
    """A note where SwinV2's coordinates are of the windows of a pre-training, and these were of another size."""
    windows, pretrained = [], []
    for i in range(len(_depths(official))):
        coords = official.get(f"layers.{i}.blocks.0.attn.relative_coords_table")
        if coords is None:
            return []
        lasts = coords[0, -1, -1].tolist()  # of height and width: log2(1 + 8 (window - 1) / (pretrained - 1)) / 3
        sides = [(side + 1) // 2 for side in coords.shape[1:3]]
        windows.append(sides)
        scales = [2 ** (3 * last) - 1 for last in lasts]
        pretrained.append([round(8 * (w - 1) / s) + 1 if s > 0 else w for w, s in zip(sides, scales, strict=True)])
    if pretrained == windows:
        return []
    plain = [h if h == w else [h, w] for h, w in pretrained]
    return [f"the model needs pretrained_window_sizes={plain}"]
