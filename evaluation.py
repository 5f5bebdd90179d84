"""Evaluation of a classifier, each image once on any number of ranks, and timing of the model alone."""

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distributed
import sharding
from compilation import as_compiled
from launch import Session
from logger import ProgressBar
from models.expert_parallel import expert_modules


def to_device(batch: Any, device: torch.device) -> list[Tensor]:
    return [part.to(device, non_blocking=True) for part in batch]


def report_skipped(session: Session, loader: Any, what: str) -> None:
    """Log the samples that this process's loader has skipped since the last report (``DATA.ON_ERROR skip``)."""
    reasons = loader.take_skipped() if hasattr(loader, "take_skipped") else []
    if reasons:
        session.logger.warning(f"{len(reasons)} sample(s) skipped in {what} by this process:")
    for reason in reasons:
        session.logger.warning(f"skipped: {reason}")


@torch.no_grad()  # in inference mode FSDP2 would keep tensors that training cannot use
def validate(session: Session, model: nn.Module, loader: DataLoader) -> tuple[float, float, float]:
    """Top-1 and top-5 accuracy in percent, and the mean cross-entropy; each image counts once on any number of ranks.

    ``model`` is the bare module, or one of `sharding.shard`: ranks may have different numbers of batches.
    """
    config, logger, device = session.config, session.logger, session.device
    model.eval()
    precision = torch.float32 if device.type == "mps" else torch.float64
    sums = torch.zeros(4, dtype=precision, device=device)  # loss, top-1, top-5, images
    bar = ProgressBar("evaluation", len(loader), distributed.is_main())
    began = last = time.perf_counter()
    printed = sums.clone()
    for step, batch in enumerate(_together(loader, model, device)):
        images, targets = to_device(batch, device)
        with session.autocast(), as_compiled(len(images), config.COMPILE and config.DATA.BATCH_SIZE):
            logits = model(images)
        if isinstance(logits, tuple):  # Swin-MoE also gives its auxiliary loss
            logits, _ = logits
        sums += _scores(logits[: len(targets)].float(), targets).to(precision)
        bar.update(step + 1)
        if step % config.PRINT_FREQ == 0:
            (new_loss, new_acc1, new_acc5), (loss, acc1, acc5) = _means(sums - printed), _means(sums)
            printed, now = sums.clone(), time.perf_counter()
            seconds, last = (now - last) / (1 if step == 0 else config.PRINT_FREQ), now
            logger.info(
                f"Test: [{step}/{len(loader)}]\tTime {seconds:.3f} ({(now - began) / (step + 1):.3f})\t"
                f"Loss {new_loss:.4f} ({loss:.4f})\tAcc@1 {new_acc1:.3f} ({acc1:.3f})\t"
                f"Acc@5 {new_acc5:.3f} ({acc5:.3f})\tMem {distributed.peak_memory_mb(device):.0f}MB"
            )
    bar.close()
    report_skipped(session, loader, "evaluation")
    sums = distributed.all_reduce_sum(sums)
    if not sums[3]:
        raise ValueError(f"{config.DATA.DATA_PATH}: none of the validation images can be used; the log lists them")
    loss, acc1, acc5 = _means(sums)
    logger.info(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f}")
    logger.info(f"Accuracy of the network on the {int(sums[3])} test images: {acc1:.1f}%")
    return acc1, acc5, loss


def _together(loader: Any, model: nn.Module, device: torch.device) -> Iterator[Any]:
    """The batches of ``loader``; where processes share weights, then empty ones until all processes are through.

    Every pass through the model is an exchange between them. Models take batches without images only where experts are
    all that is shared; else there is a blank image, without a target.
    """
    sharded = sharding.is_sharded(model)
    if not sharded and not any(module.expert_groups.size > 1 for _, module in expert_modules(model)):
        yield from loader
        return
    batches, size = iter(loader), (model.patch_embed.in_chans, *model.patch_embed.img_size)
    nothing = (torch.zeros(int(sharded), *size), torch.empty(0, dtype=torch.long))
    while True:
        batch = next(batches, None)
        if not distributed.any_rank(batch is not None, device):
            return
        yield nothing if batch is None else batch


def _scores(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch: cross-entropy, top-1 hits, top-5 hits, images."""
    top = logits.topk(min(5, logits.shape[1])).indices
    hits = (top == targets[:, None]).float()
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), loss.new_full((), len(targets))])


def _means(sums: Tensor) -> tuple[float, float, float]:
    loss, top1, top5, images = sums.tolist()
    images = max(images, 1)  # all of these may have been skipped
    return loss / images, 100 * top1 / images, 100 * top5 / images


@torch.inference_mode()
def throughput(session: Session, model: nn.Module, runs: int = 30) -> float:
    """Images per second of the model alone, on noise of the configured batch and image size, with autocast as set.

    Warm-up, then ``runs`` timed passes in a row for the official line, then as many singly for the latencies.
    """
    config, logger, device = session.config, session.logger, session.device
    batch = config.DATA.BATCH_SIZE
    model.to(device).eval()
    images = torch.randn(batch, model.patch_embed.in_chans, *model.patch_embed.img_size, device=device)

    def passes(count: int) -> float:
        distributed.synchronize(device)
        began = time.perf_counter()
        for _ in range(count):
            with session.autocast():
                model(images)
        distributed.synchronize(device)
        return time.perf_counter() - began

    passes(5 if device.type == "cpu" else 50)
    logger.info(f"throughput averaged with {runs} times")
    rate = runs * batch / passes(runs)
    logger.info(f"batch_size {batch} throughput {rate}")
    latencies = sorted(1000 * passes(1) for _ in range(runs))
    p50, p90, p99 = (latencies[min(int(share * runs), runs - 1)] for share in (0.5, 0.9, 0.99))
    logger.info(f"latency of a batch in ms: p50 {p50:.2f} p90 {p90:.2f} p99 {p99:.2f}")
    logger.info(f"peak memory {distributed.peak_memory_mb(device):.0f}MB")
    return rate
