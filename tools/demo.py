"""Train a small Swin on handwritten digits, interrupt it, resume it, evaluate it: `make demo`.

Each step is a command that a user could type; the demo shows it before it runs it.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA = Path("datasets/digits")
CONFIG = Path("configs/demo/swin_digits.yaml")
# The model is so small that threads of one operation would mostly wait for each other.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", **os.environ}
EXPECTED = 97.0  # percent
INTERRUPT_AT = "Train: [2/"  # as a person would press Ctrl-C, in the third epoch


def main() -> None:
    tag = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    train = ["main.py", "--cfg", CONFIG, "--data-path", DATA, "--tag", tag]
    run("Write the digits as an ImageNet-style folder", ["tools/make_digits.py", DATA])
    run("Train, and press Ctrl-C in the third epoch", train, interrupt_at=INTERRUPT_AT)
    log = run("Resume where it stopped: the same command again", train)
    checkpoint = re.findall(r"(\S+/ckpt_epoch_\d+\.pth) saved", log)[-1]
    evaluate = [*train[:-2], "--tag", f"{tag}-eval", "--eval", "--resume", checkpoint]
    log = run("Evaluate the checkpoint", evaluate)
    accuracy = re.findall(r" \* Acc@1 ([\d.]+)", log)[-1]
    if float(accuracy) < EXPECTED:
        sys.exit(f"demo.py: error: top-1 accuracy {accuracy} % is below the {EXPECTED} % that this recipe reaches")
    say(
        f"\nTop-1 accuracy on digits that it has not seen: {accuracy} %\n"
        f"Checkpoint: {checkpoint}\n"
        f"Curves:     {Path(sys.executable).parent / 'tensorboard'} --logdir {Path(checkpoint).parent}\n"
    )


def run(title: str, arguments: list, interrupt_at: str | None = None) -> str:
    """Run a Python script of the project, showing its lines; optionally interrupt it once one contains a text.

    Returns its output. Ends the demo where the script fails.
    """
    command = [sys.executable, *map(str, arguments)]
    say(f"\n== {title}\n$ python {shlex.join(command[1:])}\n")
    output, interrupted = [], False
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as child:
        for line in child.stdout:
            output.append(line)
            say(line)
            if interrupt_at and not interrupted and interrupt_at in line:
                interrupted = True
                child.send_signal(signal.SIGINT)
    expected = 128 + signal.SIGINT if interrupted else 0
    if child.returncode != expected or (interrupt_at and not interrupted):
        sys.exit(f"demo.py: error: the command above ended with {child.returncode}, expected {expected}")
    return "".join(output)


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
