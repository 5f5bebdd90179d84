"""Images per second of Swin and SwinV2: this code, timm, torchvision and transformers, taking turns in one run.

python benchmarks/throughput.py                                   # Swin-T at 224 pixels, inference, float32
python benchmarks/throughput.py --train --dtype bf16              # a training step, autocast
python benchmarks/throughput.py --dtype bf16 --compile            # all by torch.compile, on a CPU with frozen weights
python benchmarks/throughput.py --model swinv2_tiny --batch-size 1 8 32

Machines are shared and their clocks wander, so an absolute time says little: in each round every candidate runs once,
in a new order, and what counts is the ratio of times within a round. Shares are of what this machine reached in the
same run by one large matrix product and one large copy. A candidate that cannot run is left out and named. In
training on a CPU freed memory is kept, for all candidates, as main.py does. Tables, JSON files and plots go to
benchmarks/results/.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402 - a script outside the root
from benchmarks.machine import (  # noqa: E402
    describe_machine,
    kind_of_machine,
    peak_memory,
    rate_steps,
    rates_of,
)
from benchmarks.peers import MODELS, Builder, Model, candidates, versions  # noqa: E402
from benchmarks.report import plot, table  # noqa: E402
from benchmarks.timing import measure, ratios_to_best  # noqa: E402
from compilation import frozen  # noqa: E402
from models import memory, trial  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Candidate:
    """What is timed: one inference, or one training step with AdamW."""

    run: Callable[[], None]
    own: Callable[[], int]  # bytes of parameters, buffers and the optimizer's state
    rest: Callable[[], None]  # drop gradients


def prepare(build: Builder, images: torch.Tensor, args: argparse.Namespace) -> Candidate:
    model = build().to(images.device).train(args.train)
    dtype = DTYPES[args.dtype]
    autocast = torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True) if args.train else None
    called = model
    if args.compile:
        called = torch.compile(model)
        if freezes(args, images.device):
            called = frozen(called)
    run = training_step(called, images, autocast, optimizer) if args.train else inference(called, images, autocast)

    def own() -> int:
        state = [] if optimizer is None else [x for each in optimizer.state.values() for x in each.values()]
        tensors = [*model.parameters(), *model.buffers(), *(x for x in state if isinstance(x, torch.Tensor))]
        return sum(x.numel() * x.element_size() for x in tensors)

    return Candidate(run, own, lambda: model.zero_grad(set_to_none=True))


def freezes(args: argparse.Namespace, device: torch.device) -> bool:
    return args.compile and not args.train and device.type == "cpu"


def inference(model: Callable, images: torch.Tensor, autocast: torch.autocast) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad(), autocast:
            model(images)

    return run


def training_step(
    model: Callable, images: torch.Tensor, autocast: torch.autocast, optimizer: torch.optim.Optimizer
) -> Callable[[], None]:
    labels = torch.arange(len(images), device=images.device) % 1000

    def run() -> None:
        optimizer.zero_grad()
        with autocast:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return run


def prepare_all(
    builders: dict[str, Builder], images: torch.Tensor, args: argparse.Namespace
) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Those that run, and why others do not."""
    ready, failed = {}, {}
    for name, build in builders.items():
        try:
            ready[name] = prepare(build, images, args)
            ready[name].run()
        except Exception as err:  # whatever a library or a compiler may raise: the others still run
            ready.pop(name, None)
            failed[name] = f"{type(err).__name__}: {' '.join(str(err).split())[:160]}"
        gc.collect()
    return ready, failed


def model_work(model: Model, batch: int, train: bool, itemsize: int) -> tuple[float, float]:
    """Operations and bytes of a pass by a simple model, the same for all candidates.

    Operations are twice the official multiply-adds. Bytes: each block moves 22 maps (the input of qkv, qkv twice, the
    mixed values twice, the MLP's input, its hidden values twice, and residuals) and all parameters are read once.
    Training takes three times as much of both.
    """
    with torch.device("meta"):
        net = model.ours()
    maps = sum(stage.depth * stage.input_resolution[0] * stage.input_resolution[1] * stage.dim for stage in net.layers)
    moved = (22 * maps * batch + sum(x.numel() for x in net.parameters())) * itemsize
    passes = 3 if train else 1
    return passes * 2 * net.flops() * batch, passes * moved


def benchmark(args: argparse.Namespace, batch: int, device: torch.device) -> dict:
    """Measure one batch size: facts, and a row for each candidate, the fastest first."""
    model, dtype = MODELS[args.model], DTYPES[args.dtype]
    images = torch.randn(batch, 3, model.size, model.size, device=device)
    chosen = {
        name: build
        for name, build in candidates(model, device).items()
        if any(fnmatch(name, pattern) for pattern in args.candidates)
    }
    ready, failed = prepare_all(chosen, images, args)
    peers = [name for name in model.peers if name in ready]
    if not ready:
        raise ValueError(f"--candidates {' '.join(args.candidates)}: none can run: {failed or 'no such name'}")
    passes = {**{name: each.run for name, each in ready.items()}, **rate_steps(device, dtype)}
    seconds = measure(passes, device, args.rounds, args.repeats)
    rates = rates_of(seconds, device)
    seconds = {name: seconds[name] for name in ready}
    ratios = ratios_to_best(seconds, peers or list(ready))
    operations, moved = model_work(model, batch, args.train, dtype.itemsize)
    rows = []
    for name, times in seconds.items():
        taken, (low, middle, high) = statistics.median(times), ratios[name]
        ready[name].rest()
        # Frozen weights are copies that nobody counts.
        peak = None if freezes(args, device) else ready[name].own() + peak_memory(ready[name].run, device)
        rows.append(
            {
                "candidate": name,
                "images_per_second": batch / taken,
                "ratio_to_best_peer": middle,
                "ratio_quartiles": [low, high],
                "peak_bytes": peak,
                "share_of_products": operations / taken / rates["flops"],
                "share_of_copies": moved / taken / rates["bytes_per_second"],
            }
        )
    return {
        **{"model": model.title, "mode": "training step" if args.train else "inference", "dtype": args.dtype},
        **{"compiled": args.compile, "batch": batch, "machine": describe_machine(device), "versions": versions()},
        **{"date": date.today().isoformat(), "rounds": args.rounds, "peers": peers, "left_out": failed, **rates},
        "auto_took": trial.outcomes(),
        "rows": sorted(rows, key=lambda row: -row["ratio_to_best_peer"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="swin_tiny")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--train", action="store_true", help="time training steps instead of inference")
    parser.add_argument("--compile", action="store_true", help="every candidate by torch.compile")
    parser.add_argument("--candidates", nargs="+", default=["*"], help="patterns of names, such as 'ours*' timm")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="passes of a candidate in one round")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rounds < 2 or args.repeats < 1 or min(args.batch_size) < 1:
        parser.error("--rounds must be at least 2, --repeats and --batch-size at least 1")

    device = distributed.pick_device()
    if device.type == "cpu" and args.train:
        memory.keep_all()
    args.output.mkdir(parents=True, exist_ok=True)
    mode = ("train" if args.train else "inference") + ("-compiled" if args.compile else "")
    for batch in args.batch_size:
        try:
            result = benchmark(args, batch, device)
        except ValueError as err:
            parser.error(str(err))
        stem = f"throughput-{args.model}-{kind_of_machine(device)}-{mode}-{args.dtype}-b{batch}"
        (args.output / f"{stem}.md").write_text(table(result))
        (args.output / f"{stem}.json").write_text(json.dumps(result, indent=2) + "\n")
        plot(result).save(args.output / f"{stem}.png")
        sys.stdout.write(table(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
