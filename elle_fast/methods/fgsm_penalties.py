"""FGSM with a penalty: GradAlign, CURE and LLR, local linearity by double backpropagation, and AdvLC.

The attack's gradient at x also serves the penalty where that needs one. Formulas and sources of the penalties are with
:mod:`elle_fast.regularizers`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks, regularizers
from elle_fast._core.unwrapping import Model, output_at, unwrapped
from elle_fast.methods.base import Bounds, Method, Penalized
from elle_fast.regularizers import losses_and_gradient


class GradAlign(Penalized):
    """FGSM with :class:`elle_fast.regularizers.GradAlign`, whose first gradient, detached, is the attack's."""

    _fixed = ("regularizer",)

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.GradAlign(eps)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        grad = attacks.input_gradient(inner, x, target)
        logits_adv = model(self._ascended(x, grad))
        penalty = self.regularizer(inner, x, target, grad=grad)
        return self._sum(F.cross_entropy(logits_adv, target), penalty, logits_adv)


class CURE(Penalized):
    """FGSM with :class:`elle_fast.regularizers.CURE` between x and x_fgsm: two forward passes in all."""

    regularizer = regularizers.CURE()

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        outputs: list[Any] = []

        def kept(points: Tensor) -> Any:
            outputs.append(inner(points))
            return outputs[-1]

        _, grad = losses_and_gradient(model, x, target)
        x_adv = self._ascended(x, grad)
        losses_adv, grad_adv = losses_and_gradient(kept, x_adv, target)
        penalty = self.regularizer(inner, x, target, x_adv, grad=grad, grad_adv=grad_adv)
        return self._sum(losses_adv.mean(), penalty, outputs[0])


class LLR(Penalized):
    """FGSM with :class:`elle_fast.regularizers.LLR` at a random point of the ball."""

    _fixed = ("regularizer",)

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.LLR(eps)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        losses, grad = losses_and_gradient(model, x, target)
        logits_adv = inner(self._ascended(x, grad))
        penalty = self.regularizer(inner, x, target, losses=losses, grad=grad)
        return self._sum(F.cross_entropy(logits_adv, target), penalty, logits_adv)


class AdvLC(Penalized):
    """FGSM with :class:`elle_fast.regularizers.AdvLC`, single-step (Li and Spratling 2023, arXiv 2212.04985).

    The attack's gradient comes from the pass that the penalty needs at x anyway.
    """

    regularizer = regularizers.AdvLC()

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        point = attacks.leaf(x)
        logits = output_at(unwrapped(model, ddp=True), point)
        loss = attacks.sample_losses(logits, target, None, x.shape[0]).sum()
        (grad,) = torch.autograd.grad(loss, point, retain_graph=True)
        logits_adv = inner(self._ascended(x, grad))
        penalty = self.regularizer.from_logits(logits, logits_adv)
        return self._sum(F.cross_entropy(logits_adv, target), penalty, logits_adv)


def _row(about: str, source: str, passes: str, units: float, make: type[Penalized], *, clamped: bool = False) -> Method:
    return Method(f"FGSM + lam {about}", source, passes, units, make, ("lam",), clamped)


ROWS = {
    "advlc": _row("largest tenth of the changes of logits", "2212.04985", "2F 1G 2B", 7, AdvLC, clamped=True),
    "gradalign": _row("misalignment of the gradients at two points", "2007.02617", "3F 2G 1B D", 11, GradAlign),
    "cure": _row("change of the gradient between x and x_fgsm", "1811.09716", "2F 2G D", 12, CURE),
    "llr": _row("squared error of the first-order expansion", "1907.02610", "3F 1G 2B D", 12, LLR),
}
