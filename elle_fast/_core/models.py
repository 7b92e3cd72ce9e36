"""What a model is to this package, and the module inside DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

# Maps a batch ``[B, ...]`` to logits ``[B, C]``, or to whatever a ``logits=`` hook or a loss of the user's own takes.
Model = Callable[[Tensor], Any]


def unwrapped(model: Model) -> Model:
    """The module inside DistributedDataParallel, for all forward passes of a step but one.

    Each forward pass through the wrapper copies rank 0's buffers over the others' in place. A second one would do that
    to buffers that the first one's graph needs; and the wrapper does not support ``torch.autograd.grad``. Gradients are
    still reduced, once, when all passes through the parameters have added to them.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's
    return inner.module if isinstance(inner, DistributedDataParallel) else model
