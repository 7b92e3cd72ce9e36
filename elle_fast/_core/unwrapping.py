"""What a model is to the rest of the package, and the module inside a wrapper of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Model = Callable[[Tensor], Any]


def unwrapped(model: Model) -> Model:
    """The module inside DistributedDataParallel, for all forward passes of a step but one.

    Each forward pass through the wrapper copies rank 0's buffers over the others' in place, which a second one would do
    to buffers that the graph of the previous one needs; and the wrapper does not support ``torch.autograd.grad``.
    Gradients are reduced all the same, once, when all passes through the parameters have added to them.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's
    return inner.module if isinstance(inner, DistributedDataParallel) else model
