"""CollapseGuard in a training whose loop is another library's, the same for each adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast._core import checks
from elle_fast.auto import AutoLambda
from elle_fast.criterion import TrainingLoss, WeightedLoss
from elle_fast.guard import Alarm, CollapseGuard
from elle_fast.ranges import ANY

__all__ = ["Guarding", "defaults_of"]

_log = logging.getLogger("elle_fast.guard")


class Guarding:
    """The guard of a training whose model and optimiser are known late, and whose optimiser others call.

    A step of the guard is a call of the optimiser's step, by a hook of torch on it: so not the parts of accumulated
    gradients, and not what a GradScaler skips, but for fused optimisers, which it calls and which skip by themselves.
    An alarm is a line of the logger ``elle_fast.guard``, of rank 0.

    Args:
        options: of :class:`~elle_fast.CollapseGuard`, all but ``model`` and ``optimizer``.

    Raises:
        TypeError, ValueError: as CollapseGuard, at once.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        for name in ("model", "optimizer"):
            if name in options:
                raise TypeError(f"{name}: expected none, as the adapter knows it, got one")
        also = options.get("also", ())
        self.options = {**options, "also": tuple(also) if isinstance(also, Iterable) else also}
        stand_in = nn.Parameter(torch.zeros(1))
        CollapseGuard(nn.Module(), torch.optim.SGD([stand_in], 0.1), **{"eps": 0.0, "bounds": ANY, **self.options})
        self.guard: CollapseGuard | None = None
        self._criterion: TrainingLoss | None = None  # whose eps is followed
        self._state: dict[str, Any] | None = None  # of a checkpoint that was read before there was a guard
        self._batch: tuple[Tensor, Any, Mapping[str, Any] | None] | None = None
        self._hook: Any = None

    @property
    def running(self) -> bool:
        """Whether the guard sees the optimiser's steps."""
        return self._hook is not None

    def start(
        self,
        model: nn.Module,
        optimizer: Any,
        criterion: Any = None,
        *,
        also: tuple[Any, ...] = (),
        **defaults: Any,
    ) -> CollapseGuard:
        """Make the guard, with the state of a checkpoint if there is one, and look at each step from now on.

        Args:
            model: as it is trained, in its wrappers.
            optimizer: torch's, or a wrapper of it with the attribute ``optimizer``.
            criterion: one of this package's, whose eps is followed, and which goes back with the weights.
            also: what else goes back, beside ``also`` of the options.
            defaults: options, where none were given.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        if not isinstance(optimizer, torch.optim.Optimizer) or not getattr(type(optimizer).step, "hooked", False):
            raise TypeError(
                "optimizer: expected a torch.optim.Optimizer whose steps its hooks see, got "
                f"{checks.describe(optimizer) if optimizer is None else type(optimizer).__name__}"
            )
        known = isinstance(criterion, TrainingLoss)
        given = {**({"eps": criterion.eps} if known else {}), **defaults, **self.options}
        if "eps" not in given:
            raise TypeError("eps: expected the radius of the ball, in units of x, as no criterion says it, got none")
        if known and not criterion.per_sample:
            also = (criterion, *also)
        given["also"] = (*also, *self.options["also"])
        self.stop()
        self._criterion = criterion if known and "eps" not in self.options else None
        self.guard = CollapseGuard(model, optimizer, **{**given, "on_alarm": self._say})
        if self._state is not None:
            self.guard.load_state_dict(self._state)
            self._state = None
        self._hook = optimizer.register_step_post_hook(self._stepped)
        return self.guard

    def stop(self) -> None:
        """Look no longer; alarms and state stay to be read."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._batch = None

    def added(self, loss: Tensor, x: Tensor, target: Any, model_kwargs: Mapping[str, Any] | None = None) -> Tensor:
        """The loss of a batch and what the guard adds to it; the guard looks at the last batch before a step."""
        if self.guard is None or not self.running:
            return loss
        if self._criterion is not None:
            self.guard.eps = self._criterion.eps  # as in a warm-up
        self._batch = x, target, model_kwargs
        penalty = self.guard.penalty(*self._batch)
        return loss + penalty if isinstance(penalty, Tensor) else loss

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        batch, self._batch = self._batch, None
        if batch is not None and self.guard is not None:
            self.guard.step(*batch)

    def _say(self, alarm: Alarm) -> None:
        if not (dist.is_available() and dist.is_initialized() and dist.get_rank() > 0):
            _log.warning(alarm.line(self.options.get("action", "elle")))
        if self.options.get("on_alarm") is not None:
            self.options["on_alarm"](alarm)

    @property
    def alarms(self) -> list[Alarm]:
        """Those so far."""
        return [] if self.guard is None else list(self.guard.alarms)

    def state_dict(self) -> dict[str, Any]:
        """The guard's; empty before there is one."""
        if self._state is not None or self.guard is None:
            return self._state or {}
        return self.guard.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave, at once or when there is a guard; an empty one changes nothing."""
        if not state:
            return
        if self.running and self.guard is not None:
            self.guard.load_state_dict(state)
        else:
            self._state = state


def defaults_of(criterion: TrainingLoss) -> dict[str, Any]:
    """A guard's options that a criterion has: so it looks at the points that the criterion trains on.

    For a guard of the model that the criterion is called with.
    """
    core = criterion.core  # of AWP and AdvLC, what they are around
    linearity = getattr(core, "linearity", None)
    if linearity is None:
        return {"bounds": getattr(core, "bounds", None) or ANY}
    packing, options = linearity.packing, linearity.options
    found = {name: getattr(packing, name) for name in ("norm", "mean", "std")}
    found |= {name: getattr(linearity, name) for name in ("logits", "loss_fn")}
    if linearity.triplet_precision is not None:
        found["triplet_precision"] = linearity.triplet_precision
    # The guard's E_lin has the weight of another one only if it is the same.
    same = (options.points, options.of, options.penalty) == ("elle", "loss", "squared")
    if same and isinstance(core, WeightedLoss) and not isinstance(core.controller, AutoLambda) and core.lam > 0:
        found["lam"] = core.lam
    bounds = packing.bounds or getattr(core, "_attack_bounds", None)  # which it may clamp to in the attack alone
    # Without any it clamps nothing, and has asked already what x is.
    return {**found, "bounds": bounds or ANY}
