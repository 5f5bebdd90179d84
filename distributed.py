"""Processes and devices: which rank am I, where do I compute, how do ranks agree. One process needs no process group.

torchrun (or ``torch.distributed.launch``) tells each process RANK, WORLD_SIZE and LOCAL_RANK through the environment;
without them this is a single process and every collective below returns its input.
"""

import atexit
import os
import random
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main() -> bool:
    return rank() == 0


def pick_device() -> torch.device:
    """The accelerator of this local rank, or the CPU. Hide accelerators (``CUDA_VISIBLE_DEVICES=``) to use the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank() >= count:
        raise ValueError(
            f"LOCAL_RANK={local_rank()}, but this machine has {count} {accelerator.type} device(s); "
            f"start at most {count} processes per machine"
        )
    device = torch.device(accelerator.type, local_rank())
    torch.accelerator.set_device_index(device.index)
    return device


def start(device: torch.device, timeout_minutes: float = 30) -> None:
    """Join the process group that the launcher describes; do nothing for a single process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    store, this_rank, world = next(dist.rendezvous("env://"))
    # A restarted elastic group may meet the store of its dead predecessor: stale addresses must not be read again.
    store = dist.PrefixStore(f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        backend=dist.get_default_backend_for_device(device),
        store=store,
        rank=this_rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=None if device.type == "cpu" else device,
    )


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int, at_once: bool = False) -> NoReturn:
    """End this process; one of several once all are here, and without taking Python down.

    A thread of gloo lets go of the tensors of an exchange some time after it. Where Python is being taken down by then,
    freeing them ends the thread in a destructor, and so the process by SIGABRT, whatever it has done well before
    (https://github.com/pytorch/pytorch/issues/190489). Groups that are destroyed keep their threads while anything
    refers to them, and caches of PyTorch do.

    Args:
        at_once: do not wait for the others, which may wait for this one in a collective.
    """
    if not dist.is_initialized():
        sys.exit(code)
    if not at_once:
        with suppress(RuntimeError):  # a process that has failed says why itself
            barrier()
            stop()
        atexit._run_exitfuncs()
    with suppress(OSError):  # nobody may be reading them any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def others_are_lost(err: BaseException) -> bool:
    """Whether this is what an exchange raises when another process has ended, or does not answer in time."""
    return isinstance(err, (dist.DistNetworkError, dist.DistStoreError)) or (
        isinstance(err, RuntimeError) and "gloo" in str(err)  # which has no class of errors
    )


def has_ended(err: BaseException) -> str:
    """What to say of the process that an exchange has failed for."""
    reason = (str(err).splitlines() or [type(err).__name__])[0]
    return f"has ended, or has not answered in time; its own log says why ({reason})"


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """One plain object of every rank, by rank, on the main process; ``[]`` on the others."""
    if not dist.is_initialized():
        return [value]
    gathered = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered)
    return gathered or []


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds on any rank. Every rank must call it."""
    if not dist.is_initialized():
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)).item())


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch with ``seed + rank`` as the official scripts do.

    With ``deterministic``, torch refuses operators whose results differ between runs, at some cost in speed.
    """
    seed += rank()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _module(device: torch.device) -> Any:
    """``torch.cuda``, ``torch.mps``, …; they work on the current device, which is this rank's."""
    return getattr(torch, device.type)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MB: of the accelerator's allocator where it keeps count, else of the process."""
    if hasattr(_module(device), "max_memory_allocated"):
        return _module(device).max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator of this process as plain data."""
    version, words, gauss = random.getstate()
    name, keys, *numbers = np.random.get_state()
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *numbers],
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = _module(device).get_rng_state()
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue from a state of `rng_state`."""
    version, words, gauss = state["python"]
    name, keys, *numbers = state["numpy"]
    random.setstate((version, tuple(words.tolist()), gauss))
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        _module(device).set_rng_state(state["device"])


def together(action: Callable[[], T]) -> T:
    """``action()`` of this process, once every process has done its own; all fail where one does, none waits.

    ``action`` must not communicate. Raises what it raised, or ``OSError`` naming process and cause where only others
    failed.
    """
    result = error = None
    try:
        result = action()
    except Exception as err:
        error = err
    causes = gather_objects(error and f"{type(error).__name__}: {error}")
    failed = {rank: cause for rank, cause in enumerate(causes) if cause}
    failed = broadcast_object(failed)
    if error is not None:
        raise error
    if failed:
        raise OSError("; ".join(f"process {rank}: {cause}" for rank, cause in failed.items()))
    return result


def on_main(action: Callable[[], T]) -> T:
    """What ``action()`` gives on the main process, on every process; so is its ``ValueError`` or ``OSError``."""
    result = error = None
    if is_main():
        try:
            result = action()
        except (ValueError, OSError) as err:
            error = err
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return result


def broadcast_object(value: Any) -> Any:
    """The main process's plain object, on every rank."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]
