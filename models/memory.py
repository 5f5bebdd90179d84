"""Freed memory on a CPU: glibc gives large blocks back to the system, which zeroes them page by page at their next use.

Layers free and take the same sizes over and over; without this, each of them meets new pages.
"""

import ctypes
import sys
from functools import lru_cache

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@lru_cache(maxsize=1)
def keep_some() -> None:
    """Have glibc keep up to about 60 MiB of what is freed, and blocks below 32 MiB, in any program that runs models.

    Freeing a mapped block raises its limits to that block's size and twice that (mallopt(3), "dynamic mmap threshold");
    of blocks of 32 MiB and more it takes no notice. Other allocators do as they did.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


@lru_cache(maxsize=1)
def keep_all() -> bool:
    """Have glibc keep whatever is freed, in blocks of up to 1 GiB, for a process that does nothing but run models.

    Returns whether it does; other systems and allocators have no such setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    largest = mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # older releases take no more
    return bool(largest and mallopt(TRIM_THRESHOLD, -1))
