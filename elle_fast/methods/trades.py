"""TRADES with one attack step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast import attacks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import Method, Penalized

# Standard deviation of the noise that the attack begins with: at x itself the divergence has no gradient.
_START = 1e-3


class TradesSingle(Penalized):
    r"""Single-step TRADES (Zhang et al. 2019, arXiv 1901.08573; the ELLE paper, appendix B.13).

    .. math::
        mean_i\, L(f(x_i), y_i) + lam \cdot mean_i\, KL(softmax f(x_i) \,\|\, softmax f(x_{adv,i}))

    The attack begins at x + 0.001 N(0, 1), takes one step of eps up the divergence with f(x) held fixed, and projects
    to the eps ball. f(x) is one forward pass for both. Departure from TRADES' code: the attack calls the model as it
    is, not in eval mode.
    """

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        logits = self._logits(output_at(model, x), target)
        start = x + _START * torch.randn_like(x)
        ce = self._ce(logits, target)
        grad = attacks.input_gradient(inner, start, logits.detach(), _divergences)
        logits_adv = inner(self._projected(start + self.eps * grad.sign(), x))
        penalty = _divergences(logits_adv, logits).mean()
        return self._sum(model, ce, penalty, logits_adv)


def _divergences(logits_adv: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax logits || softmax logits_adv)`` of each row, ``[B]``."""
    log_p, log_q = F.log_softmax(logits, dim=1), F.log_softmax(logits_adv, dim=1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)


_ABOUT = "clean loss + lam KL(f(x) || f(x_adv))"
ROWS = {"trades-single": Method(_ABOUT, "1901.08573", "3F 1G 2B", 8, TradesSingle, takes=("lam",))}
