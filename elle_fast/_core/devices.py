"""What devices can do."""

from __future__ import annotations

from functools import cache

import torch


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can live on the device, which those of MPS cannot."""
    return device.type in ("cpu", "cuda", "meta") or _takes_float64(device)


@cache
def _takes_float64(device: torch.device) -> bool:
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
