"""Train, evaluate and time Swin-MoE; processes share the experts.

python main_moe.py --cfg configs/swinmoe/swin_moe_small_patch4_window12_192_8expert_32gpu_22k.yaml --data-path DATA
torchrun --nproc_per_node 8 main_moe.py --cfg … --data-path DATA --batch-size 128
torchrun --nproc_per_node 8 main_moe.py --eval --cfg … --resume FILE.pth --data-path DATA
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import engine
import launch
import supervised
import utils_moe
from meters import write_scalars
from models.moe import MoELayer, Statistics


class ExpertLoss(supervised.SupervisedLoss):
    """The supervised loss, and the auxiliary loss that keeps experts busy alike."""

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = self.mixed(*batch)
        logits, auxiliary = model(images)
        loss, values = self.score(logits, targets)
        return loss + auxiliary, {"loss-cls": loss, "loss-aux": auxiliary, **values}


class RouterStatistics:
    """What the routers of ``model`` did in training since the last report, over all processes."""

    def __init__(self, model: nn.Module):
        self.sums: dict[str, Statistics] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, MoELayer):
                layer.collect = True
                layer.register_forward_hook(partial(self.add, name.removesuffix(".mlp._moe_layer")))

    def add(self, name: str, layer: MoELayer, *_: Any) -> None:
        if layer.training:
            sums = self.sums.get(name)
            new = layer.statistics
            self.sums[name] = new if sums is None else Statistics(*map(torch.add, sums, new))

    def __call__(self, run: engine.Run) -> None:
        """Log and write what was summed, and begin anew."""
        for name, sums in self.sums.items():
            total = sums.summed()
            shares = (total.tokens_per_expert / total.tokens_per_expert.sum().clamp(min=1)).tolist()
            dropped, entropy, loss = (
                value.item() for value in (total.dropped_share, total.router_entropy, total.auxiliary_loss)
            )
            run.session.logger.info(
                f"experts of {name}: share of tokens {' '.join(f'{share:.3f}' for share in shares)}; dropped "
                f"{dropped:.3f}, router entropy {entropy:.3f}, auxiliary loss {loss:.3f}"
            )
            values = {"dropped_share": dropped, "router_entropy": entropy, "auxiliary_loss": loss}
            values |= {f"share_{expert}": share for expert, share in enumerate(shares)}
            write_scalars(run, {f"experts/{name}/{key}": value for key, value in values.items()})
        self.sums.clear()


def make_after_epoch(config: Any, model: nn.Module) -> Callable[[engine.Run], None]:
    statistics = RouterStatistics(model) if config.TRAIN.MOE.STATISTICS else None

    def after_epoch(run: engine.Run) -> None:
        if statistics is not None:
            statistics(run)
        if config.TRAIN.MOE.CHECKPOINT == "official" and run.progress.epoch == config.TRAIN.EPOCHS:
            save_final(run)

    return after_epoch


def save_final(run: engine.Run) -> None:
    """The weights as the official script leaves them: ``ckpt_epoch_final.pth.rankR`` of experts, one ``.master``."""
    parts = (run.model, run.max_accuracy, run.optimizer, run.scheduler, run.scaler, run.session.logger)
    utils_moe.save_checkpoint(run.config, "final", *parts, zero_redundancy=True)


def main(config: Any) -> float:
    """Do what ``config`` says. Returns the best top-1 accuracy in percent, or images per second for THROUGHPUT_MODE."""
    with launch.session(config, files=utils_moe) as session:
        if config.MODEL.TYPE != "swin_moe":
            raise ValueError(f"MODEL.TYPE={config.MODEL.TYPE!r}: main_moe.py trains swin_moe; main.py takes the others")
        if config.TRAIN.MOE.STATISTICS and config.MODEL.SWIN_MOE.BACKEND == "tutel":
            raise ValueError(
                "TRAIN.MOE.STATISTICS=True: Tutel's layers tell none; choose MODEL.SWIN_MOE.BACKEND native"
            )
        return supervised.run(session, supervised.Task(loss=ExpertLoss, after_epoch=partial(make_after_epoch, config)))


if __name__ == "__main__":
    launch.run(main, "Train, evaluate and time Swin-MoE models")
