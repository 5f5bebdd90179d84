"""Fine-tune a model that SimMIM has pre-trained: lower rates for lower layers, its own resizing of position tables.

torchrun --nproc_per_node 16 main_simmim_ft.py --cfg configs/simmim/simmim_finetune__….yaml --data-path DATA \
    --batch-size 128 --pretrained FILE.pth
python main_simmim_ft.py --eval --cfg … --resume FILE.pth --data-path DATA
"""

from functools import partial
from typing import Any

import launch
import supervised
import utils_simmim
from optimizer import build_optimizer

TASK = supervised.Task(build_optimizer=partial(build_optimizer, simmim=True, is_pretrain=False))


def main(config: Any) -> float:
    """Do what ``config`` says. Returns the best top-1 accuracy in percent, or images per second for THROUGHPUT_MODE."""
    with launch.session(config, files=utils_simmim) as session:
        return supervised.run(session, TASK)


if __name__ == "__main__":
    launch.run(main, "Fine-tune models that SimMIM has pre-trained")
