"""Warnings at the line of a user, not at one of this package or of a library that called it."""

from __future__ import annotations

import sys
import warnings

# Whose frames are passed: this package, torch, the loops that have an adapter, and what these call through.
_PASSED = {
    "elle_fast",
    "torch",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "transformers",
    "accelerate",
    "timm",
    "contextlib",
    "functools",
    "threading",
}


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of these; at the caller's own where there is none."""
    frame, level = sys._getframe(1), 2
    while frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED:
        if frame.f_back is None:
            level = 2
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
