"""The moving average of a model's weights, one step for each update: often better to evaluate than the last ones.

Whether an update was skipped is decided on the device, so averaging never makes the host wait.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

CHUNK = 2**24  # numbers that one step takes at once: 64 MB for the differences


class MovingAverage:
    """Float32 copies of the parameters of ``model``, moved towards them by 1 - ``decay`` in each `update`.

    Args:
        state: of `state_dict`, to continue from; by default the average begins at the model's weights.
    """

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None):
        self.model, self.decay = model, decay
        self.averages = {
            name: (parameter if state is None else state[name].to(parameter.device))
            .detach()
            .to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
        }
        self._chunks = list(_chunks(self.averages.values(), model.parameters()))

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Average in the model's weights after an update, whose gradients had this norm; if it is not finite, do not.

        An update that was skipped has left the weights as they were, but each step moves the average.
        """
        weight = (1 - self.decay) * torch.isfinite(norm).float()
        for averages, parameters in self._chunks:  # a lerp whose weight lies on the device
            steps = torch._foreach_sub(parameters, averages)
            torch._foreach_mul_(steps, weight)
            torch._foreach_add_(averages, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """As the model's own, with averages for parameters."""
        return {**self.model.state_dict(), **self.averages}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages as its weights."""
        parameters = dict(self.model.named_parameters())
        own = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.averages[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]


def _chunks(averages: Iterable[Tensor], parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    chunk: tuple[list[Tensor], list[Tensor]] = [], []
    for average, parameter in zip(averages, parameters, strict=True):
        chunk[0].append(average)
        chunk[1].append(parameter)
        if sum(map(Tensor.numel, chunk[0])) >= CHUNK:
            yield chunk
            chunk = [], []
    if chunk[0]:
        yield chunk
