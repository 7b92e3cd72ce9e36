"""The operators of elle_loss: the forward, its gradient, and the update of ELLE-A's state alone.

None is differentiable by itself: the ``torch.autograd.Function`` around them is in autograd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elle_fast.ops import dispatch
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, sizes_of

# The state of ELLE-A: lam, count, skipped, and mean and deviations, or the history; or of relative E_lin its mean.
# Empty: lam is fixed.
_STATE = "Tensor(a!)[] state"


def _elle_loss_fake(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    options: Linearity,
) -> tuple[Tensor, ...]:
    shapes = ((), (), (), (sizes_of(logits, target, alpha, options).saved,))
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _elle_loss_backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _update_lam_fake(value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty((), dtype=torch.float32)


ELLE_LOSS = dispatch.Op(
    "elle_loss",
    f"Tensor logits, Tensor target, Tensor alpha, Tensor lam, {_STATE}",
    (LamRule, Linearity),
    "(Tensor, Tensor, Tensor, Tensor)",
    _elle_loss_fake,
    folder="elle_loss",
    written=4,
)
ELLE_LOSS_BACKWARD = dispatch.Op(
    "elle_loss_backward",
    "Tensor logits, Tensor target, Tensor alpha, Tensor saved, Tensor? grad_loss, Tensor? grad_ce, Tensor? grad_e_lin",
    (Linearity,),
    "Tensor",
    _elle_loss_backward_fake,
    folder="elle_loss",
)
UPDATE_LAM = dispatch.Op(
    "update_lam", f"Tensor value, {_STATE}", (LamRule,), "Tensor", _update_lam_fake, folder="elle_loss", written=1
)
