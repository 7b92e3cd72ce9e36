"""FGSM with GradAlign, CURE or LLR: local linearity by double backpropagation, as the ELLE paper compares it.

The attack's gradient at x is also one of the regulariser's. Formulas and sources are with
:mod:`elle_fast.regularizers`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks, regularizers
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Criterion, Kept, within
from elle_fast.regularizers import losses_and_gradient


class _FGSM(Criterion):
    """Base class: ``mean_i L(f(x_fgsm,i), y_i) + lam * penalty``.

    Args:
        eps: radius of the linf ball, in units of x.
        lam: weight of the penalty, ``>= 0``.
        bounds: range to which x_fgsm is clamped; ``None`` clamps nothing.
    """

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.lam = checks.real("lam", lam, low=0)
        self.bounds = checks.bounds(bounds)

    def _fgsm(self, x: Tensor, grad: Tensor) -> Tensor:
        return within(x + self.eps * grad.detach().sign(), self.bounds)

    def _sum(self, output: Tensor | None, ce: Tensor, penalty: Tensor) -> Tensor:
        return self._record(ce + self.lam * penalty, output=output, ce=ce, penalty=penalty)


class GradAlign(_FGSM):
    """FGSM with :class:`elle_fast.regularizers.GradAlign`, whose first gradient, detached, is the attack's."""

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.GradAlign(eps)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        inner = unwrapped(model)
        grad = attacks.input_gradient(inner, x, target)
        logits = model(self._fgsm(x, grad))
        ce = F.cross_entropy(logits, target)
        return self._sum(logits, ce, self.regularizer(inner, x, target, grad=grad))


class CURE(_FGSM):
    """FGSM with :class:`elle_fast.regularizers.CURE` between x and x_fgsm: two forward passes in all."""

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.CURE()

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        inner = unwrapped(model)
        _, grad = losses_and_gradient(model, x, target)
        x_adv = self._fgsm(x, grad)
        seen = Kept(inner)
        losses_adv, grad_adv = losses_and_gradient(seen, x_adv, target)
        penalty = self.regularizer(inner, x, target, x_adv, grad=grad, grad_adv=grad_adv)
        return self._sum(seen.output, losses_adv.mean(), penalty)


class LLR(_FGSM):
    """FGSM with :class:`elle_fast.regularizers.LLR` at a random point of the ball."""

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.LLR(eps)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        inner = unwrapped(model)
        losses, grad = losses_and_gradient(model, x, target)
        logits = inner(self._fgsm(x, grad))
        ce = F.cross_entropy(logits, target)
        return self._sum(logits, ce, self.regularizer(inner, x, target, losses=losses, grad=grad))
