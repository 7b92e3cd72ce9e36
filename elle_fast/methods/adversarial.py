"""Plain adversarial training: the cross-entropy at the points of an attack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core.unwrapping import Model
from elle_fast.methods.base import WITHOUT_WEIGHT, Bounds, Criterion, Method
from elle_fast.own_attack import own_points


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
        logits = model(attack(inner, x, target, self.eps, bounds=self.bounds))
        return self._record(F.cross_entropy(logits, target), logits)


def _single(about: str, source: str, attack: Callable[..., Tensor], *, clamped: bool = True) -> Method:
    return Method(about, source, "2F 1G 1B", 5, partial(AdversarialLoss, attack), clamped=clamped)


ROWS = {
    "fgsm": _single("one step of eps from x", "1412.6572", attacks.fgsm, clamped=False),
    "rs-fgsm": _single("Fast AT: 1.25 eps from a uniform start, projected", "2001.03994", attacks.rs_fgsm),
    "n-fgsm": _single("eps from a uniform start in 2 eps, not projected", "2202.01181", attacks.n_fgsm),
    "zero-grad": _single("RS-FGSM with 2 eps, without the smallest gradients", "2103.15476", attacks.zero_grad),
    "pgd-at": Method(
        "10 steps of eps / 4 from a uniform start",
        "1706.06083",
        "11F 10G 1B",
        23,
        partial(AdversarialLoss, attacks.pgd),
    ),
}
