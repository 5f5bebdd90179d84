"""torch.compile for a model that trains, is evaluated or timed: in place, so that the names of its weights stay.

A compiled forward is made for one batch size. Batches of others, such as the last one of an evaluation, run as they
would without it: compiling anew takes longer than they do.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from models.blocks import Block
from sharding import is_sharded

CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # the modes that record them


def compile_in_place(
    model: nn.Module, device: torch.device, mode: str, backend: str = "inductor", training: bool = False
) -> str:
    """Have ``model`` compiled when it is first called, and say how. Wrap it in DDP afterwards.

    On a CPU weights that are not trained are frozen: what depends on them alone is computed once, and products get them
    in the order in which they read them. Later changes of them are not seen.

    Args:
        mode, backend: of ``torch.compile``.

    Raises ``ValueError`` where nothing can be compiled here, or where training is asked to use CUDA graphs.
    """
    if training and mode in CUDA_GRAPHS:
        # A graph overwrites its outputs at the next step, while gradients are gathered and values wait to be printed.
        raise ValueError(
            f"COMPILE={mode!r} uses CUDA graphs, which are for --eval and --throughput; to train, choose default or "
            "max-autotune-no-cudagraphs"
        )
    _try_compiler(device, backend)
    settings = {"backend": backend, "mode": mode if backend == "inductor" else None}  # only inductor knows modes
    if is_sharded(model):
        _compile_blocks(model, **settings)
        return f"torch.compile: {backend}, {mode}, block by block: FSDP2 gathers their weights between them"
    model.compile(**settings)
    without = mode in CUDA_GRAPHS and (device.type != "cuda" or backend != "inductor")
    how = f"torch.compile: {backend}, {mode}{', without CUDA graphs, which need CUDA' if without else ''}"
    if device.type != "cpu" or backend != "inductor" or training:
        return how
    model._compiled_call_impl = frozen(model._compiled_call_impl)
    return f"{how}, weights frozen"


def frozen(compiled: Callable) -> Callable:
    """A compiled model for which inductor takes weights for constants where it is called without gradients."""

    def call(*args, **kwargs):
        # As an option of torch.compile it has no effect: Dynamo looks at the global setting.
        with torch._inductor.config.patch(freezing=True):
            return compiled(*args, **kwargs)

    return call


def _compile_blocks(model: nn.Module, **settings: str | None) -> None:
    """The forward passes of blocks alone, so that what FSDP2 does before and after each stays outside."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # Blocks differ in shifts, sizes and rates of dropped paths, and each has a graph of training and of evaluation.
    torch._dynamo.config.recompile_limit += 2 * len(blocks)
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False, **settings)


def _try_compiler(device: torch.device, backend: str) -> None:
    """Compile a sum, so that what is missing shows at once and in one line."""
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(8, device=device))
    except Exception as err:  # of many kinds, from Python's headers to the driver
        lines = [line.strip() for line in str(err).splitlines() if line.strip() and not line.endswith("raised:")]
        cause = lines[0] if lines else type(err).__name__
        raise ValueError(
            f"--compile: torch.compile does not work here: {cause}; install a C++ compiler (g++, or another in CXX) or "
            "leave --compile away"
        ) from err


def as_compiled(images: int, batch_size: int | str) -> AbstractContextManager:
    """Within it a model compiled for ``batch_size``, if it is, runs uncompiled on any other number of images."""
    return torch.compiler.set_stance("force_eager") if batch_size and images != batch_size else nullcontext()
