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

_LINEARITY, _RULE = dispatch.fields_of(Linearity), dispatch.fields_of(LamRule)
# The state of ELLE-A: lam, count, skipped, mean, deviations; or lam, count, skipped, history. Empty: lam is fixed.
_STATE = "Tensor(a!)[] state"


def _forward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float,
    lam_tensor: Tensor | None,
    state: Sequence[Tensor],
    backend: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    rule, options = _options(rest)
    weight = lam if lam_tensor is None else lam_tensor
    values: tuple[Tensor, ...] = ELLE_LOSS.kernel(backend)(logits, target, alpha, weight, state, rule, options)
    dispatch.changed(state)
    return values


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float,
    lam_tensor: Tensor | None,
    state: Sequence[Tensor],
    backend: str,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _, options = _options(rest)
    scalars = [logits.new_empty((), dtype=torch.float32) for _ in range(3)]
    return (*scalars, logits.new_empty(sizes_of(logits, target, alpha, options).saved, dtype=torch.float32))


def _options(rest: Sequence[Any]) -> tuple[LamRule, Linearity]:
    split = len(LamRule._fields)
    return LamRule(*rest[:split]), Linearity(*rest[split:])


def _backward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    backend: str,
    *options: Any,
) -> Tensor:
    kernel = ELLE_LOSS_BACKWARD.kernel(backend)
    grad: Tensor = kernel(logits, target, alpha, saved, grad_loss, grad_ce, grad_e_lin, Linearity(*options))
    return grad


def _backward_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _update_lam(e_lin: Tensor, state: Sequence[Tensor], backend: str, *rule: Any) -> Tensor:
    lam: Tensor = UPDATE_LAM.kernel(backend)(e_lin, state, LamRule(*rule))
    dispatch.changed(state)
    return lam


def _update_lam_fake(e_lin: Tensor, *arguments: Any) -> Tensor:
    return e_lin.new_empty((), dtype=torch.float32)


ELLE_LOSS = dispatch.Op(
    f"elle_loss(Tensor logits, Tensor target, Tensor alpha, float lam, Tensor? lam_tensor, {_STATE}, str backend, "
    f"{_RULE}, {_LINEARITY}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    folder="elle_loss",
)
ELLE_LOSS_BACKWARD = dispatch.Op(
    "elle_loss_backward(Tensor logits, Tensor target, Tensor alpha, Tensor saved, Tensor? grad_loss, "
    f"Tensor? grad_ce, Tensor? grad_e_lin, str backend, {_LINEARITY}) -> Tensor",
    _backward,
    _backward_fake,
    folder="elle_loss",
)
UPDATE_LAM = dispatch.Op(
    f"update_lam(Tensor e_lin, {_STATE}, str backend, {_RULE}) -> Tensor",
    _update_lam,
    _update_lam_fake,
    folder="elle_loss",
)
