"""Images per second of the input pipeline: every source and decoder, beside timm and torchvision, taking turns.

python benchmarks/loader.py datasets/imagenet/train              # per core: one process, one thread
python benchmarks/loader.py datasets/imagenet/train --workers 8  # per machine: as many workers as there are cores
python benchmarks/loader.py --tar photographs.tar --candidates 'device/*'

Some of the photographs are packed into every form in a temporary folder. In each round every candidate loads all of
them once, in a new order, and what counts is the ratio of times within a round. Per core, time is the CPU time of all
threads, so that a thread which reads ahead is counted, and neighbours on the machine are not; per machine, it is the
time that passes. The files lie in the system's cache. Table, JSON and plot go to benchmarks/results/.
"""

import argparse
import fnmatch
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import PIL
import timm
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from timm.data import auto_augment, create_dataset, create_loader, create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.throughput import describe_machine  # noqa: E402 - a script outside the root
from config import get_config  # noqa: E402
from data.augment import Finish  # noqa: E402
from data.build import build_loader  # noqa: E402
from data.shards import ShardSet  # noqa: E402
from data.sources import FolderSource  # noqa: E402
from data.tar import IMAGE_SUFFIXES  # noqa: E402
from data.transforms import posterize  # noqa: E402
from logger import ProgressBar  # noqa: E402
from tools.make_22k_list import make_lists  # noqa: E402
from tools.make_shards import SHARD_SIZES, Options, make_shards  # noqa: E402
from tools.make_zip import make_zip  # noqa: E402

SPLITS = ["train", "val"]
SIDE = 256  # shortest side, in pixels, of the small forms
CLASSES = 4  # that photographs of a tar file are put into
DECODERS = ("pil", "torchvision", "cv2", "simplejpeg")
DEFAULT = "cv2"  # the decoder that DATA.DECODER auto means for training in the device pipeline

# Source: the folder of the same JPEG files, its own folder, what to set.
SOURCES: dict[str, tuple[str, str, dict[str, str]]] = {
    "folder": ("folder", "folder", {"DATA.SOURCE": "folder"}),
    "zip": ("folder", "zip", {"DATA.SOURCE": "zip", "DATA.CACHE_MODE": "no"}),
    "zip-cached": ("folder", "zip", {"DATA.SOURCE": "zip", "DATA.CACHE_MODE": "full"}),
    "list": ("folder", "folder", {"DATA.SOURCE": "list"}),
    "tar": ("folder", "tar", {"DATA.SOURCE": "shards"}),
    "tar256": ("folder256", "tar256", {"DATA.SOURCE": "shards"}),
    "raw256": ("folder256", "raw256", {"DATA.SOURCE": "raw"}),
}
FILES = ("folder", "folder256")

# Pipelines, in the order of the table.
MEANINGS = {
    "device": "this code's default where there is an accelerator, as far as the workers do it: uint8 crops come out",
    "device+finish": "the same with the device's part, done by this CPU: finished batches come out",
    "official": "DATA.PIPELINE official of this code: finished batches come out",
    "recipe": "the official recipe: ImageFolder, PIL and timm's create_transform; finished batches come out",
    "timm": "timm's create_loader, without its prefetcher: finished batches come out",
    "timm-workers": "timm's create_loader with its prefetcher, as far as the workers do it: uint8 images come out",
    "torchvision": "torchvision's reference pipeline on PIL images: finished batches come out",
    "torchvision-v2": "the same on tensors, transforms v2; RandAugment has no bicubic there, so it is bilinear",
}
PEERS = ("timm", "timm-workers", "torchvision", "torchvision-v2")
UNFINISHED = ("device", "timm-workers")
# Times the official recipe on the full-size files, per core, in the default pipeline.
TARGETS = {f"device/folder/{DEFAULT}": 1.5, f"device/tar256/{DEFAULT}": 4.0, "device/raw256/none": 15.0}

Made = tuple[DataLoader, Finish | None]


@dataclass(frozen=True)
class Candidate:
    """A loader to time. ``files``: the folder of the JPEG files that it reads in some form; ``make``: from workers."""

    pipeline: str
    source: str
    decoder: str
    files: str
    make: Callable[[int], Made]

    @property
    def name(self) -> str:
        return f"{self.pipeline}/{self.source}/{self.decoder}"


# --- Data ---------------------------------------------------------------------------------------------------------


