"""The mixture-of-experts layer beside a plain loop over experts, a dense MLP of equal active cost, and Tutel.

python benchmarks/moe.py                                # forward and backward, float32, over tokens and experts
python benchmarks/moe.py --inference --tokens 4096 --experts 8 64
python benchmarks/moe.py --dtype bf16 --dim 512 --top 2

It runs on the first GPU, or on the CPU where there is none. Each run writes one table and one JSON file, named after
device, mode, dtype, channels and top, to benchmarks/results/ or --output.

As in benchmarks/throughput.py, candidates take turns, and what counts is the ratio of times within a round, here to the
loop's. The loop gathers each expert's tokens, runs its MLP and adds what it answers to their places; it drops none, and
gives what path dropless gives, which is checked before anything is measured. Path capacity takes 1.25 times an even
share, as the released models do, so that it may do less than the loop. Memory is what is kept for the backward pass,
weights apart. Tutel is measured where it is installed and runs, and else named with the reason. On a CPU freed memory
is kept, as in a run of main_moe.py: else the last tens of megabytes decide at random who meets new pages.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: E402 - a script outside the root
from benchmarks.machine import describe_machine, kind_of_machine  # noqa: E402
from benchmarks.throughput import DTYPES  # noqa: E402
from benchmarks.timing import measure  # noqa: E402
from models import memory  # noqa: E402
from models.layers import Mlp  # noqa: E402
from models.moe import MoELayer  # noqa: E402
from models.routing import gshard_loss  # noqa: E402
from models.tutel_backend import tutel_layer  # noqa: E402

LOOP = "loop over experts"
Candidate = Callable[[Tensor], tuple[Tensor, Tensor]]


class Loop(nn.Module):
    """What ``layer`` does on one process, written plainly: tokens (T, C) to (T, C), and GShard's loss."""

    def __init__(self, layer: MoELayer):
        super().__init__()
        experts, self.top, self.router = layer.experts, layer.top_value, layer.gates[0].wg
        self.experts = nn.ModuleList(Mlp(experts.dim, experts.hidden) for _ in range(layer.num_experts))
        for i, mlp in enumerate(self.experts):
            mlp.fc1.weight.data.copy_(experts.batched_fc1_w[i])
            mlp.fc1.bias.data.copy_(experts.batched_fc1_bias[i])
            mlp.fc2.weight.data.copy_(experts.batched_fc2_w[i].t())
            mlp.fc2.bias.data.copy_(experts.batched_fc2_bias[i])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = F.linear(x.float(), self.router.weight.float()).softmax(1)
        gates, chosen = p.topk(self.top, dim=1)
        y = torch.zeros_like(x)
        for i, mlp in enumerate(self.experts):
            token, choice = torch.where(chosen == i)
            answer = mlp(x[token]) * gates[token, choice, None]
            y = y.index_add(0, token, answer.to(y.dtype))
        return y, gshard_loss(p, chosen[:, 0])


def dense(mlp: Mlp, x: Tensor) -> tuple[Tensor, Tensor]:
    return mlp(x), x.new_zeros(())


