"""Standard training, and adversarial training: the cross-entropy at x, and at the points of an attack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from elle_fast import attacks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.loss import ELLELoss
from elle_fast.methods.base import NOT_SINGLE_STEP, WITHOUT_WEIGHT, Bounds, Criterion, Method
from elle_fast.own_attack import own_points
from elle_fast.ranges import ANY


class AdversarialLoss(Criterion):
    """The mean cross-entropy at the points of ``attack(model, x, target, eps, bounds=bounds)``.

    Args:
        attack: of :mod:`elle_fast.attacks`, or one of your own that is called in the same way.
    """

    _elsewhere = WITHOUT_WEIGHT

    def __init__(self, attack: Callable[..., Tensor], eps: float, bounds: Bounds = None) -> None:
        super().__init__(eps, bounds)
        self.attack = attack

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        ours = isinstance(self.attack, attacks.SingleStep) or self.attack is attacks.pgd  # leaves no trace
        attack = self.attack if ours else partial(own_points, self.attack)
        bounds = self.bounds or ANY if ours else self.bounds  # what x is has been looked at
        logits = model(attack(inner, x, target, self.eps, bounds=bounds))
        return self._record(self._ce(logits, target), logits)


class Plain(Criterion):
    """Standard training: the mean cross-entropy at x. ``eps`` and ``bounds`` have no effect."""

    _elsewhere = WITHOUT_WEIGHT

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        logits = self._logits(output_at(model, x), target)
        return self._record(self._ce(logits, target), logits)


def _single(name: str, about: str, source: str, **row: Any) -> Method:
    make, with_elle = partial(AdversarialLoss, attacks.SINGLE_STEP[name]), partial(ELLELoss, attack=name)
    return Method(about, source, "2F 1G 1B", 5, make, with_elle=with_elle, **row)


_OF_FGSM = {"elle": "FGSM with E_lin is 'elle' or 'elle-a'"}
ROWS = {
    "plain": Method(
        "standard training",
        "-",
        "1F 1B",
        3,
        Plain,
        clamp="none",
        refuses={"advlc": "it has no adversarial points"},
        with_elle=partial(ELLELoss, attack="none"),
    ),
    "fgsm": _single("fgsm", "one step of eps from x", "1412.6572", clamp="none", refuses=_OF_FGSM),
    "rs-fgsm": _single("rs-fgsm", "Fast AT: 1.25 eps from a uniform start, projected", "2001.03994"),
    "rs-fgsm-unprojected": _single(
        "rs-fgsm-unprojected",
        "not projected: FastAT Benchmark's attack for ELLE",
        "2001.03994",
    ),
    "n-fgsm": _single("n-fgsm", "eps from a uniform start in 2 eps, not projected", "2202.01181"),
    "zero-grad": _single("zero-grad", "RS-FGSM with 2 eps, without the smallest gradients", "2103.15476"),
    "pgd-at": Method(
        "10 steps of eps / 4 from a uniform start",
        "1706.06083",
        "11F 10G 1B",
        23,
        partial(AdversarialLoss, attacks.pgd),
        refuses={"elle": NOT_SINGLE_STEP},
    ),
}
