"""One training step: the only place where it is written."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast._core.options import Options

__all__ = ["TrainingStep"]


def _of_kind(name: str, value: Any, *, kind: type, none: str = "") -> Any:
    if not (isinstance(value, kind) or (none and value is None)):
        raise TypeError(f"{name}: expected {kind.__name__}{none}, got {checks.describe(value)}")
    return value


def _callable(name: str, value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {checks.describe(value)}")
    return value


def _optimizer(name: str, value: Any) -> Any:
    step = _of_kind(name, value, kind=torch.optim.Optimizer).step
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{name}: expected one whose step() needs no closure, got {type(value).__name__}; a closure of your own "
            "calls the criterion as often as the optimizer asks"
        )
    return value


def _autocast(name: str, value: Any) -> Any:
    if _of_kind(name, value, kind=torch.dtype, none=" or None") not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"{name}: expected None, torch.float16 or torch.bfloat16, got {value}")
    return value


def _measure(name: str, value: Any) -> Any:
    return None if value is None else checks.function(name, value)


def _norm(name: str, value: Any) -> float | None:
    return None if value is None else checks.real(name, value, low=0, low_allowed=False)


class TrainingStep(Options):
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
        autocast: dtype of ``torch.autocast`` around the criterion, float16 or bfloat16; ``None`` turns it off there.
        scaler: scales the loss and steps the optimiser, which it does not where a gradient is not finite.
            ``GradScaler(device, init_scale=1.0)`` does this in any precision: its scales are powers of two, so no
            other step has other bits. With ``fused=True`` of the optimiser nothing waits for the device.
        clip_grad_norm: largest 2-norm of the gradients of the optimiser's parameters, ``> 0``; ``None`` clips nothing.
        measure: ``(criterion, target) -> tensor``, called in each step once the loss is there, before the backward
            pass, without a graph and outside of ``autocast``. Attribute ``measured`` holds the last step's tensor;
            ``None`` before the first step, and without this option. The count of right answers, on the device::

                def right(criterion, target):
                    return (criterion.output.argmax(dim=1) == target).sum()

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was got.
    """

    _changeable = {  # noqa: RUF012
        "criterion": _callable,
        "model": partial(_of_kind, kind=nn.Module),
        "optimizer": _optimizer,
        "autocast": _autocast,
        "scaler": partial(_of_kind, kind=torch.amp.GradScaler, none=" or None"),
        "clip_grad_norm": _norm,
        "measure": _measure,
    }

    def __init__(
        self,
        criterion: Callable[..., Tensor],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        measure: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.criterion, self.model, self.optimizer = criterion, model, optimizer
        self.autocast, self.scaler, self.clip_grad_norm = autocast, scaler, clip_grad_norm
        self.measure = measure
        self.measured: Tensor | None = None

    def __call__(self, x: Tensor, target: Any, **options: Any) -> Tensor:
        """Take one step on a batch that the criterion takes, and return its loss, 0-dim, detached, unscaled.

        ``options`` are the criterion's, such as ``model_kwargs`` and ``x_adv``.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {checks.describe(x)}")
        self.clear()
        with self.autocast_for(x):
            loss = self.criterion(self.model, x, target, **options)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            expected = "criterion: expected a loss, a 0-dim tensor with a graph"
            if not isinstance(loss, Tensor):
                raise TypeError(f"{expected}, got {checks.describe(loss)}")
            graph = "" if loss.requires_grad else ", without a graph"
            raise ValueError(f"{expected}, got {checks.describe(loss)}{graph}")
        self.measured = self._measured(target)
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

    def _measured(self, target: Any) -> Tensor | None:
        if self.measure is None:
            return None
        with torch.no_grad():
            found = self.measure(self.criterion, target)
        if not isinstance(found, Tensor):
            raise TypeError(f"measure: expected a function that returns a tensor, got {checks.describe(found)} from it")
        return found.detach()

    def autocast_for(self, x: Tensor) -> torch.autocast:
        """The autocast that the criterion runs in."""
        return torch.autocast(x.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def clear(self) -> None:
        """Drop all gradients, and the weights that an autocast around the call cast before the optimiser moved them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # parameters that are not the optimiser's
        torch.clear_autocast_cache()
