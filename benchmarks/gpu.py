"""All that a GPU can tell about this code, in one command of at most ten minutes: `make gpu`.

Runs the tests marked ``gpu`` and the benchmarks, and writes their tables to a folder (default: benchmarks/results/).
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Arguments of benchmarks/throughput.py: rates at the batch sizes that published tables use.
BENCHMARKS = [
    ["--dtype", "bf16", "--batch-size", "256", "--repeats", "20"],
    ["--dtype", "fp16", "--batch-size", "256", "--repeats", "20"],
    ["--dtype", "fp32", "--batch-size", "64", "--repeats", "10"],
    ["--dtype", "bf16", "--batch-size", "128", "--repeats", "10", "--train"],
    ["--model", "swin_base", "--dtype", "bf16", "--batch-size", "128", "--repeats", "10"],
    ["--model", "swinv2_tiny", "--dtype", "bf16", "--batch-size", "128", "--repeats", "10"],
    ["--model", "swinv2_tiny", "--dtype", "bf16", "--batch-size", "64", "--repeats", "10", "--train"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    output = parser.parse_args().output.resolve()
    failed = []
    for arguments in (
        ["-m", "pytest", "-m", "gpu", "-v"],
        *(["benchmarks/throughput.py", "--output", str(output), *options] for options in BENCHMARKS),
    ):
        sys.stdout.write(f"\n$ python {' '.join(arguments)}\n")
        sys.stdout.flush()
        if subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode:
            failed.append(" ".join(arguments))
    if failed:
        sys.exit(f"gpu.py: error: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
