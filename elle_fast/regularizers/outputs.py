"""What the regularisers of the model's outputs share: the call, the logits at both points, and their checks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.models import Model
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import check_call, given


class OutputRegularizer(nn.Module):
    """Base class of regularisers that compare the logits at x with those at an attack's point.

    They cost 2 forward passes (one less with ``logits``, and with ``logits_adv``) and an ordinary backward through
    both: 6 units (5 and 4).
    """

    def from_logits(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The value from logits that are there already, 0-dim, ``>= 0``, differentiable by both.

        For an attack guided by the same term, or a step that holds one of the two fixed: no model is called, nothing is
        detached, and either may be without a graph.

        Args:
            logits: floating ``[B, C]`` with ``B >= 1``, at x.
            logits_adv: the same shape, at the attack's points.
        """
        checks.logits(logits, None)
        checks.logits(logits_adv, logits.shape[0], "logits_adv")
        if logits.shape[0] == 0:
            raise ValueError(f"logits: expected at least one row, got {checks.describe(logits)}")
        if logits_adv.shape != logits.shape or logits_adv.device != logits.device:
            raise ValueError(
                f"logits_adv: expected the shape and device of logits, {checks.describe(logits)}, "
                f"got {checks.describe(logits_adv)}"
            )
        return self._value(widen(logits), widen(logits_adv))

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        logits: Tensor | None = None,
        logits_adv: Tensor | None = None,
    ) -> Tensor:
        """The value for one batch.

        Args:
            model, x, target: see :mod:`elle_fast.regularizers`. The value does not depend on ``target``.
            x_adv: the attack's points, shaped as x. There is no default: the attack is the training method's.
            logits: the model's output at x, ``[B, C]``, with its graph, if the training step has it already.
            logits_adv: the same at ``x_adv``.
        """
        check_call(x, target, x_adv)
        if x_adv is None:
            raise ValueError(f"x_adv: expected the points of an attack for {type(self).__name__}, got None")
        return self.from_logits(_logits("logits", logits, model, x), _logits("logits_adv", logits_adv, model, x_adv))

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The formula, for checked logits in float32 or float64."""
        raise NotImplementedError


def _logits(name: str, value: Any, model: Model, points: Tensor) -> Tensor:
    """The model's logits at the points, from the training step (``value``) if it has them."""
    if value is None:
        return checks.logits(model(points), points.shape[0], attacks.MODEL_OUTPUT)
    logits = checks.logits(value, points.shape[0], name)
    return given(name, logits, logits.shape, " (from_logits takes others)") if torch.is_grad_enabled() else logits
