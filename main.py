"""Train, evaluate and time Swin models on ImageNet-style data.

python main.py --cfg configs/swin/swin_tiny_patch4_window7_224.yaml --data-path DATA
torchrun --nproc_per_node 8 main.py --cfg … --data-path DATA --batch-size 128
python main.py --eval --cfg … --resume FILE.pth --data-path DATA
"""

from typing import Any

import launch
import supervised


def main(config: Any) -> float:
    """Do what ``config`` says. Returns the best top-1 accuracy in percent, or images per second for THROUGHPUT_MODE."""
    with launch.session(config) as session:
        return supervised.run(session)


if __name__ == "__main__":
    launch.run(main, "Train, evaluate and time Swin models")
