"""Adversarial vertex mixup with one attack step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import ELLELoss, attacks
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Criterion, within

GAMMA, SMOOTHING_CLEAN, SMOOTHING_VERTEX = 2.0, 1.0, 0.1


class AdvMixUpSingle(Criterion):
    r"""Single-step adversarial vertex mixup (Lee et al. 2020, arXiv 2003.02484; the ELLE paper, appendix B.13).

    With delta one step of eps from a uniform start in the eps ball, projected back, and beta from U[0, 1] per sample,

    .. math::
        x_v = x + 2 \delta, \quad \hat x = \beta x + (1 - \beta) x_v, \quad
        \hat y = \beta \phi(y, 1) + (1 - \beta) \phi(y, 0.1)

    where phi(y, s) has probability s at y and shares the rest among the other classes. The loss is the mean
    cross-entropy of f(x^) to the probabilities y^. x^ is within 2 eps of x.

    Args:
        eps: radius of the linf ball, in units of x.
        bounds: range to which x + delta and x_v are clamped; ``None`` clamps nothing.
        elle: adds E_lin, of which y^ is the target too; takes x^ as x_adv.
    """

    def __init__(self, eps: float, bounds: Bounds = None, elle: ELLELoss | None = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.bounds = checks.bounds(bounds)
        self.elle = elle

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim. ``target`` is int64 ``[B]``."""
        attacks.check_batch(x, target, None)
        if target.dim() != 1:
            raise ValueError(f"target: expected int64 class indices [{x.shape[0]}], got {checks.describe(target)}")
        classes = 0

        def losses(output: Tensor, target: Tensor) -> Tensor:
            nonlocal classes
            classes = output.shape[-1]
            return attacks.sample_losses(output, target, None, x.shape[0])

        inner = unwrapped(model)
        x_adv = attacks.rs_fgsm(inner, x, target, self.eps, step_size=self.eps, bounds=self.bounds, loss_fn=losses)
        vertex = within(x + GAMMA * (x_adv - x), self.bounds)
        beta = torch.rand(x.shape[0], device=x.device, dtype=x.dtype)
        mixed = vertex + beta.view(-1, *[1] * (x.dim() - 1)) * (x - vertex)
        soft = smoothed(target, beta * SMOOTHING_CLEAN + (1 - beta) * SMOOTHING_VERTEX, classes)
        if self.elle is not None:
            loss: Tensor = self.elle(model, x, soft, x_adv=mixed)
            self.stats, self.output = self.elle.stats, self.elle.output
            return loss
        logits = model(mixed)
        loss = F.cross_entropy(logits, soft)
        return self._record(loss, output=logits, ce=loss)


def smoothed(target: Tensor, probability: Tensor, classes: int) -> Tensor:
    """``[B, classes]``: ``probability [B]`` at the target, and what is left in equal parts at the others.

    It is linear in the probability, so that a mixture of smoothed targets is the target of the mixed probability.
    """
    rest = (1 - probability) / max(1, classes - 1)
    return rest[:, None].repeat(1, classes).scatter_(1, target[:, None], probability[:, None])
