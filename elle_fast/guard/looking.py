"""Passes that only look at the model: what the training draws stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from elle_fast._core import rng_states


@contextmanager
def undisturbed_draws(device: torch.device) -> Iterator[None]:
    """What is drawn from torch's generators inside, as by dropout, is drawn again by the training."""
    states = rng_states.read(device)
    try:
        yield
    finally:
        rng_states.write(device, states)
