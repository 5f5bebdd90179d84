"""The kernels beside PyTorch's and what the machine can do: attention in windows, cutting and merging them, MLPs.

python benchmarks/kernels.py                          # bf16, shapes of Swin and SwinV2
python benchmarks/kernels.py --dtype fp32 --batch-size 8

Candidates take turns, as in benchmarks/throughput.py. The limit of each step is the time to move its tensors once at
the rate of this machine's own copies, or to multiply at the rate of its own matrix products, whichever is longer. What
is not built or cannot run here is left out and named. Tensors that fit into caches can beat the limit. The table and a
JSON file go to benchmarks/results/.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402 - a script outside the root
from benchmarks.machine import describe_machine, kind_of_machine, machine_rates  # noqa: E402
from benchmarks.throughput import DTYPES  # noqa: E402
from benchmarks.timing import measure  # noqa: E402
from kernels import linear, window_process  # noqa: E402
from models import memory  # noqa: E402
from models.attention import ATTEND, BACKENDS, takes_fused, window_attention  # noqa: E402
from models.layers import window_mask, window_partition, window_reverse  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A stage: maps of side x side, windows, heads of 32 channels; by cosines as in SwinV2, or not."""

    name: str
    side: int
    window: int
    num_heads: int
    cosine: bool = False

    @property
    def shift(self) -> int:
        return self.window // 2 if self.window < self.side else 0

    @property
    def channels(self) -> int:
        return 32 * self.num_heads


SHAPES = [
    Shape("Swin-T stage 1", 56, 7, 3),
    Shape("Swin-T stage 2", 28, 7, 6),
    Shape("Swin-T stage 3", 14, 7, 12),
    Shape("Swin-T stage 4", 7, 7, 24),
    Shape("SwinV2-T, window 8, stage 1", 64, 8, 3, cosine=True),
    Shape("Swin-B, window 12, stage 1", 96, 12, 4),
    Shape("SwinV2-B, window 16, stage 1", 64, 16, 4, cosine=True),
    Shape("SwinV2-B, window 24, stage 1", 96, 24, 4, cosine=True),
]


@dataclass(frozen=True)
class Step:
    """What is timed: bytes that must be moved, multiply-adds times two, and who does it."""

    name: str
    bytes: float
    operations: float
    candidates: dict[str, Callable[[], object]]


