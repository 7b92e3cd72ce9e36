"""Stands in for ``elle_fast.step.TrainingStep`` until that is there: the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class TrainingStep:
    """Clear the gradients, loss, backward, optimiser."""

    def __init__(
        self,
        criterion: Callable[[Any, Any, Any], Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.criterion, self.model, self.optimizer, self.autocast = criterion, model, optimizer, autocast

    def __call__(self, x: Tensor, target: Tensor) -> Tensor:
        """Take one step; returns the loss, detached."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self.criterion(self.model, x, target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
