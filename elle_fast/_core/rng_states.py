"""The states of torch's default generators, of the CPU and of a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor


def read(device: torch.device | None) -> list[Tensor]:
    """The states now; without a device none, as they are out of reach."""
    return [get() for get, _ in _generators(device)]


def write(device: torch.device | None, states: Sequence[Tensor]) -> None:
    """Put states back that :func:`read` has returned."""
    for (_, put), state in zip(_generators(device), states, strict=True):
        put(state)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether a state has changed."""
    # They lie on the host, but torch.equal would count as a wait for a device.
    return ctypes.string_at(one.data_ptr(), one.numel()) != ctypes.string_at(other.data_ptr(), other.numel())


def _generators(device: torch.device | None) -> list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]]:
    """How the states of the default generators of the CPU and of the device are read and set."""
    if device is None:
        return []
    found: list[tuple[Callable[[], Tensor], Callable[[Tensor], None]]] = [(torch.get_rng_state, torch.set_rng_state)]
    module: Any = None if device.type == "cpu" else getattr(torch, device.type, None)
    if device.type == "mps":
        found.append((module.get_rng_state, module.set_rng_state))
    elif hasattr(module, "get_rng_state"):
        found.append((partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)))
    return found
