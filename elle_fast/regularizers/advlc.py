"""AdvLC: the logits that change most between x and the attack's point should change less."""

from __future__ import annotations

from torch import Tensor

from elle_fast._core import checks
from elle_fast.regularizers.outputs import OutputRegularizer


class AdvLC(OutputRegularizer):
    r"""Adversarial logit change (Li and Spratling 2023, arXiv 2212.04985).

    .. math::
        \frac{1}{B} \sum_{(i, c) \in top} |f(x_i)_c - f(x_{adv,i})_c|

    where top are the ``max(1, round(share B C))`` largest entries of the whole ``[B, C]`` matrix, as in its authors'
    code (which rounds down): a sample may have many of them or none. Among equal entries it is torch's choice which
    are taken. Its authors weigh it with 0.3, and add it to the cross-entropy at x_adv.

    Args:
        share: the part of the entries that counts, in ``(0, 1]``; with 1 the value is the mean 1-norm of the change.
    """

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = checks.real("share", share, low=0, low_allowed=False, high=1)

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        change = (logits - logits_adv).abs().flatten()
        count = max(1, round(self.share * change.numel()))
        return change.topk(count, sorted=False).values.sum() / logits.shape[0]

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"share={self.share:g}"
