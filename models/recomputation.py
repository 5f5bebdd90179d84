"""Less memory in training: activations are computed again for their gradients, not kept; matrix products are kept."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Mlp
from .linear import fuses_mlp


class RecomputingMlp(Mlp):
    """An `Mlp` that keeps its hidden values before the activation only, not also those after it.

    Recomputing ends where the last thing that is needed is there: before the second linear layer's product.
    """

    def forward(self, x: Tensor) -> Tensor:
        if fuses_mlp(x, self.fc1, self.act, self.drop, self.fc2):  # which keeps no more
            return super().forward(x)
        hidden = self.fc1(x)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # compilers choose by themselves what to keep
            return self.drop(self.project(hidden))
        random = self.training and self.drop.p > 0
        return self.drop(checkpoint(self.project, hidden, use_reentrant=False, preserve_rng_state=random))

    def project(self, hidden: Tensor) -> Tensor:
        """The activation of hidden values, back to the width of the tokens."""
        return self.fc2(self.drop(self.act(hidden)))


def recompute_activations(model: nn.Module) -> None:
    """Turn every `Mlp` of ``model`` into a `RecomputingMlp`, in place; weights and their names stay."""
    for module in model.modules():
        if type(module) is Mlp:
            module.__class__ = RecomputingMlp
