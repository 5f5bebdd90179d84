"""Candidates that take turns: machines are shared and clocks wander, so only ratios within a round count."""

import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import distributed


def measure(
    passes: dict[str, Callable[[], object]], device: torch.device, rounds: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, the order drawn anew for each."""
    for run in passes.values():
        run()
        run()
    seconds = {name: [] for name in passes}
    names = list(passes)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            distributed.synchronize(device)
            began = time.perf_counter()
            for _ in range(repeats):
                passes[name]()
            distributed.synchronize(device)
            seconds[name].append((time.perf_counter() - began) / repeats)
    return seconds


def ratios_to_best(seconds: dict[str, list[float]], peers: Sequence[str]) -> dict[str, list[float]]:
    """For each candidate the quartiles, over rounds, of its speed relative to the fastest peer of the round."""
    best = [min(times) for times in zip(*(seconds[peer] for peer in peers), strict=True)]
    return {
        name: statistics.quantiles([peer / own for peer, own in zip(best, times, strict=True)], n=4)
        for name, times in seconds.items()
    }
