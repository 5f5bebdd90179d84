"""Pre-train an encoder by SimMIM on images without labels, and watch what it reconstructs.

python main_simmim_pt.py --cfg configs/simmim/simmim_pretrain__….yaml --data-path FOLDER
torchrun --nproc_per_node 16 main_simmim_pt.py --cfg … --data-path FOLDER --batch-size 128
python main_simmim_pt.py --eval --cfg … --resume FILE.pth --data-path FOLDER
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

import engine
import launch
from data import build_loader
from data.data_simmim_pt import reconstruction_samples
from models import build_model
from reconstruction import Watch


def reconstruction_loss(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean absolute error on hidden pixels; labels, if there are any, are not looked at."""
    images, masks, _ = batch
    return model(images, masks), {}


def main(config: Any) -> None:
    """Pre-train as ``config`` says, or with ``EVAL_MODE`` show what a checkpoint reconstructs."""
    with launch.session(config) as session:
        if config.THROUGHPUT_MODE:
            raise ValueError("--throughput: main_simmim_pt.py times nothing; main.py times the same model")
        if config.MODEL.PRETRAINED:
            raise ValueError("--pretrained: pre-training starts anew, or continues a run by --resume FILE")
        model = build_model(session.config, is_pretrain=True)
        engine.describe(session, model)
        watch = Watch(session, *reconstruction_samples(session.config, session.config.DATA.WATCHED_IMAGES))
        if config.EVAL_MODE:
            engine.load_weights(session, model, None)
            watch.look(model.to(session.device), f"of_{Path(session.config.MODEL.RESUME).stem}")
        else:
            train(session, model, watch)


def train(session: launch.Session, model: nn.Module, watch: Watch) -> None:
    loader = build_loader(session.config, simmim=True, is_pretrain=True)
    run = engine.prepare(session, model, loader, after_epoch=watch)
    checkpoint = engine.find_checkpoint(session)
    if checkpoint:
        engine.restore(run, checkpoint)
    engine.fit(run, reconstruction_loss)


if __name__ == "__main__":
    launch.run(main, "Pre-train models by SimMIM")
