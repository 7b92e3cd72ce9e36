"""A forward pass in train mode that leaves no trace on the model: for a detector, which only looks at it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from elle_fast._core.unwrapping import module_of


@contextmanager
def without_trace(model: Any, when: bool = True) -> Iterator[None]:
    """Inside there is no graph, and batch and instance norms leave their running statistics alone.

    They normalise as in train mode. Other buffers that a pass changes are not covered, nor the modules that a function
    calls, unless it is a method or a partial call of a module. Nothing is copied, unlike in
    :mod:`elle_fast.recompute`, whose second pass has to see the buffers of the first.
    """
    module = module_of(model) if when else None
    changes = [] if module is None else [each for one in module.modules() if (each := _change(one)) is not None]
    before = [getattr(norm, name) for norm, name, _ in changes]
    for norm, name, value in changes:
        setattr(norm, name, value)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not when):
            yield
    finally:
        for (norm, name, _), value in zip(changes, before, strict=True):
            setattr(norm, name, value)


def _change(module: nn.Module) -> tuple[nn.Module, str, Any] | None:
    """What keeps a module's running statistics as they are: an attribute, and its value meanwhile."""
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return module, "momentum", 0.0  # its forward pass takes them whatever the flag says
    if isinstance(module, _BatchNorm) and module.track_running_stats:
        return module, "track_running_stats", False
    return None
