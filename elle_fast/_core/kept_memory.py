"""The C library's allocator, told to keep what a training frees."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Keep freed memory for what is allocated next, for the rest of the process; True if that was done.

    For trainings on the CPU. A step frees and allocates the same activations as the one before. glibc gives large
    blocks back to the system, which clears their pages when they are touched again: a quarter of the time of a small
    network's FGSM step in float32, a third of its ELLE-A step (benchmarks/results/kept_memory.json). ``elle-fast
    train`` calls it.

    Nothing happens with another C library than glibc, nor where ``MALLOC_...`` or ``GLIBC_TUNABLES`` are set.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # of another C library
        return False
    return bool(mallopt(_TRIM_THRESHOLD, -1)) & bool(mallopt(_MMAP_MAX, 0))
