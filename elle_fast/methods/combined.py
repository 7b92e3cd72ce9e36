"""E_lin added to a training loss that is not a cross-entropy at one point."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from elle_fast import ELLELoss, functional
from elle_fast.adaptive import weighted_loss
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Criterion


class PlusELLE(ELLELoss):
    """``base + lam * E_lin`` (the ELLE paper, section 4.5 and appendix B.13): ELLE on top of GAT or TRADES.

    The triplets have a forward pass of their own. ``stats["ce"]`` is the base's cross-entropy.

    Args:
        base: the criterion that E_lin is added to.
        eps, lam, options: of :class:`~elle_fast.ELLELoss`; those of the attack and ``forward`` are the base's matter.
    """

    def __init__(self, base: Criterion, eps: float, lam: float, **options: Any) -> None:
        super().__init__(eps, lam, attack="none", **options)
        self.base = base

    def compute(
        self, model: Model, x: Tensor, target: Tensor, x_adv: Tensor | None = None, *, kind: str = "full"
    ) -> Tensor:
        """The loss of a checked batch in a step of one kind."""
        if x_adv is not None:
            raise ValueError("x_adv: expected None, as the base makes its own attack, got points")
        base: Tensor = self.base(model, x, target)
        inner, seed = unwrapped(model), functional.draw_seed(x.device, self.generator)
        offset = self._first_sample(x.shape[0])
        points, alpha = self._pack(inner, x, target, None, None, seed=seed, sample_offset=offset)
        with torch.no_grad() if kind == "light" else nullcontext():
            output = self._forward(inner, points, target, alpha, [points.shape[0]])
            e_lin = functional.local_linearity(output, target, alpha, **self._linearity, backend=self.backend)
        lam = self._weight(output.device)
        loss = weighted_loss(base, e_lin, lam, self.backend)
        if self.controller is not None and self.lagged and self.training:
            self.controller.update(e_lin, self.backend)
        self._record(loss, self.base.stats["ce"], e_lin, lam, self.base.output)
        return loss
