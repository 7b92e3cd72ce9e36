"""Passes that only look at the model: what the training draws, and its mode, stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from elle_fast._core import rng_states


@contextmanager
def undisturbed_draws(device: torch.device) -> Iterator[None]:
    """What is drawn from torch's generators inside, as by dropout, is drawn again by the training."""
    states = rng_states.read(device)
    try:
        yield
    finally:
        rng_states.write(device, states)


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module's mode is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
