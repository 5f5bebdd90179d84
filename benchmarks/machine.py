"""What a machine is called, what it can do, and how much memory something takes on it."""

import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import measure
from models.linear import is_amd, linear


def describe_machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def kind_of_machine(device: torch.device) -> str:
    """For names of files: ``cuda``, or ``cpu`` with what decides the speed of its libraries: instructions and maker."""
    capability = torch.backends.cpu.get_cpu_capability().lower().replace(" ", "")
    return f"cpu-{capability}{'-amd' if is_amd() else ''}" if device.type == "cpu" else device.type


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def rate_steps(device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What `rates_of` wants the times of: a large copy, and a large product in both ways that PyTorch has on a CPU."""
    numbers, side = _sizes(device)
    source = torch.randn(numbers, device=device)
    target, matrix = torch.empty_like(source), torch.randn(side, side, device=device, dtype=dtype)
    return {
        "machine: copy": lambda: target.copy_(source),
        "machine: product": lambda: matrix @ matrix,
        "machine: linear": lambda: linear(matrix, matrix, None),
    }


def rates_of(seconds: dict[str, list[float]], device: torch.device) -> dict[str, float]:
    """Bytes a second of copies, read and written counted, and operations a second of products, by median times."""
    numbers, side = _sizes(device)
    copy, *products = (statistics.median(seconds[f"machine: {name}"]) for name in ("copy", "product", "linear"))
    return {"bytes_per_second": 8 * numbers / copy, "flops": 2 * side**3 / min(products)}


def _sizes(device: torch.device) -> tuple[int, int]:
    """Numbers of a copy in float32, and the side of matrices."""
    return (2**28, 8192) if device.type == "cuda" else (2**25, 1024)


def machine_rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """`rates_of` this machine now."""
    return rates_of(measure(rate_steps(device, dtype), device, 7, 5), device)


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that ``run`` holds at once, at most, beyond those that were there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