def unpack(tar: Path, target: Path) -> None:
    """Put a tar file's photographs into a few made-up class folders."""
    with tarfile.open(tar) as archive:
        members = [member for member in archive if member.isfile() and _is_image(member.name)]
        for number, member in enumerate(members):
            folder = target / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:06d}-{Path(member.name).name}").write_bytes(archive.extractfile(member).read())


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_SUFFIXES


def prepare(photos: Path, count: int, root: Path, workers: int) -> dict[str, Any]:
    """Copy ``count`` photographs, drawn by chance, to ``root`` and pack them into every form; facts about them."""
    found = FolderSource(photos)
    chosen = sorted(random.Random(0).sample(range(len(found)), min(count, len(found))))
    for number in chosen:
        folder = root / "folder" / "train" / found.classes[found.labels[number]]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(found.paths[number], folder / f"{number:08d}-{Path(found.paths[number]).name}")
    unused = root / "folder" / "val" / found.classes[found.labels[chosen[0]]] / "unused.jpg"  # validation needs some
    unused.parent.mkdir(parents=True)
    Image.new("RGB", (SIDE, SIDE)).save(unused)
    source = root / "folder"
    make_zip(source, root / "zip", SPLITS, workers)
    make_lists(source, train_folder="train", val_folder="val", workers=workers)
    make_shards(source, root / "tar", SPLITS, Options(), workers)
    make_shards(source, root / "tar256", SPLITS, Options(shortest_side=SIDE), workers)
    make_shards(source, root / "raw256", SPLITS, Options("raw", SHARD_SIZES["raw"], SIDE), workers)
    for split in SPLITS:
        spread(ShardSet(root / "tar256" / split), root / "folder256" / split)
    return describe(source / "train")


def spread(shards: ShardSet, target: Path) -> None:
    """Write the images of shards, byte for byte, to class folders."""
    for shard in range(len(shards.urls)):
        for position, name, data, label in shards.read(shard):
            folder = target / shards.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{position:08d}{Path(name).suffix}").write_bytes(data)


def describe(folder: Path) -> dict[str, Any]:
    paths = FolderSource(folder).paths
    sizes = []
    for path in paths:
        with Image.open(path) as image:
            sizes.append(image.size)
    width, height = (round(statistics.mean(side)) for side in zip(*sizes, strict=True))
    return {
        "photographs": len(paths),
        "mean_size": f"{width} x {height}",
        "mean_kilobytes": round(statistics.mean(map(os.path.getsize, paths)) / 1000),
    }


# --- Candidates -----------------------------------------------------------------------------------------------------


def configuration(folder: Path, batch: int, workers: int, **keys: Any) -> Any:
    values = {
        "DATA.DATA_PATH": folder,
        "DATA.BATCH_SIZE": batch,
        "DATA.NUM_WORKERS": workers,
        "DATA.PIN_MEMORY": False,
        **keys,
    }
    return get_config(SimpleNamespace(opts=[str(part) for pair in values.items() for part in pair]))


def ours(folder: Path, batch: int, keys: dict[str, str], finish: bool, workers: int) -> Made:
    loader = build_loader(configuration(folder, batch, workers, **keys))[2]
    return loader.loader, Finish(torch.device("cpu")) if finish else None


