"""Train a small Swin on handwritten digits, interrupt it, resume it, evaluate it: `make demo`.

Each step is a command that a user could type; the demo shows it before it runs it.
"""

import re
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.steps import fail, run, say

DATA = Path("datasets/digits")
CONFIG = Path("configs/demo/swin_digits.yaml")
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
        fail(f"top-1 accuracy {accuracy} % is below the {EXPECTED} % that this recipe reaches")
    say(
        f"\nTop-1 accuracy on digits that it has not seen: {accuracy} %\n"
        f"Checkpoint: {checkpoint}\n"
        f"Curves:     {Path(sys.executable).parent / 'tensorboard'} --logdir {Path(checkpoint).parent}\n"
    )


if __name__ == "__main__":
    main()
