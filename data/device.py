"""Batches on the device: copied ahead of their use, and finished there (data/augment.py)."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import Finish, Plan
from .images import Skips

Batch = tuple[Tensor | Plan, ...]  # images, whatever tensors come along, and the fast pipeline's plan for the device
logger = logging.getLogger(__name__)


class DeviceLoader:
    """A loader's batches as (images, labels) on a device; images (B, 3, H, W), float32, normalised.

    SimMIM's are (images, masks, labels): whatever tensors come along are handed on in their order.

    uint8 batches of the fast pipeline (`data.fast.collate`) are augmented, normalised and erased there; batches of the
    official pipeline, which are finished already, are copied. On CUDA, the next batch is copied and finished on a
    stream of its own while the current one is used; pin the loader's memory, or copies wait.

    Args:
        erase_mode: ``pixel``, ``rand`` or ``const``, as `data.augment.erase`.
        fill: give the next usable batch, or else the last one, again in the place of a batch of which everything was
            skipped, so that every rank has as many batches; else leave it out. What takes its place is the same for
            any number of workers, and for a resumed run, which has not seen the batches before.

    Raises:
        ValueError: with ``fill``, naming the first sample that was skipped, where no batch that is left of an epoch
            can be used.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str, erase_mode: str = "pixel", fill: bool = False):
        self.loader, self.fill = loader, fill
        self.device = torch.device(device)
        self.finish = Finish(self.device, erase_mode)
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.skipped: list[str] = []

    @property
    def sampler(self) -> Sampler:
        return self.loader.sampler

    @property
    def dataset(self) -> Dataset:
        return self.loader.dataset

    @property
    def batch_size(self) -> int | None:
        return self.loader.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Leaving early needs no care: persistent workers begin anew with the next iteration."""
        return map(self._finished, self._batches()) if self.stream is None else self._prefetched()

    def take_skipped(self) -> list[str]:
        """What was skipped of the batches since the last call: a line for each sample that names it."""
        skipped, self.skipped = self.skipped, []
        return skipped

    def _batches(self) -> Iterator[Batch]:
        """The loader's batches, empty ones filled or left out, without the notes on what was skipped."""
        return self._filled() if self.fill else (batch for batch, _ in self._noted() if batch is not None)

    def _noted(self) -> Iterator[tuple[Batch | None, list[str]]]:
        """Batches, None where all of one was skipped, each with the reasons for what was skipped of it."""
        for batch in self.loader:
            reasons = [reason for part in batch if isinstance(part, Skips) for reason in part.reasons]
            self.skipped += reasons
            usable = tuple(part for part in batch if not isinstance(part, Skips))
            yield None if batch[0] is None else usable, reasons

    def _filled(self) -> Iterator[Batch]:
        last, owed, why = None, 0, ""  # why: the first reason of those that wait for a batch
        for batch, reasons in self._noted():
            owed += 1
            if batch is None:
                why = why or reasons[0]
                continue
            last = batch
            yield from self._repeated(last, owed, owed - 1, why)
            owed, why = 0, ""
        if owed and last is None:
            raise ValueError(f"no usable image in the {owed} batch(es) left of this epoch; the first: {why}")
        if owed:
            yield from self._repeated(last, owed, owed, why)

    def _repeated(self, batch: Batch, times: int, repeats: int, why: str) -> Iterator[Batch]:
        """A batch ``times`` over, ``repeats`` of them in the place of others."""
        if repeats:
            logger.warning(f"another batch takes the place of {repeats} without a usable image; the first: {why}")
        for _ in range(times):
            # A copy: on the CPU the user gets this very memory, and mixup changes it.
            yield tuple(map(_copied, batch)) if self.device.type == "cpu" else batch

    def _finished(self, batch: tuple) -> tuple[Tensor, ...]:
        plan = [part.to(self.device) for part in batch if isinstance(part, Plan)]
        images, *others = (part.to(self.device, non_blocking=True) for part in batch if isinstance(part, Tensor))
        if images.dtype == torch.uint8:
            images = self.finish(images, *plan)
        return images, *others

    def _prefetched(self) -> Iterator[tuple[Tensor, ...]]:
        ahead = failure = None
        batches = self._batches()
        while True:
            try:
                batch = next(batches, None)
            except Exception as err:  # what was read before it is still good
                batch, failure = None, err
            following = None
            if batch is not None:
                with torch.cuda.stream(self.stream):
                    following = self._finished(batch), self.stream.record_event()
            if ahead is not None:
                yield self._hand_over(*ahead)
            if failure is not None:
                raise failure
            if following is None:
                return
            ahead = following

    def _hand_over(self, batch: tuple[Tensor, ...], ready: torch.cuda.Event) -> tuple[Tensor, ...]:
        """Let the user's stream wait for the batch, and the allocator keep the memory until that stream is done."""
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(ready)
        for part in batch:
            part.record_stream(stream)
        return batch


def _copied(part: Tensor | Plan) -> Tensor | Plan:
    return part.clone() if isinstance(part, Tensor) else part
