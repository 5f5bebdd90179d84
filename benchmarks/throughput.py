"""Images per second of Swin and SwinV2: this code, timm and torchvision, taking turns in one run.

python benchmarks/throughput.py                        # Swin-T at 224 pixels, inference, float32
python benchmarks/throughput.py --train --dtype bf16   # a training step, autocast
python benchmarks/throughput.py --model swinv2_tiny    # SwinV2-T at 256 pixels, windows of 8

Machines are shared and their clocks wander, so an absolute time says little: in each round every candidate runs once,
in a new order, and what counts is the ratio of times within a round. The table and a JSON file go to
benchmarks/results/.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402 - a script outside the root
from models.attention import ATTEND, set_attention_backend  # noqa: E402
from models.swin_transformer import SwinTransformer  # noqa: E402
from models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
V2 = {"img_size": 256, "window_size": 8}
# Title, image size, how each library makes it. The drop path rates are torchvision's.
MODELS: dict[str, tuple[str, int, dict[str, Callable[[], nn.Module]]]] = {
    "swin_tiny": (
        "Swin-T, 224 pixels",
        224,
        {
            "ours": partial(SwinTransformer, drop_path_rate=0.2),
            "timm": partial(timm.create_model, "swin_tiny_patch4_window7_224", drop_path_rate=0.2),
            "torchvision": torchvision.models.swin_t,
        },
    ),
    "swin_base": (
        "Swin-B, 224 pixels",
        224,
        {
            "ours": partial(SwinTransformer, **BASE, drop_path_rate=0.5),
            "timm": partial(timm.create_model, "swin_base_patch4_window7_224", drop_path_rate=0.5),
            "torchvision": torchvision.models.swin_b,
        },
    ),
    "swinv2_tiny": (
        "SwinV2-T, 256 pixels, windows of 8",
        256,
        {
            "ours": partial(SwinTransformerV2, **V2, drop_path_rate=0.2),
            "timm": partial(timm.create_model, "swinv2_tiny_window8_256", drop_path_rate=0.2),
            "torchvision": torchvision.models.swin_v2_t,
        },
    ),
}
PEERS = ("timm", "torchvision")


def with_backend(build: Callable[[], nn.Module], backend: str) -> nn.Module:
    model = build()
    set_attention_backend(model, backend)
    return model


def candidates(builders: dict[str, Callable[[], nn.Module]]) -> dict[str, nn.Module]:
    ours = {f"ours, {backend}": with_backend(builders["ours"], backend) for backend in ("auto", *ATTEND)}
    return {**ours, **{peer: builders[peer]() for peer in PEERS}}


def make_pass(model: nn.Module, images: torch.Tensor, dtype: torch.dtype, train: bool) -> Callable[[], None]:
    """One inference or one training step (AdamW) of ``model``."""
    model.to(images.device).train(train)
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    labels = torch.arange(len(images), device=images.device) % 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5) if train else None

    def inference() -> None:
        with torch.inference_mode(), autocast:
            model(images)

    def training_step() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return training_step if train else inference


def measure(passes: dict[str, Callable[[], None]], device: torch.device, rounds: int, repeats: int) -> dict:
    """Seconds of each candidate in each round, the order drawn anew for each."""
    for run in passes.values():
        run()
        run()
    seconds = {name: [] for name in passes}
    names = list(passes)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            distributed.synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                passes[name]()
            distributed.synchronize(device)
            seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def summarise(seconds: dict[str, list[float]], batch: int) -> list[dict]:
    """For each candidate its median rate, and the median over rounds of the ratio to the faster peer of the round."""
    best_peer = [min(times) for times in zip(*(seconds[name] for name in PEERS), strict=True)]
    rows = []
    for name, times in seconds.items():
        ratios = [peer / own for peer, own in zip(best_peer, times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "candidate": name,
                "images_per_second": batch / statistics.median(times),
                "ratio_to_best_peer": middle,
                "ratio_quartiles": [low, high],
            }
        )
    return sorted(rows, key=lambda row: -row["ratio_to_best_peer"])


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(rows: list[dict], facts: dict) -> str:
    lines = [
        f"# {facts['model']}, {facts['mode']}, {facts['dtype']}, batch {facts['batch']}",
        "",
        f"{facts['machine']}; {facts['versions']}; {facts['date']}; {facts['rounds']} interleaved rounds.",
        "",
        "| candidate | images/s (median) | times the faster of timm and torchvision | quartiles |",
        "|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['candidate']} | {row['images_per_second']:.1f} | {row['ratio_to_best_peer']:.3f} "
            f"| {low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="swin_tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--train", action="store_true", help="time training steps instead of inference")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="passes of a candidate in one round")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    device = distributed.pick_device()
    title, size, builders = MODELS[args.model]
    images = torch.randn(args.batch_size, 3, size, size, device=device)
    models = candidates(builders)
    passes = {name: make_pass(model, images, DTYPES[args.dtype], args.train) for name, model in models.items()}
    rows = summarise(measure(passes, device, args.rounds, args.repeats), args.batch_size)
    facts = {
        "model": title,
        "mode": "training step" if args.train else "inference",
        "dtype": args.dtype,
        "batch": args.batch_size,
        "machine": describe_machine(device),
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}",
        "date": date.today().isoformat(),
        "rounds": args.rounds,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    mode = "train" if args.train else "inference"
    stem = f"throughput-{args.model}-{device.type}-{mode}-{args.dtype}-b{args.batch_size}"
    (args.output / f"{stem}.md").write_text(table(rows, facts))
    (args.output / f"{stem}.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    sys.stdout.write(table(rows, facts))


if __name__ == "__main__":
    main()
