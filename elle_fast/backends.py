"""The only place that chooses a backend.

A backend is a file: ``elle_fast/ops/<op>/<backend>.py`` holds the functions named after the op. Another backend joins
by an entry in :data:`BACKENDS` that says which devices it serves and, if it cannot run here, why not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elle_fast.ops import checks
from elle_fast.ops.elle_loss import reference as elle_loss_reference
from elle_fast.ops.pack_points import reference as pack_points_reference


@dataclass(frozen=True)
class Backend:
    """One implementation of both ops."""

    runs_on: str
    functions: dict[str, Callable[..., Any]]
    why_not: Callable[[], str | None]  # None if it can run on this machine, else what is missing and how to get it


BACKENDS: dict[str, Backend] = {
    "reference": Backend(
        runs_on="any device torch runs on",
        functions={
            "pack_points": pack_points_reference.pack_points,
            "random_start": pack_points_reference.random_start,
            "elle_loss": elle_loss_reference.elle_loss,
            "local_linearity": elle_loss_reference.local_linearity,
        },
        why_not=lambda: None,
    ),
}


def check(backend: str) -> str:
    """Return ``backend`` if it is ``"auto"`` or a backend that can run here.

    Raises:
        TypeError: if it is not a string.
        ValueError: if no backend has that name.
        RuntimeError: if it cannot run on this machine; the message says what is missing.
    """
    checks.choice("backend", backend, ("auto", *BACKENDS))
    if backend != "auto" and (reason := BACKENDS[backend].why_not()) is not None:
        raise RuntimeError(f"backend: {backend!r} is not available: {reason}")
    return backend


def function(op: str, backend: str, device: torch.device) -> Callable[..., Any]:
    """The function of ``op`` that ``backend`` has for tensors on ``device``; ``"auto"`` takes the fastest there is."""
    del device  # one backend serves every device so far
    name = check(backend)
    return BACKENDS["reference" if name == "auto" else name].functions[op]
