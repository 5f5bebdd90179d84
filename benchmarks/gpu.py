"""All that a GPU can tell about this code, in one command of at most ten minutes: `make gpu`.

Runs the tests marked ``gpu``, the kernels beside the machine's limits, whole models beside other libraries, a profile
of our fastest, and the mixture of experts. Each step has a limit of seconds; one that fails or takes longer is
reported, and the next one runs. Tables go to benchmarks/results/, with a summary in gpu.md: steps, and targets that
are met or missed.

python benchmarks/gpu.py --minutes 30           # more time for what is compiled
python benchmarks/gpu.py --only 'compiled*'     # some steps again
python benchmarks/gpu.py --quick                # see that every step runs, on any machine, in small; to output/quick
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import targets  # noqa: E402 - a script outside the root


@dataclass(frozen=True)
class Step:
    name: str
    arguments: tuple[str, ...]
    limit: float  # seconds, of a run of ten minutes


@dataclass(frozen=True)
class Outcome:
    name: str
    verdict: str
    seconds: float
    end: str  # of what it printed


def throughput(name: str, model: str, batch: int, limit: float, *options: str) -> Step:
    settings = ("--model", model, "--batch-size", str(batch), "--dtype", "bf16", "--rounds", "7", "--repeats", "8")
    return Step(name, ("benchmarks/throughput.py", *settings, *options), limit)


def parallel() -> tuple[str, ...]:
    """Tests spend their time on compiling kernels, so processes take turns on the GPU; needs pytest-xdist."""
    workers = min(12, (os.cpu_count() or 1) // 2)
    return ("-n", str(workers)) if workers > 1 and importlib.util.find_spec("xdist") else ()


COMPILED = ("--compile", "--candidates", "ours, auto", "ours, fused", "timm", "torchvision")
EXPERTS = ("benchmarks/moe.py", "--dtype", "bf16", "--dim", "384")
# What is wanted most comes first: what is left of the time goes to the last steps.
STEPS = (
    Step("tests", ("-m", "pytest", "-m", "gpu", "-q", *parallel()), 120),
    Step("kernels", ("benchmarks/kernels.py", "--rounds", "5"), 90),
    throughput("eager Swin-T inference", "swin_tiny", 256, 60),
    throughput("eager Swin-T training", "swin_tiny", 128, 60, "--train"),
    throughput("eager Swin-B inference", "swin_base", 256, 70),
    throughput("eager Swin-B training", "swin_base", 128, 70, "--train"),
    Step("profile inference", ("benchmarks/profile_ops.py", "--batch-size", "256", "--dtype", "bf16"), 30),
    Step("profile training", ("benchmarks/profile_ops.py", "--batch-size", "128", "--dtype", "bf16", "--train"), 30),
    Step("experts", (*EXPERTS, "--tokens", "16384", "--experts", "8", "32", "--rounds", "5", "--repeats", "4"), 30),
    throughput("compiled Swin-T inference", "swin_tiny", 256, 150, *COMPILED),
    throughput("compiled Swin-T training", "swin_tiny", 128, 200, "--train", *COMPILED),
    throughput("compiled Swin-B inference", "swin_base", 256, 250, *COMPILED),
    throughput("compiled Swin-B training", "swin_base", 128, 300, "--train", *COMPILED),
)
# The same, in small; argparse takes the last of two values. In float32: not every CPU is quick in bfloat16.
QUICK = {
    "tests": ("tests/test_fast.py",),
    "kernels": ("--shapes", "3", "--batch-size", "1", "--rounds", "2", "--repeats", "1", "--dtype", "fp32"),
    "eager Swin-T": (
        "--dtype",
        "fp32",
        "--batch-size",
        "1",
        "--rounds",
        "2",
        "--repeats",
        "1",
        "--candidates",
        "ours, auto",
        "timm",
    ),
    "profile": ("--dtype", "fp32", "--batch-size", "1"),
    "experts": (
        "--dtype",
        "fp32",
        "--dim",
        "32",
        "--tokens",
        "64",
        "--experts",
        "2",
        "--rounds",
        "2",
        "--repeats",
        "1",
    ),
}


def quick(steps: tuple[Step, ...]) -> list[Step]:
    return [
        Step(step.name, (*step.arguments, *extra), 300)  # a CPU may be slow, and busy
        for step in steps
        for start, extra in QUICK.items()
        if step.name.startswith(start)
    ]


def run_step(step: Step, output: Path, limit: float) -> Outcome:
    """Run a step as a process, at most ``limit`` seconds, and show what it prints when it is done."""
    if "pytest" in step.arguments:
        arguments = step.arguments
    else:
        arguments = (*step.arguments, *best_backend(step, output), "--output", str(output))
    sys.stdout.write(f"\n$ python {' '.join(arguments)}\n")
    sys.stdout.flush()
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as printed:
        # A group of its own: what a step has started, such as compilers, ends with it.
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            verdict = "done" if code == 0 else f"failed, code {code}"
        except subprocess.TimeoutExpired:
            verdict = f"stopped after its {limit:.0f} seconds"
        finally:
            stop(process)
        printed.seek(0)
        text = printed.read()
    sys.stdout.write(text)
    return Outcome(step.name, verdict, time.monotonic() - began, "\n".join(text.splitlines()[-15:]))


def stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def best_backend(step: Step, output: Path) -> tuple[str, ...]:
    """For a profile: the backend of ours that was fastest in the same mode, by the results that are there."""
    if "benchmarks/profile_ops.py" not in step.arguments:
        return ()
    mode = "train" if "--train" in step.arguments else "inference"
    newest = sorted(output.glob(f"throughput-swin_tiny-*-{mode}-bf16-b*.json"), key=lambda path: path.stat().st_mtime)
    if not newest:
        return ()
    rows = json.loads(newest[-1].read_text())["rows"]
    ours = [row["candidate"].removeprefix("ours, ") for row in rows if row["candidate"].startswith("ours, ")]
    return ("--backend", ours[0]) if ours else ()


def run_all(steps: list[Step], output: Path, minutes: float) -> list[Outcome]:
    """Run steps in turn; with more than ten minutes each may take longer, with fewer the last ones may not run."""
    end = time.monotonic() + 60 * minutes
    outcomes = []
    for step in steps:
        left = end - time.monotonic()
        if left < 5:
            outcomes.append(Outcome(step.name, "not run: no time left", 0, ""))
        else:
            outcomes.append(run_step(step, output, min(left, step.limit * max(1, minutes / 10))))
        (output / "gpu.md").write_text(
            summary(outcomes) + targets.section(output)
        )  # after each step: a run may be cut off
    return outcomes


def summary(outcomes: list[Outcome]) -> str:
    lines = ["# Steps of benchmarks/gpu.py", "", "| step | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {each.name} | {each.verdict} | {each.seconds:.0f} |" for each in outcomes]
    for each in outcomes:
        if each.end and (each.verdict != "done" or each.name == "tests"):
            lines += ["", f"The end of what {each.name} printed:", "", "```", each.end, "```"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder of the tables; benchmarks/results, of --quick output/quick")
    parser.add_argument("--minutes", type=float, default=10, help="for all steps together")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of steps' names, such as 'eager*'")
    parser.add_argument("--quick", action="store_true", help="small settings, to see that the steps run")
    args = parser.parse_args()
    steps = [
        step
        for step in (quick(STEPS) if args.quick else STEPS)
        if any(fnmatch(step.name, pattern) for pattern in args.only)
    ]
    if not steps:
        parser.error(f"--only {' '.join(args.only)}: choose from {', '.join(step.name for step in STEPS)}")
    # What is measured in small must not take the place of a real table.
    output = args.output or ROOT / ("output/quick" if args.quick else "benchmarks/results")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = run_all(steps, output, args.minutes)
    sys.stdout.write("\n" + (output / "gpu.md").read_text())
    if any(each.verdict != "done" for each in outcomes):
        sys.exit("gpu.py: error: not every step is done; see the table")


if __name__ == "__main__":
    main()
