"""One training step: the only place where it is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks

__all__ = ["TrainingStep"]


class TrainingStep:
    """A training step of any criterion: clear the gradients, compute the loss, go backward, clip, and optimise.

    The gradients stay until the next call. Learning-rate schedules are yours: set the rate before a call, or step the
    schedule after it. :func:`elle_fast.capture` makes the same step a CUDA graph::

        step = elle_fast.TrainingStep(ELLELoss(eps=8/255), model, optimizer, autocast=torch.bfloat16)
        for x, y in loader:
            loss = step(x, y)

    Args:
        criterion: ``(model, x, target) -> loss``, 0-dim: ELLELoss, a training method, or a function of your own.
        model: what the criterion calls; it may be wrapped in DistributedDataParallel.
        optimizer: of the model's parameters, or of some of them.
        autocast: dtype of ``torch.autocast`` around the criterion; ``None`` turns autocast off there.
        scaler: scales the loss and steps the optimiser, which it does not where a gradient is not finite.
            ``GradScaler(device, init_scale=1.0)`` does this in any precision: its scales are powers of two, so no
            other step has other bits. With ``fused=True`` of the optimiser nothing waits for the device.
        clip_grad_norm: largest 2-norm of the gradients of the optimiser's parameters, ``> 0``; ``None`` clips nothing.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    def __init__(
        self,
        criterion: Callable[[Any, Any, Any], Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
    ) -> None:
        if not callable(criterion):
            raise TypeError(f"criterion: expected a callable, got {checks.describe(criterion)}")
        given: tuple[tuple[str, object, type, str], ...] = (
            ("model", model, nn.Module, ""),
            ("optimizer", optimizer, torch.optim.Optimizer, ""),
            ("autocast", autocast, torch.dtype, " or None"),
            ("scaler", scaler, torch.amp.GradScaler, " or None"),
        )
        for name, value, kind, none in given:
            if not (isinstance(value, kind) or (none and value is None)):
                raise TypeError(f"{name}: expected {kind.__name__}{none}, got {checks.describe(value)}")
        if clip_grad_norm is not None:
            checks.real("clip_grad_norm", clip_grad_norm, low=0, low_allowed=False)
        self.criterion, self.model, self.optimizer = criterion, model, optimizer
        self.autocast, self.scaler, self.clip_grad_norm = autocast, scaler, clip_grad_norm

    def __call__(self, x: Tensor, target: Any) -> Tensor:
        """Take one step on a batch that the criterion takes, and return its loss, 0-dim, detached, unscaled."""
        self.clear()
        with self.autocast_for(x):
            loss = self.criterion(self.model, x, target)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(trained, self.clip_grad_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def autocast_for(self, x: Tensor) -> torch.autocast:
        """The autocast that the criterion runs in."""
        return torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def clear(self) -> None:
        """Drop all gradients, and the weights that an autocast around the call cast before the optimiser moved them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # parameters that are not the optimiser's
        torch.clear_autocast_cache()
