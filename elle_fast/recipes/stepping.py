"""The step of a run: eager, or replayed as CUDA graphs where its method, options and processes allow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast._core.devices import fastest_convolutions
from elle_fast._core.precision import DTYPES
from elle_fast._core.unwrapping import output_at, unwrapped
from elle_fast.criterion import TrainingLoss
from elle_fast.guard import CollapseGuard
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.guarding import guarded
from elle_fast.recipes.meter import Meter
from elle_fast.step.capture import CapturedStep, capture
from elle_fast.step.step import TrainingStep


class Step:
    """One step after the other, each measured by ``meter``.

    With ``config.capture`` the steps are those of :func:`elle_fast.capture`, once the first has been taken and eps has
    grown to what it stays at: CUDA graphs, and on the CPU the same steps as they are. By default they are so on CUDA,
    if nothing is in the way; ``remark`` says what is.

    Attributes:
        scaler: fp16's GradScaler.
        remark: a line for the log, or ``None``.

    Raises:
        ValueError: for ``config.capture`` of a run that cannot be captured, naming the reason.
    """

    def __init__(
        self,
        config: TrainConfig,
        criterion: TrainingLoss,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meter: Meter,
        device: torch.device,
        processes: int,
        guard: CollapseGuard | None = None,
    ) -> None:
        self.config, self.criterion, self.model, self.optimizer, self.meter = config, criterion, model, optimizer, meter
        self.remark: str | None = None
        dtype = DTYPES[config.precision]
        self.scaler = torch.amp.GradScaler(device.type) if dtype == torch.float16 else None
        self._options: dict[str, Any] = {"autocast": dtype, "scaler": self.scaler}
        called = clean_forward_after(criterion) if config.clean_forward else criterion
        self._eager = TrainingStep(
            guarded(called, guard),
            model,
            optimizer,
            measure=lambda _, target: meter.measure(criterion, target),
            **self._options,
        )
        self._taken: TrainingStep | CapturedStep | None = None  # the last step's
        self._to_capture = device.type == "cuda" if config.capture is None else config.capture
        if self._to_capture and (why := in_the_way(config, criterion, processes)) is not None:
            if config.capture:
                raise ValueError(f"capture: expected a run whose steps can be captured, got one where {why}")
            self._leave(why)

    def __call__(self, x: Tensor, target: Tensor, *, settled: bool, **options: Any) -> None:
        """Take one. ``settled``: whether eps is that of all later steps; ``options`` are the criterion's."""
        # Batches are of one size; those of an evaluation's attacks shrink, so that it goes without.
        with fastest_convolutions():
            if self._to_capture and settled and self._taken is self._eager:
                self._taken = self._captured(x, target)
            if self._taken is None:
                self._taken = self._eager
            self._taken(x, target, **options)
        assert self._taken.measured is not None
        self.meter.add(self._taken.measured, len(target))

    def begin_anew(self) -> None:
        """Forget the captured step: the batches that follow have another size."""
        self._taken = None

    def _captured(self, x: Tensor, target: Tensor) -> TrainingStep | CapturedStep:
        measure: Callable[..., Tensor] = self.meter.measure
        try:
            return capture(self.criterion, self.model, self.optimizer, x, target, measure=measure, **self._options)
        except (RuntimeError, TypeError, ValueError) as error:
            if self.config.capture:
                raise
            self._leave(str(error))
            return self._eager

    def _leave(self, why: str) -> None:
        self._to_capture, self.remark = False, f"steps are not captured as CUDA graphs: {why}"


def in_the_way(config: TrainConfig, criterion: TrainingLoss, processes: int) -> str | None:
    """Why the steps of a run cannot be captured, as far as it is known before the first one."""
    if config.steps_per_batch > 1:
        return f"steps_per_batch {config.steps_per_batch} takes further optimizer steps with a gradient"
    if config.momentum_cycle:
        return f"momentum_cycle {config.momentum_cycle:g} changes the momentum, a constant of a graph"
    if config.clean_forward:
        return "clean_forward adds a forward pass to the loss"
    if config.guard:
        return "the guard may add E_lin to the loss"
    if processes > 1:
        return f"{processes} processes train one model"
    return criterion.uncapturable


def clean_forward_after(criterion: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The criterion, followed by a forward pass over the clean x in the model's own mode, without a graph.

    The ELLE authors' CIFAR trainer makes one to log the clean accuracy; it moves batch norm's running statistics.
    """

    def loss_of(model: nn.Module, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss = criterion(model, x, target, **options)
        with torch.no_grad():
            output_at(unwrapped(model), x)
        return loss

    return loss_of
