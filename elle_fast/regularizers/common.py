"""What the regularisers share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_fast._core import checks


def given(name: str, value: Any, shape: torch.Size, hint: str = ", as losses_and_gradient returns") -> Tensor:
    """Check what the training step has computed already. Without its graph, part of the gradient would be missing."""
    expected = f"{name}: expected a floating-point tensor {list(shape)} with its graph{hint}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{expected}, got {checks.describe(value)}")
    if value.shape != shape or not value.requires_grad:
        graph = "" if value.requires_grad else ", which requires no grad"
        raise ValueError(f"{expected}, got {checks.describe(value)}{graph}")
    return value
