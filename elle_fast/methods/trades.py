"""TRADES with one attack step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast.linearity import Model, unwrapped
from elle_fast.methods.base import Bounds, Criterion, projected

# Standard deviation of the noise that the attack begins with: at x itself the divergence has no gradient.
_START = 1e-3


class TradesSingle(Criterion):
    r"""Single-step TRADES (Zhang et al. 2019, arXiv 1901.08573; the ELLE paper, appendix B.13).

    .. math::
        mean_i\, L(f(x_i), y_i) + \beta \cdot mean_i\, KL(softmax f(x_i) \,\|\, softmax f(x_{adv,i}))

    The attack begins at x + 0.001 N(0, 1), takes one step of eps up the divergence with f(x) held fixed, and projects
    to the eps ball. f(x) is one forward pass for both. Departure from TRADES' code: the attack calls the model as it
    is, not in eval mode.

    Args:
        eps: radius of the linf ball, in units of x.
        beta: weight of the divergence, ``>= 0``.
        bounds: range to which x_adv is clamped; ``None`` clamps nothing.
    """

    def __init__(self, eps: float, beta: float, bounds: Bounds = None) -> None:
        super().__init__()
        self.eps = checks.real("eps", eps, low=0)
        self.beta = checks.real("lam", beta, low=0)
        self.bounds = checks.bounds(bounds)

    def forward(self, model: Model, x: Tensor, target: Tensor) -> Tensor:
        """The loss of one batch, 0-dim."""
        attacks.check_batch(x, target, None)
        inner = unwrapped(model)
        logits = model(x)
        start = x + _START * torch.randn_like(x)
        grad = attacks.input_gradient(inner, start, logits.detach(), _divergences)
        x_adv = projected(start + self.eps * grad.sign(), x, self.eps, self.bounds)
        logits_adv = inner(x_adv)
        ce, penalty = F.cross_entropy(logits, target), _divergences(logits_adv, logits).mean()
        return self._record(ce + self.beta * penalty, output=logits_adv, ce=ce, penalty=penalty)


def _divergences(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax logits || softmax logits_adv)`` of each row, ``[B]``."""
    log_p, log_q = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
