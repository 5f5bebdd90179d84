"""What a GPU is asked for, and whether results of benchmarks/throughput.py reach it. For one H200, in bfloat16."""

import json
from dataclasses import dataclass
from pathlib import Path

TIMES_BEST_PEER = 1.5  # compiled, as the peer
SHARE_OF_TIMM_S_MEMORY = 0.7  # at the peak of a training step


@dataclass(frozen=True)
class Target:
    title: str
    model: str
    mode: str  # inference or train
    batch: int
    images_per_second: float


TARGETS = (
    Target("Swin-T inference", "swin_tiny", "inference", 256, 30_000),
    Target("Swin-B inference", "swin_base", "inference", 256, 12_000),
    Target("Swin-T training", "swin_tiny", "train", 128, 9_500),
    Target("Swin-B training", "swin_base", "train", 128, 3_700),
)


def section(folder: Path) -> str:
    """A table of targets that are met or missed, by the results on CUDA in ``folder``; empty where it has none."""
    if not list(folder.glob("throughput-*.json")):
        return ""
    lines = ["", "## Targets", "", "| target | wanted | measured | outcome |", "|---|---|---|---|"]
    for target in TARGETS:
        eager, compiled = (_rows(folder, target, suffix) for suffix in ("", "-compiled"))
        best = max((row["images_per_second"] for row in _ours(eager) + _ours(compiled)), default=None)
        lines.append(_line(f"{target.title}, images/s", target.images_per_second, best, ".0f"))
        has_peer = any(not row["candidate"].startswith("ours") for row in compiled)
        ratio = max((row["ratio_to_best_peer"] for row in _ours(compiled) if has_peer), default=None)
        lines.append(_line(f"{target.title}, compiled, times the fastest peer", TIMES_BEST_PEER, ratio, ".2f"))
        if target.mode == "train":
            for rows, how in ((eager, "eager"), (compiled, "compiled")):
                title = f"{target.title}, {how}, peak memory as a share of timm's"
                lines.append(_line(title, SHARE_OF_TIMM_S_MEMORY, _share_of_timm_s_memory(rows), ".2f", most=True))
    return "\n".join(lines) + "\n"


def _rows(folder: Path, target: Target, suffix: str) -> list[dict]:
    """Candidates, the fastest first."""
    path = folder / f"throughput-{target.model}-cuda-{target.mode}{suffix}-bf16-b{target.batch}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _ours(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["candidate"].startswith("ours")]


def _share_of_timm_s_memory(rows: list[dict]) -> float | None:
    """That of our fastest candidate."""
    peaks = {row["candidate"]: row["peak_bytes"] for row in rows}
    return _ours(rows)[0]["peak_bytes"] / peaks["timm"] if _ours(rows) and "timm" in peaks else None


def _line(title: str, wanted: float, measured: float | None, form: str, most: bool = False) -> str:
    bound = f"at {'most' if most else 'least'} {wanted:{form}}"
    if measured is None:
        return f"| {title} | {bound} | - | not measured |"
    met = measured <= wanted if most else measured >= wanted
    return f"| {title} | {bound} | {measured:{form}} | {'met' if met else 'missed'} |"
