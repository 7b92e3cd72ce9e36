"""Passes that only look at the model: buffers and what the training draws stay as they are, and nothing is rounded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from elle_fast._core import precision, rng_states
from elle_fast._core.buffers import Buffers


@contextmanager
def looking(model: nn.Module, device: torch.device, chosen: str | None) -> Iterator[None]:
    """Inside, passes have the precision ``chosen``; what they draw, as by dropout, the training draws again.

    Buffers, as those of spectral norm, are put back, but for those of batch and instance norms: with
    :func:`~elle_fast._core.without_trace.without_trace` or in eval mode these do not change.
    """
    states, buffers = rng_states.read(device), Buffers(model, but=(_NormBase,))
    try:
        with in_precision(model, chosen), precision.around(chosen, device):
            yield
    finally:
        buffers.restore()
        rng_states.write(device, states)


@contextmanager
def in_precision(model: nn.Module, chosen: str | None) -> Iterator[None]:
    """With a precision ``chosen``, inside, a model that Accelerate has prepared casts nothing by itself.

    Accelerate puts autocast into the forward pass of the module, out of reach of one around it, and keeps the module's
    own as ``_original_forward``.
    """
    with ExitStack() as stack:
        for module in model.modules() if chosen is not None else ():
            own: dict[str, Any] = vars(module)
            if "_original_forward" in own and "forward" in own:
                stack.callback(own.__setitem__, "forward", own["forward"])
                own["forward"] = own["_original_forward"]
        yield
