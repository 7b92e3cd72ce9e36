"""FGSM-PCO: trains on a mixture of the last epoch's point and this one's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from elle_fast._core.unwrapping import Model
from elle_fast.methods.base import Bounds, Method, logits_and_gradient
from elle_fast.methods.prior_guided import PriorGuided
from elle_fast.ops.elle_loss.reference import widen

# How much further than x_fgsm the mixture's second point is.
_BEYOND = 1.5


class PCO(PriorGuided):
    r"""FGSM-PCO (Wang et al. 2024, arXiv 2407.12443).

    With eta what is kept of a sample, g the gradient of the loss at x + eta, P the projection to the eps ball around x
    and to ``bounds``, and p_i the probability that f gives y_i at x_i + eta_i,

    .. math::
        x_{fgsm} &= P(x + \eta + eps \cdot sign(g)), \qquad \eta \leftarrow x_{fgsm} - x \\
        x_{new} &= (1 - p) (x + \eta) + p\, (x + 1.5 (x_{fgsm} - x)) \\
        loss &= mean_i\, L(f(x_{new,i}), y_i)
             + lam \cdot | d(f(x_{fgsm}), f(x + \eta)) - d(f(x_{fgsm}), f(x_{new})) |

    with the eta of before, and d the mean square over samples and classes. x_new is within 1.5 eps of x. eta begins
    with ``+- eps``, each sign with probability 1/2. As in the authors' code the gradient flows through p too.

    Departures: x + eta and x_new are within ``bounds``, which they may leave in the code. The attack's loss has no
    label smoothing, which theirs has (``label_smoothing=0.444`` for their 0.6).

    ``samples``, what is kept, and what it costs in memory: as for FGSM-EP, see :class:`PriorGuided`.

    Args:
        eps, lam, samples, bounds, aligned: those of :class:`PriorGuided`.
    """

    def __init__(self, eps: float, lam: float, samples: int, bounds: Bounds = None, *, aligned: bool = False) -> None:
        super().__init__(eps, lam, samples, bounds, decay=None, aligned=aligned)

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        prior = self._prior(model, x)
        start = self._within(x + prior.delta)
        logits, grad = logits_and_gradient(model, start, target)
        x_fgsm = self._reached(x, prior.delta, grad)
        self._remember(prior, x, x_fgsm, grad)
        p = _probability(logits, target).to(x.dtype).view(-1, *[1] * (x.dim() - 1))
        x_new = self._within((1 - p) * start + p * (x + _BEYOND * (x_fgsm - x)))
        logits_new, logits_fgsm = self._logits(inner(x_new), target), widen(inner(x_fgsm))
        change = F.mse_loss(logits_fgsm, widen(logits)) - F.mse_loss(logits_fgsm, widen(logits_new))
        return self._sum(model, self._ce(logits_new, target), change.abs(), logits_new)


def _probability(logits: Tensor, target: Tensor) -> Tensor:
    """The probability of each row's target, ``[B]``."""
    found = widen(logits).softmax(dim=1)
    if target.dim() == 1:
        return found.gather(1, target[:, None])[:, 0]
    return (found * target).sum(dim=1)


_ABOUT = "mixture of the last epoch's point and FGSM's + penalty"
ROWS = {"pco": Method(_ABOUT, "2407.12443", "3F 1G 3B", 10, PCO, ("lam", "samples"))}
