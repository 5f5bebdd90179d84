"""The steps of a demo: commands that a user could type, each shown before it is run."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# The demos' models are so small that threads of one operation would mostly wait for each other.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}


def run(title: str, arguments: Sequence[Any], interrupt_at: str | None = None, label: str = "") -> str:
    """Run a Python script of the project, showing its lines; optionally interrupt it once one contains a text.

    Args:
        label: put before each line that is shown, errors included; progress bars are left out then.

    Returns its output. Ends the demo where the script fails.
    """
    command = [sys.executable, *map(str, arguments)]
    say(f"\n== {title}\n$ python {shlex.join(command[1:])}\n")
    output, interrupted = [], False
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT if label else None}
    with subprocess.Popen(command, cwd=ROOT, **pipes, text=True, env=ENVIRONMENT) as child:
        for line in child.stdout:
            output.append(line)
            say(label + line)
            if interrupt_at and not interrupted and interrupt_at in line:
                interrupted = True
                child.send_signal(signal.SIGINT)
    expected = 128 + signal.SIGINT if interrupted else 0
    if child.returncode != expected or (interrupt_at and not interrupted):
        fail(f"the command {shlex.join(command[1:])} ended with {child.returncode}, expected {expected}")
    return "".join(output)


def run_together(steps: dict[str, tuple[str, Sequence[Any]]]) -> dict[str, str]:
    """Run several steps at the same time. Ends the demo, once all have ended, where one fails.

    Args:
        steps: title and arguments of each, by the label of its lines.

    Returns the output of each, by its label.
    """
    with ThreadPoolExecutor(len(steps)) as pool:
        runs = {
            label: pool.submit(run, title, arguments, label=f"{label} | ")
            for label, (title, arguments) in steps.items()
        }
    return {label: future.result() for label, future in runs.items()}


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def fail(message: str) -> None:
    sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")
