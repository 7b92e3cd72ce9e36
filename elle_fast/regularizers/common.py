"""What the regularisers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.unwrapping import module_of


def given(name: str, value: Any, shape: torch.Size, hint: str = ", as losses_and_gradient returns") -> Tensor:
    """Check what the training step has computed already. Without its graph, part of the gradient would be missing."""
    expected = f"{name}: expected a floating-point tensor {list(shape)} with its graph{hint}"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{expected}, got {checks.describe(value)}")
    if value.shape != shape or not value.requires_grad:
        graph = "" if value.requires_grad else ", which requires no grad"
        raise ValueError(f"{expected}, got {checks.describe(value)}{graph}")
    return value


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; a function that is no method of a module is left alone."""
    root = module_of(model)
    modes = [(module, module.training) for module in root.modules()] if isinstance(root, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
