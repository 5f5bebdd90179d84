"""Batches on the device: copied ahead of their use, and finished there (data/augment.py)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .augment import Finish, Plan
from .images import Skips

Batch = tuple[Tensor, ...]  # images, labels, and what the device needs for the fast pipeline


class DeviceLoader:
    """A loader's batches as (images, targets) on a device; images (B, 3, H, W), float32, normalised.

    Masks, or whatever tensors come along, are handed on in their order.

    uint8 batches of the fast pipeline (`data.fast.collate`) are augmented, normalised and erased there; batches of the
    official pipeline, which are finished already, are copied. On CUDA, the next batch is copied and finished on a
    stream of its own while the current one is used; pin the loader's memory, or copies wait.

    Args:
        erase_mode: ``pixel``, ``rand`` or ``const``, as `data.augment.erase`.
        fill: give the batch before it, or else the one after it, again in the place of a batch of which everything was
            skipped, so that every rank has as many batches; else leave it out. What takes its place is the same for
            any number of workers.

    Raises:
        ValueError: with ``fill``, naming the first sample that was skipped, where no batch of an epoch can be used.
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
        batches = map(self._noted, self.loader)
        return self._filled(batches) if self.fill else (batch for batch in batches if batch[0] is not None)

    def _noted(self, batch: tuple) -> tuple:
        for part in batch:
            if isinstance(part, Skips):
                self.skipped += part.reasons
        return tuple(part for part in batch if not isinstance(part, Skips))

    def _filled(self, batches: Iterator[tuple]) -> Iterator[Batch]:
        last, owed = None, 0
        for batch in batches:
            owed += 1
            last = last if batch[0] is None else batch
            if last is not None:
                for _ in range(owed):
                    # A copy: on the CPU the user gets this very memory, and mixup changes it.
                    yield (last[0].clone(), *last[1:]) if self.device.type == "cpu" else last
                owed = 0
        if owed:
            raise ValueError(f"no usable image in {owed} batch(es), all of this epoch; the first: {self.skipped[0]}")

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
