"""Where tensors are made that name no device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def host_by_default() -> Iterator[None]:
    """Whatever torch's default device is, a tensor that names none is one of the CPU inside; also a decorator."""
    if torch.empty(0).device.type == "cpu":  # as usual: the context below would cost something in each call of torch
        yield
        return
    with torch.device("cpu"):
        yield
