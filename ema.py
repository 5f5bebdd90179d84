"""The moving average of a model's weights, one step for each update: often better to evaluate than the last ones.

Whether an update was skipped is decided on the device, so averaging never makes the host wait.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sharding import local, local_part

CHUNK = 2**24  # numbers that one step takes at once: 64 MB for the differences


class MovingAverage:
    """Float32 copies of the parameters of ``model``, moved towards them by 1 - ``decay`` in each `update`.

    Of a model that is sliced over processes (`sharding.shard`) each process averages its slices. Every process must
    then call `state_dict`, whose averages are whole, and whatever runs the model `in_place`.

    Args:
        state: of `state_dict`, to continue from; by default the average begins at the model's weights.
    """

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor] | None = None):
        self.model, self.decay = model, decay
        self.averages = {}
        for name, parameter in model.named_parameters():
            own = local(parameter).detach()
            start = own if state is None else local_part(state[name], parameter)
            self.averages[name] = start.detach().to(own.device, torch.float32, copy=True)
        self._chunks = list(_chunks(self.averages.values(), model.parameters()))

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Average in the model's weights after an update, whose gradients had this norm; if it is not finite, do not.

        An update that was skipped has left the weights as they were, but each step moves the average.
        """
        weight = (1 - self.decay) * torch.isfinite(norm).float()
        for averages, parameters in self._chunks:  # a lerp whose weight lies on the device
            steps = torch._foreach_sub([local(parameter) for parameter in parameters], averages)
            torch._foreach_mul_(steps, weight.to(averages[0].device))
            torch._foreach_add_(averages, steps)

    def state_dict(self) -> dict[str, Tensor]:
        """As the model's own, with averages for parameters."""
        with self.in_place():
            state = self.model.state_dict()
        sliced = {name for name, parameter in self.model.named_parameters() if local(parameter) is not parameter}
        return {**state, **{name: average for name, average in self.averages.items() if name not in sliced}}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averages as its weights."""
        own = {}
        try:
            for name, parameter in self.model.named_parameters():
                own[name] = _replace(parameter, self.averages[name])
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                if name in own:
                    _replace(parameter, own[name])


@torch.no_grad()
def _replace(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter other numbers, and return those that it had. Slices keep their memory: FSDP2 gathers from it."""
    part = local(parameter)
    if part is parameter:
        own, parameter.data = parameter.data, value.to(parameter.dtype)
        return own
    own = part.clone()
    part.copy_(value)
    return own


def _chunks(averages: Iterable[Tensor], parameters: Iterable[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Pairs on one device that a step takes at once."""
    chunk: tuple[list[Tensor], list[Tensor]] = [], []
    for average, parameter in zip(averages, parameters, strict=True):
        if chunk[0] and chunk[0][-1].device != average.device:  # experts, where slices are kept on the CPU
            yield chunk
            chunk = [], []
        chunk[0].append(average)
        chunk[1].append(parameter)
        if sum(map(Tensor.numel, chunk[0])) >= CHUNK:
            yield chunk
            chunk = [], []
    if chunk[0]:
        yield chunk
