"""GAT, NuAT and AdvLC: the model's output should change little between x and the attack's point."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elle_fast import attacks
from elle_fast._core import checks
from elle_fast._core.options import Options
from elle_fast._core.unwrapping import Model, output_at
from elle_fast.ops.elle_loss.reference import widen
from elle_fast.regularizers.common import given


class OutputRegularizer(Options, nn.Module):
    """Base class of regularisers that compare the logits at x with those at an attack's point.

    They cost 2 forward passes (one less with ``logits``, and with ``logits_adv``) and an ordinary backward through
    both: 6 units (5 and 4).
    """

    def from_logits(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The value from logits that are there already, 0-dim, ``>= 0``, differentiable by both.

        For an attack guided by the same term, or a step that holds one of the two fixed: no model is called, nothing is
        detached, and either may be without a graph.

        Args:
            logits: floating ``[B, C]`` with ``B >= 1``, at x.
            logits_adv: the same shape, at the attack's points.
        """
        checks.logits(logits, None)
        checks.logits(logits_adv, logits.shape[0], "logits_adv")
        if logits.shape[0] == 0:
            raise ValueError(f"logits: expected at least one row, got {checks.describe(logits)}")
        if logits_adv.shape != logits.shape or logits_adv.device != logits.device:
            raise ValueError(
                f"logits_adv: expected the shape and device of logits, {checks.describe(logits)}, "
                f"got {checks.describe(logits_adv)}"
            )
        return self._value(widen(logits), widen(logits_adv))

    def forward(
        self,
        model: Model,
        x: Tensor,
        target: Tensor,
        x_adv: Tensor | None = None,
        logits: Tensor | None = None,
        logits_adv: Tensor | None = None,
    ) -> Tensor:
        """The value for one batch.

        Args:
            model, x, target: see :mod:`elle_fast.regularizers`. The value does not depend on ``target``.
            x_adv: the attack's points, shaped as x. There is no default: the attack is the training method's.
            logits: the model's output at x, ``[B, C]``, with its graph, if the training step has it already.
            logits_adv: the same at ``x_adv``.
        """
        attacks.check_batch(x, target, x_adv=x_adv)
        if x_adv is None:
            raise ValueError(f"x_adv: expected the points of an attack for {type(self).__name__}, got None")
        return self.from_logits(_logits("logits", logits, model, x), _logits("logits_adv", logits_adv, model, x_adv))

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        """The formula, for checked logits in float32 or float64."""
        raise NotImplementedError


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


class AdvLC(OutputRegularizer):
    r"""Adversarial logit change (Li and Spratling 2023, arXiv 2212.04985).

    .. math::
        \frac{1}{B} \sum_{(i, c) \in top} |f(x_i)_c - f(x_{adv,i})_c|

    where top are the ``max(1, round(share B C))`` largest entries of the whole ``[B, C]`` matrix, as in its authors'
    code (which rounds down): a sample may have many of them or none. Among equal entries it is torch's choice which
    are taken. Its authors weigh it with 0.3 (0.4 with weight averaging), and add it to the cross-entropy at the points
    of PGD-10. In their mode with noise x is the noised point from which the attack started: pass that one.

    Args:
        share: the part of the entries that counts, in ``(0, 1]``; with 1 the value is the mean 1-norm of the change.
    """

    _changeable = {"share": partial(checks.real, low=0, low_allowed=False, high=1)}  # noqa: RUF012

    def __init__(self, share: float = 0.1) -> None:
        super().__init__()
        self.share = share

    def _value(self, logits: Tensor, logits_adv: Tensor) -> Tensor:
        change = (logits - logits_adv).abs().flatten()
        count = max(1, round(self.share * change.numel()))
        return change.topk(count, sorted=False).values.sum() / logits.shape[0]

    def extra_repr(self) -> str:
        """The options, as ``repr`` shows them."""
        return f"share={self.share:g}"


def _logits(name: str, value: Any, model: Model, points: Tensor) -> Tensor:
    """The model's logits at the points, from the training step (``value``) if it has them."""
    if value is None:
        return checks.logits(output_at(model, points), points.shape[0], attacks.MODEL_OUTPUT)
    logits = checks.logits(value, points.shape[0], name)
    return given(name, logits, logits.shape, " (from_logits takes others)") if torch.is_grad_enabled() else logits
