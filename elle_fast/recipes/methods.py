"""Training methods by name: each is a criterion ``(model, x, target) -> loss`` with ``stats``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, attacks
from elle_fast.ops import checks
from elle_fast.triplets import unwrapped

NAMES = ("fgsm", "rs-fgsm", "n-fgsm", "pgd", "elle", "elle-a", "n-fgsm+elle-a")
REGULARISED = ("elle", "elle-a", "n-fgsm+elle-a")
# Methods whose attack takes its gradient at the clean inputs; the others begin at a random point.
CLEAN_START = ("fgsm", "elle", "elle-a")
# Methods whose points stay in the image range by definition. FGSM and Algorithm 1 of the ELLE paper do not clamp, nor
# does the authors' code for CIFAR.
CLAMPED = ("rs-fgsm", "n-fgsm", "pgd", "n-fgsm+elle-a")

Attack = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class AdversarialLoss(nn.Module):
    """Plain adversarial training: the mean cross-entropy at the attack's points."""

    def __init__(self, attack: Attack) -> None:
        super().__init__()
        self.attack = attack
        self.stats: dict[str, Tensor] = {}

    def forward(self, model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        # The wrapper is for the pass that has a backward; it would bring the processes together at each attack step.
        loss = F.cross_entropy(model(self.attack(unwrapped(model), x, target)), target)
        self.stats = {"loss": loss.detach(), "ce": loss.detach()}
        return loss


def build(
    method: str, *, eps: float, lam: float | None, bounds: tuple[float, float] | None, **levers: Any
) -> AdversarialLoss | ELLELoss:
    """The criterion of a method.

    Args:
        method: one of :data:`NAMES`.
        eps: radius of the linf ball, in units of the inputs.
        lam: lam of ``elle``, lam_max of ``elle-a`` and ``n-fgsm+elle-a``; ``None`` for the others.
        bounds: range of the inputs, to which every point is clamped; ``None`` clamps nothing.
        levers: further options of :class:`~elle_fast.ELLELoss`, for the methods that are built on it.
    """
    checks.choice("method", method, NAMES)
    if method in REGULARISED:
        weight = checks.real("lam", lam, low=0)
        attack = "n-fgsm" if method == "n-fgsm+elle-a" else "fgsm"
        return ELLELoss(eps, weight, adaptive=method != "elle", attack=attack, bounds=bounds, **levers)
    for name, value in levers.items():
        raise ValueError(f"{name}: expected its default beside method {method!r}, which has no E_lin, got {value!r}")
    plain = {"fgsm": attacks.fgsm, "rs-fgsm": attacks.rs_fgsm, "n-fgsm": attacks.n_fgsm, "pgd": attacks.pgd}
    return AdversarialLoss(partial(plain[method], eps=checks.real("eps", eps, low=0), bounds=bounds))
