"""NuAT: the logits of the batch should change little, and in few directions, between x and the attack's point."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast.regularizers.outputs import OutputRegularizer


class NuAT(OutputRegularizer):
    r"""Nuclear-norm adversarial training (Sriramanan et al. 2021; the ELLE paper, section 3.3).

    .. math::
        \|f(x_{adv}) - f(x)\|_* / B

    The nuclear norm, the sum of the singular values, is that of the ``[B, C]`` matrix of the batch's logits: the value
    is no mean over samples. Each process takes the norm of its own share of the batch. It grows like sqrt(B), so n
    processes give it about sqrt(n) times the weight that one process would. Its authors weigh it with a number that
    grows over the epochs from 0 to 4.5, and add it to the cross-entropy at x. Their attack is that of
    :class:`~elle_fast.regularizers.GAT`, guided by this term.

    The gradient is ``U V^T / B`` of the singular value decomposition: nothing is divided by singular values or by their
    differences, so it is finite if they are equal or 0. Where some are 0 it is one of the subgradients; where all are,
    it is 0. There is no second derivative then.

    The decomposition of ``B x C`` makes the host wait for a CUDA device, so that the step cannot be captured as a CUDA
    graph.

    Raises:
        RuntimeError: torch.linalg.LinAlgError, if the logits are not finite.
    """

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        change = logits_adv - logits
        norm: Tensor = torch.linalg.matrix_norm(change, ord="nuc")
        # Of no change at all, torch's subgradient is an arbitrary matrix of norm 1.
        return torch.where(change.detach().ne(0).any(), norm, torch.zeros_like(norm)) / change.shape[0]