def torch_loader(folder: Path, transform: Callable, batch: int, workers: int) -> Made:
    dataset = ImageFolder(str(folder), transform)
    loader = DataLoader(
        dataset, batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    return loader, None


def recipe(folder: Path, batch: int, workers: int) -> Made:
    """The official code's: timm's transform as it is, without this repository's way of reading and seeding."""
    config = configuration(folder, batch, workers)
    transform = create_transform(
        config.DATA.IMG_SIZE,
        is_training=True,
        color_jitter=config.AUG.COLOR_JITTER,
        auto_augment=config.AUG.AUTO_AUGMENT,
        re_prob=config.AUG.REPROB,
        re_mode=config.AUG.REMODE,
        re_count=config.AUG.RECOUNT,
        interpolation=config.DATA.INTERPOLATION,
    )
    return torch_loader(folder / "train", transform, batch, workers)


def timm_loader(folder: Path, batch: int, workers: int, prefetcher: bool) -> Made:
    loader = create_loader(
        create_dataset("", str(folder / "train")),
        (3, 224, 224),
        batch,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
        num_workers=workers,
        persistent_workers=workers > 0,
        use_prefetcher=prefetcher,
        device=torch.device("cpu"),
    )
    return loader.loader if prefetcher else loader, None


def torchvision_loader(folder: Path, batch: int, workers: int, tensors: bool) -> Made:
    """The steps of references/classification/presets.py with the recipe's strength: bicubic, magnitude 9, erasing."""
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    package = v2 if tensors else transforms
    steps = [
        *([v2.PILToTensor()] if tensors else []),
        package.RandomResizedCrop(224, interpolation=bicubic, antialias=True),
        package.RandomHorizontalFlip(0.5),
        package.RandAugment(magnitude=9, interpolation=bilinear if tensors else bicubic),
        *([] if tensors else [transforms.PILToTensor()]),
        v2.ToDtype(torch.float, scale=True) if tensors else transforms.ConvertImageDtype(torch.float),
        package.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        package.RandomErasing(0.25),
        *([v2.ToPureTensor()] if tensors else []),
    ]
    return torch_loader(folder / "train", package.Compose(steps), batch, workers)


def candidates(root: Path, batch: int) -> list[Candidate]:
    decoders = [name for name in DECODERS if name != "simplejpeg" or importlib.util.find_spec("simplejpeg")]
    result = []
    for pipeline in ("device", "device+finish", "official"):
        for source, (files, folder, keys) in SOURCES.items():
            several = [DEFAULT] if pipeline == "device+finish" else decoders
            for decoder in ["none"] if source == "raw256" else several:
                opts = {
                    **keys,
                    "DATA.PIPELINE": pipeline.split("+")[0],
                    "DATA.DECODER": "auto" if decoder == "none" else decoder,
                }
                make = partial(ours, root / folder, batch, opts, pipeline == "device+finish")
                result.append(Candidate(pipeline, source, decoder, files, make))
    others = {
        "recipe": recipe,
        "timm": partial(timm_loader, prefetcher=False),
        "timm-workers": partial(timm_loader, prefetcher=True),
        "torchvision": partial(torchvision_loader, tensors=False),
        "torchvision-v2": partial(torchvision_loader, tensors=True),
    }
    for pipeline, make in others.items():
        for files in FILES:
            result.append(Candidate(pipeline, files, "pil", files, partial(make, root / files, batch)))
    return result


def choose(all_of_them: list[Candidate], patterns: list[str]) -> list[Candidate]:
    """Those whose name fits a pattern, and those that the others are compared with."""
    fitting = [each for each in all_of_them if any(fnmatch.fnmatch(each.name, pattern) for pattern in patterns)]
    if not fitting:
        raise ValueError(
            f"--candidates {' '.join(patterns)} fits none of {', '.join(each.name for each in all_of_them)}"
        )
    return [each for each in all_of_them if each in fitting or is_reference(each)]


def is_reference(candidate: Candidate) -> bool:
    return candidate.pipeline in ("recipe", *PEERS)


# --- Measuring ------------------------------------------------------------------------------------------------------


def run(batches: Iterator[Any], finish: Finish | None, clock: Callable[[], float]) -> float:
    """Seconds per image of going through ``batches``."""
    began, images = clock(), 0
    for pixels, labels, *plan in batches:
        images += len(labels)
        if finish is not None:
            finish(pixels, *plan)
    return (clock() - began) / images


def seed(number: int, loader: DataLoader) -> None:
    random.seed(number)
    torch.manual_seed(number)
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(number)


def on_core(made: Made, number: int) -> float:
    """CPU seconds per image in this process."""
    loader, finish = made
    seed(number, loader)
    return run(iter(loader), finish, time.process_time)


def on_machine(make: Callable[[int], Made], workers: int, number: int) -> float:
    """Seconds per image with workers, whose start is not timed."""
    loader, finish = make(workers)
    seed(number, loader)
    next(iter(loader))
    batches = iter(loader)  # what the workers prepared besides the first batch is dropped here
    return run(batches, finish, time.perf_counter)


def measure(chosen: list[Candidate], workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per image of each candidate in each round, the order drawn anew for each."""
    if workers:
        passes = {each.name: partial(on_machine, each.make, workers) for each in chosen}
    else:
        made = {each.name: each.make(0) for each in chosen}
        for loader, _ in made.values():
            next(iter(loader))
        passes = {name: partial(on_core, one) for name, one in made.items()}
    seconds = {name: [] for name in passes}
    order, names, bar = random.Random(0), list(passes), ProgressBar("rounds", rounds * len(passes))
    for number in range(rounds):
        order.shuffle(names)
        for place, name in enumerate(names):
            seconds[name].append(passes[name](number))
            bar.update(number * len(names) + place + 1)
    bar.close()
    return seconds


# --- Results --------------------------------------------------------------------------------------------------------


def ratios(reference: list[float], own: list[float]) -> list[float]:
    """Quartiles over the rounds of how many times as fast as ``reference`` it is."""
    quotients = [theirs / mine for theirs, mine in zip(reference, own, strict=True)]
    return [round(value, 3) for value in statistics.quantiles(quotients, n=4, method="inclusive")]


def summarise(chosen: list[Candidate], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """For each candidate its rate, and its ratios to the official recipe and the others' loaders.

    Loaders whose batches are finished are compared with others that finish theirs; the device pipeline's workers with
    all of them.
    """
    rows = []
    for each in chosen:
        own, files = seconds[each.name], each.files
        peers = [name for name in PEERS if each.pipeline in UNFINISHED or name not in UNFINISHED]
        # By its median: whichever happens to be the fastest of several in a round is faster than any of them.
        best = min((seconds[f"{name}/{files}/pil"] for name in peers), key=statistics.median)
        rows.append(
            {
                "candidate": each.name,
                "pipeline": each.pipeline,
                "source": each.source,
                "decoder": each.decoder,
                "images_per_second": round(1 / statistics.median(own), 1),
                "to_recipe_full_size": ratios(seconds["recipe/folder/pil"], own),
                "to_recipe_same_files": ratios(seconds[f"recipe/{files}/pil"], own),
                "to_best_peer_same_files": ratios(best, own),
                "seconds_per_image": [round(value, 7) for value in own],
            }
        )
    return sorted(rows, key=lambda row: list(MEANINGS).index(row["pipeline"]))


def table(rows: list[dict], facts: dict) -> str:
    where = f"per machine, {facts['workers']} workers" if facts["workers"] else "per core, one process and one thread"
    lines = [
        f"# Loading images for training, {where}",
        "",
        f"{facts['machine']}; {facts['versions']}; {facts['date']}; {facts['rounds']} interleaved rounds of "
        f"{facts['images']} of {facts['photographs']} photographs, on average {facts['mean_size']} pixels and "
        f"{facts['mean_kilobytes']} KB; batches of {facts['batch']}; files in the system's cache.",
        "",
        "Medians over the rounds, with quartiles in brackets. 256: shortest side 256 pixels. Same files: the folder of "
        "the same JPEG files; for raw shards, that of the same photographs as 256-pixel JPEG files.",
        "",
        "| pipeline | source | decoder | images/s | times the official recipe on full-size files "
        "| times it on the same files | times the fastest of timm and torchvision on the same files |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["pipeline"], row["source"], row["decoder"], f"{row['images_per_second']:.0f}"]
        for key in ("to_recipe_full_size", "to_recipe_same_files", "to_best_peer_same_files"):
            low, middle, high = row[key]
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {meaning}." for name, meaning in MEANINGS.items())]
    return "\n".join([*lines, "", *verdict(rows, facts["workers"])]) + "\n"


def verdict(rows: list[dict], workers: int) -> list[str]:
    """Which targets are met; all but the last are per core."""
    found = {row["candidate"]: row["to_recipe_full_size"][1] for row in rows}
    lines = ["## Targets", ""]
    for name, target in {} if workers else TARGETS.items():
        if name in found:
            met = "met" if found[name] >= target else "missed"
            lines.append(f"- {name}: {found[name]:.2f} times the official recipe, at least {target:g} wanted: {met}.")
    own = [row for row in rows if row["pipeline"] in ("device", "device+finish", "official")]
    for pipeline in dict.fromkeys(row["pipeline"] for row in own):
        several = [row for row in own if row["pipeline"] == pipeline]
        behind = [row for row in several if round(row["to_best_peer_same_files"][1], 2) < 1]
        text = f"- {pipeline}: {len(behind)} of {len(several)} rows behind the fastest of timm and torchvision"
        names = (f"{row['source']}/{row['decoder']} {row['to_best_peer_same_files'][1]:.2f}" for row in behind)
        lines.append(f"{text}: {', '.join(names)}." if behind else f"{text}.")
    return lines


COLORS = {
    "device": "#2a6f97",
    "device+finish": "#89b4cf",
    "official": "#5b8c5a",
    "recipe": "#333333",
    "timm": "#b5651d",
    "timm-workers": "#d9a066",
    "torchvision": "#8e5572",
    "torchvision-v2": "#bd93ab",
}
LEFT, RIGHT, TOP, ROW, WIDTH = 260, 190, 84, 19, 1180  # pixels


def plot(rows: list[dict], facts: dict) -> Image.Image:
    """Bars of the ratio to the official recipe on full-size files, on a logarithmic scale that starts at 1."""
    logs = [math.log2(value) for row in rows for value in row["to_recipe_full_size"]]
    low, high = min(math.floor(min(logs)), -1), max(math.ceil(max(logs)), 1)
    image = Image.new("RGB", (WIDTH, TOP + ROW * len(rows) + 16), "white")
    draw, font, large = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(17)

    def at(ratio: float) -> float:
        return LEFT + (math.log2(ratio) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    where = f"per machine ({facts['workers']} workers)" if facts["workers"] else "per core"
    draw.text(
        (12, 10), f"Loading training images {where}: times the official recipe on full-size files", "black", large
    )
    draw.text(
        (12, 36), f"{facts['machine']}, {facts['date']}; median and quartiles of {facts['rounds']} rounds", "#666", font
    )
    for power in range(low, high + 1):
        x = at(2**power)
        draw.line((x, TOP - 6, x, image.height - 12), "#000" if power == 0 else "#ddd")
        draw.text((x, TOP - 8), f"{2.0**power:g}", "#666", font, anchor="mb")
    for place, row in enumerate(rows):
        first, middle, third = row["to_recipe_full_size"]
        y, color = TOP + ROW * place, COLORS[row["pipeline"]]
        draw.text((LEFT - 8, y + ROW / 2), row["candidate"], "black", font, anchor="rm")
        left, right = sorted((at(1), at(middle)))
        draw.rectangle((left, y + 3, right, y + ROW - 4), color)
        draw.line((at(first), y + ROW / 2, at(third), y + ROW / 2), "black", 1)
        label = f"{middle:.2f}   {row['images_per_second']:.0f} images/s"
        draw.text((max(at(1), at(third)) + 8, y + ROW / 2), label, "black", font, anchor="lm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("data", type=Path, nargs="?", help="folder of class folders with photographs")
    parser.add_argument("--tar", type=Path, help="a tar file of photographs instead")
    parser.add_argument("--workers", type=int, default=0, help="worker processes; 0: per core, in this process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=200, help="photographs to load, at most")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--candidates", nargs="+", default=["*"], help="patterns of names, such as 'device/*/cv2'")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    try:
        sys.stdout.write(benchmark(args))
    except (ValueError, OSError) as err:
        sys.exit(f"{Path(__file__).name}: error: {err}")


def benchmark(args: argparse.Namespace) -> str:
    """Prepare, measure and write the results; returns the table.

    Raises ``ValueError`` or ``OSError`` for arguments and photographs that cannot be used.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if (args.data is None) == (args.tar is None):
        raise ValueError("give either a folder of class folders or --tar FILE")
    if not 0 <= args.workers <= cores:
        raise ValueError(f"--workers {args.workers}; choose 0 to {cores}, the number of cores")
    for flag, value, least in (("--rounds", args.rounds, 2), ("--batch-size", args.batch_size, 2)):
        if value < least:
            raise ValueError(f"{flag} {value}; choose at least {least}")
    if args.workers == 0:
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
    # timm 1.0.31 stops with an error where Pillow 13 is asked to keep no bits; the official pipeline mends it likewise.
    auto_augment.NAME_TO_OP.update(
        {name: posterize for name in auto_augment.NAME_TO_OP if name.startswith("Posterize")}
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.tar:
            unpack(args.tar, root / "photos")
        about = prepare(args.data or root / "photos", args.images, root, cores)
        images = about["photographs"] // args.batch_size * args.batch_size
        if images < max(args.workers, 1) * args.batch_size:
            raise ValueError(f"{about['photographs']} photographs are too few; use more, or a smaller --batch-size")
        chosen = choose(candidates(root, args.batch_size), args.candidates)
        rows = summarise(chosen, measure(chosen, args.workers, args.rounds))
    settings = {"rounds": args.rounds, "workers": args.workers, "images": images, "batch": args.batch_size}
    facts = {**about_machine(cores), **settings, **about}
    args.output.mkdir(parents=True, exist_ok=True)
    stem = "loader-per-machine" if args.workers else "loader-per-core"
    text = table(rows, facts)
    (args.output / f"{stem}.md").write_text(text)
    (args.output / f"{stem}.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    plot(rows, facts).save(args.output / f"{stem}.png")
    return text


def about_machine(cores: int) -> dict[str, str]:
    name = describe_machine(torch.device("cpu")).rsplit(",", 1)[0]  # without the number of threads
    versions = {"torch": torch, "torchvision": torchvision, "timm": timm, "Pillow": PIL, "OpenCV": cv2}
    return {
        "machine": f"{name}, {cores} cores",
        "versions": ", ".join(f"{key} {module.__version__}" for key, module in versions.items()),
        "date": date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
