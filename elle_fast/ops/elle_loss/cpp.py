"""elle_loss on the CPU by the compiled extension. The kernels: csrc/cpu/elle_loss.cpp."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elle_fast.ops.elle_loss import native
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, Sizes

_LIKE = torch.empty((), dtype=torch.float32, device="cpu")


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    sizes: Sizes,
    options: Linearity,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs."""
    where = torch.get_num_threads()
    return native.elle_loss("forward_cpu", where, _LIKE, logits, target, alpha, lam, state, rule, sizes, options)


def elle_loss_backward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    sizes: Sizes,
    options: Linearity,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype."""
    upstream = (grad_loss, grad_ce, grad_e_lin)
    where = torch.get_num_threads()
    return native.elle_loss_backward("backward_cpu", where, logits, target, alpha, saved, *upstream, sizes, options)


def update_lam(e_lin: Tensor, state: Sequence[Tensor], rule: LamRule) -> Tensor:
    """Takes in this step's E_lin; the new lam, a copy."""
    return native.update_lam("update_cpu", (), e_lin, state, rule)
