"""GAT: the probabilities should change little between x and the attack's point."""

from __future__ import annotations

from torch import Tensor

from elle_fast.regularizers.outputs import OutputRegularizer


class GAT(OutputRegularizer):
    r"""Guided adversarial training (Sriramanan et al. 2020, arXiv 2011.14969; the ELLE paper, section 3.3).

    .. math::
        mean_i \|softmax f(x_i) - softmax f(x_{adv,i})\|_2^2

    The value is in ``[0, 2]``. Its authors weigh it with 10, and add it to the cross-entropy at x. Their attack is one
    step up the cross-entropy plus, in every other training step, this very term with the same weight, from x plus a
    Bernoulli noise of half of eps: :meth:`from_logits` is for it.
    """

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        change = logits.softmax(dim=1) - logits_adv.softmax(dim=1)
        return change.square().sum(dim=1).mean()
