"""Maps to (shifted) windows and back, in one copy each way."""

from .window_process import (
    INSTALL,
    WindowProcess,
    WindowProcessReverse,
    is_built_for,
    merge,
    merge_reference,
    partition,
    partition_reference,
    why_not_built,
)

__all__ = [
    "INSTALL",
    "WindowProcess",
    "WindowProcessReverse",
    "is_built_for",
    "merge",
    "merge_reference",
    "partition",
    "partition_reference",
    "why_not_built",
]
