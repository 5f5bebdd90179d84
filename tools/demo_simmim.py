"""Pre-train a small Swin on digits without labels, then learn ten labels of each digit with and without it.

python tools/demo_simmim.py [--seed N], or `make demo-simmim`. Each step is a command that a user could type; the demo
shows it before it runs it. Both accuracies are those after the last epoch.
"""

import argparse
import re
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tools.steps import run, run_together, say

PER_CLASS = 10
DATA, FEW = Path("datasets/digits"), Path(f"datasets/digits-{PER_CLASS}")
PRETRAIN = Path("configs/demo/simmim_digits_pretrain.yaml")
FINETUNE = Path("configs/demo/simmim_digits_finetune.yaml")
SCRATCH = Path("configs/demo/simmim_digits_scratch.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0, help="of all runs (default: 0)")
    seed = parser.parse_args().seed
    common = ["--tag", f"demo-{datetime.now():%Y%m%d-%H%M%S}", "--opts", "SEED", seed]
    run("Write the digits as an ImageNet-style folder", ["tools/make_digits.py", DATA])
    run(f"Write {PER_CLASS} of each digit for training", ["tools/make_digits.py", FEW, "--per-class", PER_CLASS])
    pretrain = ["main_simmim_pt.py", "--cfg", PRETRAIN, "--data-path", DATA, *common]
    log = run("Pre-train on all training images; their labels are not looked at", pretrain)
    checkpoint = re.findall(r"(\S+/ckpt_epoch_\d+\.pth) saved", log)[-1]
    picture = re.findall(r"(\S+/reconstruction_epoch_\d+\.png) saved", log)[-1]
    train = ["main_simmim_ft.py", "--data-path", FEW]
    logs = run_together(
        {
            "fine-tuning": (
                f"Fine-tune on {PER_CLASS} labels of each digit",
                [*train, "--cfg", FINETUNE, "--pretrained", checkpoint, *common],
            ),
            "from scratch": (
                "At the same time: the same model and labels, but without pre-training",
                [*train, "--cfg", SCRATCH, *common],
            ),
        }
    )
    tuned, scratch = (re.findall(r" \* Acc@1 ([\d.]+)", log)[-1] for log in logs.values())
    say(
        f"\nTop-1 accuracy after the last epoch, on other digits, with {PER_CLASS} labels of each:\n"
        f"  pre-trained:  {tuned} %\n"
        f"  from scratch: {scratch} %\n"
        f"Reconstructions (image, masked, completed): {picture}\n"
        f"Pre-trained weights: {checkpoint}\n"
    )


if __name__ == "__main__":
    main()
