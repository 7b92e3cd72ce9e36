"""AdvLC: FGSM with a penalty on the logits that change most."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks, regularizers
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Criterion, within


class AdvLC(Criterion):
    """Adversarial logit change (Li and Spratling 2023, arXiv 2212.04985), single-step.

        mean_i L(f(x_adv,i), y_i) + lam * R(f(x), f(x_adv))

    with R of :class:`elle_fast.regularizers.AdvLC` and x_adv the FGSM point, whose gradient is taken from the pass that
    R needs at x anyway.

    Args:
        eps: radius of the linf ball, in units of x.
        lam: weight of R, ``>= 0``.
        bounds: range to which x_adv is clamped; ``None`` clamps nothing.
    """

    def __init__(self, eps: float, lam: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.lam = checks.real("lam", lam, low=0)
        self.bounds = checks.bounds(bounds)
        self.regularizer = regularizers.AdvLC()

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        point = x.detach().requires_grad_()
        logits = model(point)
        loss = attacks.sample_losses(logits, target, None, x.shape[0]).sum()
        (grad,) = torch.autograd.grad(loss, point, retain_graph=True)
        x_adv = within(x + self.eps * grad.sign(), self.bounds)
        logits_adv = unwrapped(model)(x_adv)
        ce = F.cross_entropy(logits_adv, target)
        penalty = self.regularizer(model, x, target, x_adv=x_adv, logits=logits, logits_adv=logits_adv)
        return self._record(ce + self.lam * penalty, output=logits_adv, ce=ce, penalty=penalty)
