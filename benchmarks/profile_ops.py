"""Where the time of our model goes: the operators that take most of it, by PyTorch's profiler.

python benchmarks/profile_ops.py --model swin_tiny --backend fused --batch-size 256 --dtype bf16 --train --compile
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402 - a script outside the root
from benchmarks.machine import describe_machine, kind_of_machine  # noqa: E402
from benchmarks.peers import MODELS, versions, with_backend  # noqa: E402
from benchmarks.throughput import DTYPES, prepare  # noqa: E402
from models.attention import BACKENDS  # noqa: E402

PASSES = 5


def busiest(args: argparse.Namespace, device: torch.device, count: int) -> list[dict]:
    """Operators and kernels by the time of their own, and what is left as one row."""
    model = MODELS[args.model]
    images = torch.randn(args.batch_size, 3, model.size, model.size, device=device)
    run = prepare(partial(with_backend, model.ours, args.backend), images, args).run
    for _ in range(3):
        run()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    distributed.synchronize(device)
    with profile(activities=activities) as recorded:
        for _ in range(PASSES):
            run()
        distributed.synchronize(device)
    rows = []
    for event in recorded.key_averages():
        # On a GPU the kernels alone: an operator's row repeats the time of those that it starts.
        if on_gpu and event.device_type == torch.autograd.DeviceType.CPU:
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total  # microseconds
        if spent:
            rows.append({"name": event.key, "calls": event.count / PASSES, "milliseconds": spent / 1e3 / PASSES})
    rows.sort(key=lambda row: -row["milliseconds"])
    rest = rows[count:]
    if rest:
        calls, spent = (sum(row[key] for row in rest) for key in ("calls", "milliseconds"))
        rows = [*rows[:count], {"name": f"{len(rest)} others", "calls": calls, "milliseconds": spent}]
    return rows


def table(rows: list[dict], title: str, machine: str) -> str:
    total = sum(row["milliseconds"] for row in rows)
    lines = [f"# {title}", "", f"{machine}. {total:.2f} ms a pass.", "", "| operator | calls | ms | share |"]
    lines.append("|---|---|---|---|")
    for row in rows:
        name = row["name"].replace("|", "/")[:100]
        lines.append(f"| {name} | {row['calls']:.0f} | {row['milliseconds']:.3f} | {row['milliseconds'] / total:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="swin_tiny")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    device = distributed.pick_device()
    rows = busiest(args, device, args.rows)
    mode = ("train" if args.train else "inference") + ("-compiled" if args.compile else "")
    title = f"Profile: {MODELS[args.model].title}, {args.backend}, {mode}, {args.dtype}, batch {args.batch_size}"
    machine = f"{describe_machine(device)}; {versions()}"
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"profile-{args.model}-{kind_of_machine(device)}-{mode}-{args.dtype}-b{args.batch_size}"
    stem.with_suffix(".md").write_text(table(rows, title, machine))
    stem.with_suffix(".json").write_text(
        json.dumps({"title": title, "machine": machine, "rows": rows}, indent=2) + "\n"
    )
    sys.stdout.write(table(rows, title, machine))


if __name__ == "__main__":
    main()
