"""FGSM with a penalty: GradAlign, CURE and LLR, local linearity by double backpropagation.

The attack's gradient at x also serves the penalty where that needs one. Formulas and sources of the penalties are with
:mod:`elle_fast.regularizers`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
        return self._sum(model, self._ce(logits_adv, target), penalty, logits_adv)


class CURE(Penalized):
    """The clean loss and :class:`elle_fast.regularizers.CURE`, without an attack (Moosavi-Dezfooli et al. 2019).

    Their code trains a model further that was trained as usual; ``eps`` and ``bounds`` have no effect.
    """

    _fixed = ("regularizer",)

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__(eps, lam, bounds)
        self.regularizer = regularizers.CURE()

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        logits = self._logits(output_at(model, x), target)
        return self._sum(model, self._ce(logits, target), self.regularizer(inner, x, target), logits)


class CUREFGSM(Penalized):
    """FGSM with the ELLE authors' form of CURE, between x and x_fgsm: two forward passes in all."""

    _fixed = ("regularizer",)

    def __init__(self, eps: float, lam: float, bounds: Bounds = None, **options: Any) -> None:
        super().__init__(eps, lam, bounds, **options)
        self.regularizer = regularizers.CURE(form="elle")

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        outputs: list[Any] = []
        trained = unwrapped(model, ddp=True)

        def kept(points: Tensor) -> Any:
            outputs.append(trained(points))
            return outputs[-1]

        grad = attacks.input_gradient(inner, x, target)
        x_adv = self._ascended(x, grad)
        _, grad_adv = losses_and_gradient(kept, x_adv, target)
        penalty = self.regularizer(inner, x, target, x_adv, grad=grad, grad_adv=grad_adv)
        return self._sum(model, self._ce(outputs[0], target), penalty, outputs[0])


class LLR(Penalized):
    """FGSM with :class:`elle_fast.regularizers.LLR` between two random points of the ball (the ELLE authors' code)."""

    _fixed = ("regularizer",)

    def __init__(self, eps: float, lam: float, bounds: Bounds = None, **options: Any) -> None:
        super().__init__(eps, lam, bounds, **options)
        self.regularizer = regularizers.LLR(eps, expand_at="noise")

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        logits_adv = model(self._ascended(x, attacks.input_gradient(inner, x, target)))
        return self._sum(model, self._ce(logits_adv, target), self.regularizer(inner, x, target), logits_adv)


_ITSELF = {"elle": "it is a regulariser of local linearity itself"}


def _row(about: str, source: str, passes: str, units: float, make: type[Penalized], **row: Any) -> Method:
    return Method(f"FGSM + lam {about}", source, passes, units, make, ("lam",), **row)


def _adaptive(about: str, passes: str, units: float, make: type[Penalized]) -> Method:
    """In the form of the ELLE paper's comparison, whose weights are switched on as ELLE-A's is."""
    made = partial(make, adaptive=True)
    return Method(f"FGSM + lam {about}, adaptive", "2401.11618", passes, units, made, ("lam",), "none", refuses=_ITSELF)


_ABOUT_CURE = "clean loss + lam change of the gradient"
_MISALIGNED = "misalignment of the gradients at two points"
_OF_CURE = {**_ITSELF, "advlc": "it has no adversarial points"}
ROWS = {
    "gradalign": _row(_MISALIGNED, "2007.02617", "3F 2G 1B D", 11, GradAlign, clamp="none", refuses=_ITSELF),
    "cure": Method(_ABOUT_CURE, "1811.09716", "3F 2G 1B D", 15, CURE, ("lam",), "none", refuses=_OF_CURE),
    "cure-fgsm": _adaptive("|change of gradient to x_fgsm|^2", "2F 2G D", 8, CUREFGSM),
    "llr": _adaptive("squared first-order error", "4F 2G 2B D", 14, LLR),
}