def tutels(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    y = layer(x)
    return y, y.l_aux


def candidates(args: argparse.Namespace, experts: int, device: torch.device) -> dict[str, Candidate]:
    """All with the same weights, the dense MLP apart, whose hidden units are those that a token meets."""
    settings = {"capacity_factor": 1.25, "gate_noise": 0.0}
    layers = {}
    for path in ("capacity", "dropless"):
        torch.manual_seed(0)
        layers[path] = MoELayer(args.dim, 4 * args.dim, experts, args.top, path=path, **settings).to(device)
    found: dict[str, Candidate] = {
        **layers,
        LOOP: Loop(layers["dropless"]).to(device),
        "dense MLP": partial(dense, Mlp(args.dim, 4 * args.dim * args.top).to(device)),
    }
    return found


def add_tutel(
    found: dict[str, Candidate], args: argparse.Namespace, experts: int, x: Tensor, autocast: AbstractContextManager
) -> str | None:
    """Add Tutel's layer, in the settings of path capacity, or say why it cannot run here."""
    parts = (args.dim, 4 * args.dim, experts, args.top, 1.25, False, False, True, True, 0.0, 256, 0.5, 0.0, 0.02, True)
    try:
        run = partial(tutels, tutel_layer(*parts).to(x.device))
        make_pass(run, x, autocast, not args.inference)()
    except Exception as err:  # whatever it may raise: the others still run
        return str(err).splitlines()[0] if str(err) else type(err).__name__
    found["Tutel"] = run
    return None


def check(found: dict[str, Candidate], x: Tensor) -> None:
    """Raise ``AssertionError`` where the loop and path dropless differ."""
    with torch.no_grad():
        torch.testing.assert_close(found["dropless"](x), found[LOOP](x), rtol=1e-4, atol=1e-4)


def make_pass(run: Candidate, x: Tensor, autocast: AbstractContextManager, train: bool) -> Callable[[], None]:
    def inference() -> None:
        with torch.inference_mode(), autocast:
            run(x)

    def forward_and_backward() -> None:
        for tensor in (x, *weights_of(run)):
            tensor.grad = None
        with autocast:
            y, loss = run(x)
        (y.float().sum() + loss).backward()

    return forward_and_backward if train else inference


def kept_bytes(run: Candidate, x: Tensor, autocast: AbstractContextManager) -> int:
    """Bytes that a forward pass keeps for the backward pass, besides its input and weights."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not (tensor.is_leaf and tensor.requires_grad):
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        result = run(x)
    own = {x.untyped_storage().data_ptr(), *(p.untyped_storage().data_ptr() for p in weights_of(run))}
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    del result
    return size


def weights_of(run: Candidate) -> list[nn.Parameter]:
    module = run.args[0] if isinstance(run, partial) else run
    return list(module.parameters())


def compare(
    args: argparse.Namespace, tokens: int, experts: int, device: torch.device
) -> tuple[list[dict[str, Any]], str | None]:
    """A row for each candidate, and why Tutel is not among them."""
    dtype, train = DTYPES[args.dtype], not args.inference
    x = torch.randn(tokens, args.dim, device=device, requires_grad=train)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    found = candidates(args, experts, device)
    check(found, x)
    lacking = add_tutel(found, args, experts, x, autocast)
    kept = {name: kept_bytes(run, x, autocast) for name, run in found.items()} if train else {}
    passes = {name: make_pass(run, x, autocast, train) for name, run in found.items()}
    seconds = measure(passes, device, args.rounds, args.repeats)
    rows = []
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[LOOP], times, strict=True)], n=4)
        rows.append(
            {
                "tokens": tokens,
                "experts": experts,
                "candidate": name,
                "milliseconds": 1000 * statistics.median(times),
                "times_the_loop": middle,
                "quartiles": [low, high],
                "kept_megabytes": kept[name] / 1e6 if train else None,
            }
        )
    return rows, lacking


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        f"# MoE layer, {facts['mode']}, {facts['dtype']}, {facts['channels']} channels, top {facts['top']}",
        "",
        f"{facts['machine']}; torch {facts['torch']}; {facts['date']}; {facts['rounds']} interleaved rounds. "
        f"Left out: {facts['left_out'] or 'nothing'}.",
        "",
        "| tokens | experts | candidate | ms (median) | times the loop's speed | quartiles | MB kept |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["quartiles"]
        kept = "-" if row["kept_megabytes"] is None else f"{row['kept_megabytes']:.1f}"
        lines.append(
            f"| {row['tokens']} | {row['experts']} | {row['candidate']} | {row['milliseconds']:.2f} "
            f"| {row['times_the_loop']:.2f} | {low:.2f} to {high:.2f} | {kept} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 32])
    parser.add_argument("--dim", type=int, default=192, help="channels; experts have four times as many hidden units")
    parser.add_argument("--top", type=int, default=1, help="experts of a token")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--inference", action="store_true", help="time the forward pass alone")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=1, help="passes of a candidate in one round")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")

    device = distributed.pick_device()
    if device.type == "cpu":
        memory.keep_all()
    rows, reasons = [], {}
    for tokens, experts in product(args.tokens, args.experts):
        found, lacking = compare(args, tokens, experts, device)
        rows += found
        if lacking:
            reasons[lacking] = None  # in order, each once
    facts = {
        "mode": "forward" if args.inference else "forward and backward",
        "dtype": args.dtype,
        "channels": args.dim,
        "top": args.top,
        "machine": describe_machine(device),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "rounds": args.rounds,
        "left_out": f"Tutel ({'; '.join(reasons)})" if reasons else "",
    }
    args.output.mkdir(parents=True, exist_ok=True)
    mode = "inference" if args.inference else "train"
    stem = f"moe-{kind_of_machine(device)}-{mode}-{args.dtype}-c{args.dim}-top{args.top}"
    (args.output / f"{stem}.md").write_text(table(rows, facts))
    (args.output / f"{stem}.json").write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    sys.stdout.write(table(rows, facts))


if __name__ == "__main__":
    main()