def attention_steps(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """Forward, and forward and backward."""
    side, C, N = shape.side, shape.channels, shape.window**2
    window, shift = (shape.window, shape.window), (shape.shift, shape.shift)
    qkv = torch.randn(batch, side, side, 3 * C, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, side, side, C, device=device, dtype=dtype)
    bias = torch.randn(shape.num_heads, N, N, device=device, requires_grad=True)
    logit_scale = None
    if shape.cosine:
        logit_scale = torch.full((shape.num_heads, 1, 1), 10.0, device=device, requires_grad=True)
    mask = window_mask((side, side), window, shift)
    mask = None if mask is None else mask.to(device)
    leaves = [x for x in (qkv, bias, logit_scale) if x is not None]
    sizes = {"num_heads": shape.num_heads, "window_size": window, "shift_size": shift}
    attend = partial(window_attention, qkv, bias, mask, **sizes, scale=32**-0.5, logit_scale=logit_scale)

    def forward(backend: str) -> None:
        with torch.no_grad():
            attend(backend=backend)

    def both(backend: str) -> None:
        torch.autograd.grad(attend(backend=backend), leaves, grad)

    names = [name for name in BACKENDS if name != "auto"]
    if not window_process.is_built_for(device):
        names.remove("window_process")
    try:
        takes_fused("fused", qkv, mask, shape.num_heads, window, shift, 0.0)
    except ValueError:
        names.remove("fused")
    tokens, size = batch * side * side, dtype.itemsize
    product = 2 * tokens * N * C
    return [
        Step("attention, forward", 4 * C * tokens * size, 2 * product, {n: partial(forward, n) for n in names}),
        # qkv twice, the output twice, the gradients of both once; two products forward, five backward
        Step(
            "attention, forward and backward", 11 * C * tokens * size, 7 * product, {n: partial(both, n) for n in names}
        ),
    ]


def process_steps(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """Cutting maps into windows and merging them, by the extension and by PyTorch."""
    side, window, shift = shape.side, shape.window, shape.shift
    x = torch.randn(batch, side, side, shape.channels, device=device, dtype=dtype)
    windows = window_process.partition_reference(x, window, shift)

    def roll_and_cut() -> Tensor:
        return window_partition(torch.roll(x, (-shift, -shift), (1, 2)), window)

    def merge_and_roll() -> Tensor:
        merged = window_reverse(windows.view(-1, window, window, shape.channels), window, side, side)
        return torch.roll(merged, (shift, shift), (1, 2))

    cut, merge = {"roll and partition": roll_and_cut}, {"reverse and roll": merge_and_roll}
    if window_process.is_built_for(device):
        cut["window_process"] = partial(window_process.partition, x, window, shift)
        merge["window_process"] = partial(window_process.merge, windows, (side, side), window, shift)
    moved = 2 * x.numel() * dtype.itemsize
    return [Step("partition", moved, 0, cut), Step("merge", moved, 0, merge)]


def mlp_steps(shape: Shape, batch: int, dtype: torch.dtype, device: torch.device) -> list[Step]:
    """The MLP of a block, forward, and forward and backward; on CPUs in float32, for which there are kernels."""
    if device.type != "cpu" or dtype != torch.float32:
        return []
    tokens, C = batch * shape.side**2, shape.channels
    x, grad = torch.randn(tokens, C, requires_grad=True), torch.randn(tokens, C)
    shapes = (4 * C, C), (4 * C,), (C, 4 * C), (C,)
    weights = [torch.randn(size, requires_grad=True) for size in shapes]

    def pytorchs(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    def forward(run: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            run(x, *weights)

    def both(run: Callable[..., Tensor]) -> None:
        torch.autograd.grad(run(x, *weights), [x, *weights], grad)

    runs = {"linear and GELU": pytorchs}
    if not linear.PROBLEM:
        runs["linear (kernel)"] = linear.mlp
    moved, product = 4 * tokens * C, 16 * tokens * C * C
    return [
        Step("MLP, forward", 2 * moved, product, {name: partial(forward, run) for name, run in runs.items()}),
        # of C channels: input, output and gradients of both, the input twice; of 4 C, written and read: two
        Step("MLP, forward and backward", 21 * moved, 3 * product, {n: partial(both, run) for n, run in runs.items()}),
    ]


def time_step(step: Step, shape: Shape, rates: dict, device: torch.device, rounds: int, repeats: int) -> list[dict]:
    limit = max(step.bytes / rates["bytes_per_second"], step.operations / rates["flops"])
    rows = []
    for name, times in measure(step.candidates, device, rounds, repeats).items():
        taken = statistics.median(times)
        rows.append(
            {
                **{"shape": shape.name, "step": step.name, "candidate": name},
                **{"milliseconds": 1e3 * taken, "limit_milliseconds": 1e3 * limit, "share_of_limit": limit / taken},
            }
        )
    return sorted(rows, key=lambda row: row["milliseconds"])


def table(rows: list[dict], facts: dict) -> str:
    lines = [
        f"# Kernels, {facts['dtype']}, batch {facts['batch']}",
        "",
        f"{facts['machine']}; {facts['versions']}; {facts['date']}; {facts['rounds']} interleaved rounds. Measured on "
        f"this machine: copies of {facts['bytes_per_second'] / 1e9:.0f} GB/s, products of {facts['flops'] / 1e12:.2f} "
        f"TFLOP/s. Left out: {', '.join(facts['left_out']) or 'nothing'}.",
        "",
        "| shape | step | candidate | ms | limit, ms | share of the limit |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['shape']} | {row['step']} | {row['candidate']} | {row['milliseconds']:.3f} "
            f"| {row['limit_milliseconds']:.3f} | {row['share_of_limit']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, help="maps; 128 on a GPU, 8 on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="numbers, from 0")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeats", type=int, help="calls of a candidate in one round; 20 on a GPU, 1 on a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()

    device = distributed.pick_device()
    on_gpu = device.type != "cpu"
    if not on_gpu:
        memory.keep_all()  # as the scripts do
    batch, repeats = args.batch_size or (128 if on_gpu else 8), args.repeats or (20 if on_gpu else 1)
    dtype_name = args.dtype or ("bf16" if on_gpu else "fp32")
    dtype = DTYPES[dtype_name]
    rates, rows, seen = machine_rates(device, dtype), [], set()
    for shape in (SHAPES[i] for i in args.shapes):
        for make_steps in (attention_steps, process_steps, mlp_steps):
            for step in make_steps(shape, batch, dtype, device):
                seen |= set(step.candidates)
                rows += time_step(step, shape, rates, device, args.rounds, repeats)
    facts = {
        **{"dtype": dtype_name, "batch": batch, "machine": describe_machine(device)},
        **{"versions": f"torch {torch.__version__}", "date": date.today().isoformat(), "rounds": args.rounds, **rates},
        "left_out": [name for name in (*ATTEND, "fused") if name not in seen]
        + ([linear.PROBLEM] if linear.PROBLEM else []),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"kernels-{kind_of_machine(device)}-{dtype_name}-b{batch}"
    stem.with_suffix(".md").write_text(table(rows, facts))
    stem.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    sys.stdout.write(table(rows, facts))


if __name__ == "__main__":
    main()
