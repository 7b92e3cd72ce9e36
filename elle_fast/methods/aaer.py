"""AAER: samples whose loss an attack lowered must not change the classifier's output more than the others do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.unwrapping import Model
from elle_fast.methods.base import Bounds, Method, Penalized
from elle_fast.ops.elle_loss.reference import row_losses, widen
from elle_fast.ranges import ANY


class AAER(Penalized):
    r"""Abnormal adversarial examples regularisation (Lin et al. 2023, arXiv 2404.08154, section 3.3).

    With x_0 the start of a single-step attack and x_adv its point, a sample is abnormal if its cross-entropy L is
    higher at x_0. Of the n abnormal ones of a batch of B, and the others,

    .. math::
        mean_i\, L(x_{adv,i}) + \frac{n}{B} \Big( w \, mean_{abnormal} (L(x_0) - L(x_{adv}))
        + lam \, \max(0, mean_{abnormal} \|f(x_{adv}) - f(x_0)\|_2^2 - mean_{others} \|f(x_{adv}) - f(x_0)\|_2^2) \Big)

    where what is known of x_0, and the mean over the others, is held fixed; a batch without an abnormal sample, or
    without any other, has the first term only. f(x_0) is what the attack computes anyway.

    The authors' code calls lam ``lamda3`` and w ``lamda2``, and holds L(x_adv) fixed too in the term of w, which so
    changes the loss that is logged but no gradient, whatever ``lamda2`` is. Hence w is 0 by default. In the formula as
    printed, where that term has a gradient, w above 1 raises the loss at abnormal samples.

    Args:
        attack: one of :data:`elle_fast.attacks.SINGLE_STEP` with a random start.
        lam: weight of the change of the logits, ``>= 0``.
        ce_weight: w, ``>= 0``.
    """

    def __init__(
        self, attack: attacks.SingleStep, eps: float, lam: float, bounds: Bounds = None, *, ce_weight: float = 0.0
    ) -> None:
        super().__init__(eps, lam, bounds)
        self.attack = attack
        self.ce_weight = checks.real("ce_weight", ce_weight, low=0)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        outputs: list[Any] = []

        def kept(points: Tensor) -> Any:
            outputs.append(inner(points))
            return outputs[-1]

        x_adv = self.attack(kept, x, target, self.eps, bounds=self.bounds or ANY)
        logits_adv, before = self._logits(model(x_adv), target), outputs[0].detach()
        rise = row_losses(logits_adv, target) - row_losses(before, target)
        change = (widen(logits_adv) - widen(before)).square().sum(dim=1)
        abnormal = rise.detach() < 0
        both = abnormal.any() & ~abnormal.all()
        excess = _mean(change, abnormal) - _mean(change.detach(), ~abnormal)
        share = abnormal.to(change.dtype).mean()
        penalty = torch.where(both, share * excess.relu(), 0.0)
        ce = self._ce(logits_adv, target)
        loss = ce + self.lam * penalty
        if self.ce_weight:
            loss = loss - self.ce_weight * torch.where(both, share * _mean(rise, abnormal), 0.0)
        return self._record(loss, logits_adv, ce=ce, penalty=penalty)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of the chosen values, of which there may be none: 0 then."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)


def _row(name: str, attack: attacks.SingleStep) -> Method:
    about = f"{name} + lam (abnormal change of logits - normal)"
    return Method(about, "2404.08154", "2F 1G 1B", 5, partial(AAER, attack), takes=("lam",))


ROWS = {"rs-aaer": _row("RS-FGSM", attacks.rs_fgsm), "n-aaer": _row("N-FGSM", attacks.n_fgsm)}
