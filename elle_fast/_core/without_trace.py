"""A forward pass in train mode that leaves no trace on the model: for a detector, which only looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from elle_fast._core.unwrapping import module_of


@contextmanager
def without_trace(model: Any, when: bool = True) -> Iterator[None]:
    """Inside there is no graph, and batch norm, which normalises by the batch, leaves its running statistics alone.

    A model that is a function keeps those of the modules it calls only if it is a method or a partial call of one.
    """
    module = module_of(model) if when else None
    norms = [] if module is None else [each for each in module.modules() if _tracks(each)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not when):
            yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def _tracks(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats
