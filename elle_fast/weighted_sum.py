"""``ce + lam * E_lin``, in which an :class:`AdaptiveLambda` first takes in the step."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast.adaptive import AdaptiveLambda
from elle_fast.ops.elle_loss import op, reference
from elle_fast.ops.elle_loss.validation import Linearity


def weighted_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor | AdaptiveLambda,
    options: Linearity,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`elle_fast.functional.elle_loss`, with its options as a :class:`Linearity`."""
    if not isinstance(lam, AdaptiveLambda):
        return op.elle_loss(logits, target, alpha, lam, options, backend)
    lam.check_options(options)
    state = lam.state(logits.device)
    if lam.fused and state[3].dtype == torch.float64:
        return op.elle_loss(logits, target, alpha, 0.0, options, backend, state, lam.numbers)
    # E_lin has to be averaged over the ranks before lam is known; or the kernels do not take such a state or rule.
    _, ce, e_lin = op.elle_loss(logits, target, alpha, 0.0, options, backend)
    relative = reference.relative_of_logits(logits, target, alpha, options) if lam.rule == "relative" else None
    return weighted_sum(ce, e_lin, lam, backend, relative), ce, e_lin


def weighted_sum(
    ce: Tensor,
    e_lin: Tensor,
    lam: float | Tensor | AdaptiveLambda,
    backend: str = "auto",
    relative: Tensor | None = None,
) -> Tensor:
    """``ce + lam * e_lin``; an :class:`AdaptiveLambda` takes in the step first (Algorithm 1, lines 9 to 12)."""
    if isinstance(lam, AdaptiveLambda):
        lam = lam.take_in(e_lin, relative, backend)
    return reference.weighted_sum(ce, e_lin, lam)
