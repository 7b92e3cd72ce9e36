"""MART: what is misclassified without an attack weighs more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast._core import checks
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.methods.base import NOT_SINGLE_STEP, TAKES_CLASSES, Method, Penalized
from elle_fast.ops.elle_loss.reference import widen

# Standard deviation of the noise that the attack begins with; the number of its steps, and their size in units of eps.
_START, _STEPS, _STEP_SIZE = 1e-3, 10, 7 / 31
# In the authors' logarithms and weights.
_TINY, _MORE_THAN_1, _A_LITTLE_MORE = 1e-12, 1.0001, 1.0000001


class MART(Penalized):
    r"""Misclassification-aware adversarial training (Wang et al., ICLR 2020, section 3.3).

    With p = softmax f(x) and q = softmax f(x_adv),

    .. math::
        mean_i \big( -\log q_{i, y_i} - \log(1 - \max_{k \ne y_i} q_{i,k}) \big)
        + lam \cdot mean_i\, (1 - p_{i, y_i})\, KL(p_i \,\|\, q_i)

    The first term, the boosted cross-entropy, is ``stats["ce"]``; ``label_smoothing`` is of its first part. Gradients
    go through all of p and q. As in the authors' code 1e-12 is added inside logarithms, the ones are 1.0001 and
    1.0000001, and the attack begins at x + 0.001 N(0, 1) and takes 10 steps up the cross-entropy of 7/31 of eps (0.007
    at their 0.031), each projected to the eps ball. ``target`` is int64 ``[B]``. Departure from their code: the attack
    calls the model as it is, not in eval mode.

    Args:
        lam: weight of the second term, ``>= 0``.
    """

    def _step(self, model: Model, inner: Model, x: Tensor, target: Tensor) -> Tensor:
        if target.dim() != 1:
            raise ValueError(f"target: expected int64 class indices [{x.shape[0]}], got {checks.describe(target)}")
        logits = self._logits(output_at(model, x), target)
        start = x + _START * torch.randn_like(x)
        x_adv = self._climbed(inner, start, x, target, steps=_STEPS, step_size=_STEP_SIZE * self.eps)
        logits_adv = inner(x_adv)
        ce, label = self._ce(logits_adv, target), target[:, None]
        log_p, q = F.log_softmax(widen(logits), dim=1), F.softmax(widen(logits_adv), dim=1)
        p = log_p.exp()
        wrong = q.detach().scatter(1, label, -1.0).argmax(dim=1, keepdim=True)
        margin = -(_MORE_THAN_1 - q.gather(1, wrong) + _TINY).log().mean()
        divergence = (p * (log_p - (q + _TINY).log())).sum(dim=1)
        penalty = (divergence * (_A_LITTLE_MORE - p.gather(1, label).squeeze(1))).mean()
        return self._sum(model, ce + margin, penalty, logits_adv)


_ABOUT = "PGD-10, boosted loss + lam (1 - p) KL(f(x) || f(x_adv))"
ROWS = {
    "mart": Method(
        _ABOUT,
        "ICLR 2020",
        "12F 10G 2B",
        26,
        MART,
        takes=("lam",),
        refuses={"elle": NOT_SINGLE_STEP, "soft_targets": TAKES_CLASSES},
    )
}
