"""Values of an epoch's steps: kept on the device, read together, averaged over ranks, checked and logged.

``run`` is an `engine.Run`.
"""

import math
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

import distributed


class EpochMeters:
    """Collects an epoch's values on the device; reads, averages, logs and checks them from time to time."""

    def __init__(self, run: Any, first_step: int):
        self.run = run
        self.pending: list[dict[str, Tensor]] = []  # on the device
        self.window: dict[str, list[float]] = {}  # since the last printed step
        self.totals: dict[str, list[float]] = {}  # name: sum, count, last; of the epoch
        self.first_step = self.next_unprinted = first_step
        self.began = self.last_printed = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor | None, values: dict[str, Tensor]) -> None:
        row = {"loss": loss, **values}
        if norm is not None:
            row["grad_norm"] = norm
        self.pending.append({name: value.detach() for name, value in row.items()})

    def read(self, step: int) -> bool:
        """Read, check and log the steps up to ``step``. Returns whether any rank wants to stop."""
        stop = self.flush(step)
        self._correct_updates()
        now = time.perf_counter()
        seconds = (now - self.last_printed) / (step + 1 - self.next_unprinted)
        self._log(step, seconds, (now - self.began) / (step + 1 - self.first_step))
        self.last_printed, self.next_unprinted = now, step + 1
        self.window.clear()
        return stop

    def finish(self, step: int) -> None:
        """Take in the last steps of the epoch, of which ``step`` is the last."""
        self.flush(step)
        self._correct_updates()

    def flush(self, step: int) -> bool:
        """Take in what is pending, averaged over ranks, in one transfer; nothing is logged.

        Returns whether any rank wants to stop.
        """
        if not self.pending:
            return False
        flat = [value.float().reshape(()) for row in self.pending for value in row.values()]
        flag = torch.tensor(float(self.run.should_stop()), device=flat[0].device)
        mean = distributed.all_reduce_sum(torch.stack([*flat, flag])) / distributed.world_size()
        *numbers, stop = mean.tolist()
        values = iter(numbers)
        rows = [{name: next(values) for name in row} for row in self.pending]
        self.pending.clear()
        for offset, row in enumerate(rows):
            self._check(row, step - len(rows) + 1 + offset)
            for name, value in row.items():
                if math.isfinite(value):
                    self._count(name, value)
                    self.window.setdefault(name, []).append(value)
        return stop > 0

    def _count(self, name: str, value: float) -> None:
        total = self.totals.setdefault(name, [0.0, 0, 0.0])
        total[:] = total[0] + value, total[1] + 1, value

    def _correct_updates(self) -> None:
        """Take skipped updates out of the count that the schedule follows.

        Only at printed steps and at an epoch's end, so that saving and resuming in between changes nothing.
        """
        progress = self.run.progress
        progress.updates -= progress.uncorrected
        progress.uncorrected = 0

    def _check(self, row: dict[str, float], step: int) -> None:
        """Count an update that was skipped, and stop after too many in a row."""
        if "grad_norm" not in row:
            return
        progress, train = self.run.progress, self.run.config.TRAIN
        if math.isfinite(row["grad_norm"]):
            progress.skipped_in_row = 0
            return
        progress.uncorrected += 1
        progress.skipped += 1
        progress.skipped_in_row += 1
        self.run.session.logger.warning(
            f"epoch {progress.epoch} step {step}: gradient norm {row['grad_norm']}, loss {row['loss']:.4g}; update "
            f"skipped ({progress.skipped_in_row} in a row, {progress.skipped} in all)"
        )
        if progress.skipped_in_row >= train.MAX_NONFINITE_STEPS:
            raise FloatingPointError(
                f"{progress.skipped_in_row} updates in a row had non-finite gradients, the last at epoch "
                f"{progress.epoch} step {step} (loss {row['loss']:.4g}); lower TRAIN.BASE_LR, try --amp-dtype fp32, or "
                f"raise TRAIN.MAX_NONFINITE_STEPS={train.MAX_NONFINITE_STEPS}. Saved checkpoints are as they were"
            )

    def _log(self, step: int, seconds: float, seconds_mean: float) -> None:
        run, progress = self.run, self.run.progress
        steps = len(run.loader_train)
        lr = run.optimizer.param_groups[-1]["lr"]  # the head's, where layers have rates of their own
        weight_decay = run.optimizer.param_groups[0]["weight_decay"]
        scale = run.scaler.get_scale()
        self._count("loss_scale", scale)
        memory = distributed.peak_memory_mb(run.session.device)
        parts = [name for name in self.totals if name.startswith("loss-")]
        names = ["loss", *parts, "grad_norm", "loss_scale"]
        meters = [self._meter(name) for name in [*names, *(name for name in self.totals if name not in names)]]
        run.session.logger.info(
            f"Train: [{progress.epoch}/{run.config.TRAIN.EPOCHS}][{step}/{steps}]\t"
            f"eta {timedelta(seconds=int(seconds_mean * (steps - step)))} lr {lr:.6f}\t "
            f"wd {weight_decay:.4f}\t"
            f"time {seconds:.4f} ({seconds_mean:.4f})\t" + "\t".join(meters) + f"\tmem {memory:.0f}MB"
        )
        images = run.config.DATA.BATCH_SIZE * distributed.world_size()
        scalars = {f"train/{name}": statistics.fmean(values) for name, values in self.window.items()}
        scalars |= {
            "train/learning_rate": lr,
            "train/loss_scale": scale,
            "train/skipped_updates": progress.skipped,
            "train/images_per_second": images / seconds,
            "train/memory_mb": memory,
        }
        write_scalars(run, scalars)

    def _meter(self, name: str) -> str:
        total, count, last = self.totals.get(name, (0.0, 1, 0.0))  # no gradient norm before the first update
        return f"{name} {last:.4f} ({total / count:.4f})"


def write_scalars(run: Any, scalars: dict[str, float]) -> None:
    """To TensorBoard, on the main process, by the number of updates."""
    if run.writer is not None:
        for name, value in scalars.items():
            run.writer.add_scalar(name, value, run.progress.updates)
