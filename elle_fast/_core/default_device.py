"""What devices can do, and where tensors are made that name none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can live on the device, which those of MPS cannot."""
    return device.type in ("cpu", "cuda", "meta") or _takes_float64(device)


@cache
def _takes_float64(device: torch.device) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


@contextmanager
def host_by_default() -> Iterator[None]:
    """Whatever torch's default device is, a tensor that names none is one of the CPU inside; also a decorator."""
    if torch.empty(0).device.type == "cpu":  # as usual: the context below would cost something in each call of torch
        yield
        return
    with torch.device("cpu"):
        yield
