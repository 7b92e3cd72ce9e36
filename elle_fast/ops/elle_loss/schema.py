"""elle_loss as PyTorch operators: schemas, shapes without data, and the call of the backend below them.

Three operators: the forward, its gradient, and the update of ELLE-A's state alone. None is differentiable by itself:
the ``torch.autograd.Function`` around them is in autograd.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elle_fast.ops import dispatch
from elle_fast.ops.elle_loss.validation import Call, LamRule, Linearity, sizes_of

# The options are whether the logits begin with x_adv, and the fields of Linearity in their order.
_OPTIONS = "bool first, str points, int triplets, str of, str penalty, float label_smoothing"
# The state of ELLE-A: lam, count, skipped, mean, deviations; or lam, count, skipped, history. Empty: lam is fixed.
_STATE = "Tensor(a!)[] state, float lam_max, float gamma, float sensitivity, int min_history"


def elle_loss(
    backend: str,
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    call: Call,
) -> tuple[Tensor, ...]:
    """The operator, for whom has to see it; where nobody has to, autograd.py calls the backend's function itself."""
    number, tensor = (0.0, lam) if isinstance(lam, Tensor) else (float(lam), None)
    values: tuple[Tensor, ...] = _ELLE_LOSS(
        logits, target, alpha, number, tensor, state, *rule, backend, call.first, *call.options
    )
    return values


def elle_loss_backward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    call: Call,
    backend: str,
) -> Tensor:
    """What ``backend`` makes of it; by way of the operator where somebody has to see it."""
    tensors = (logits, target, alpha, saved, grad_loss, grad_ce, grad_e_lin)
    if dispatch.eager(logits):
        grad: Tensor = dispatch.function("elle_loss_backward", backend)(*tensors, call)
    else:
        grad = _ELLE_LOSS_BACKWARD(*tensors, backend, call.first, *call.options)
    return grad


def update_lam(e_lin: Tensor, state: Sequence[Tensor], rule: LamRule, backend: str) -> Tensor:
    """Likewise."""
    if dispatch.eager(e_lin):
        return _update_lam(e_lin, state, *rule, backend)
    lam: Tensor = _UPDATE_LAM(e_lin, state, *rule, backend)
    return lam


def _call(logits: Tensor, target: Tensor, alpha: Tensor, first: bool, options: Sequence[Any]) -> Call:
    """What was checked before the operator was called."""
    linearity = Linearity(*options)
    sizes = sizes_of(logits, target, alpha, linearity, first=first)
    return Call(linearity, sizes, first, (logits.dtype,), False, {})


def _forward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float,
    lam_tensor: Tensor | None,
    state: Sequence[Tensor],
    lam_max: float,
    gamma: float,
    sensitivity: float,
    min_history: int,
    backend: str,
    first: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    values: tuple[Tensor, ...] = dispatch.function("elle_loss", backend)(
        logits,
        target,
        alpha,
        lam if lam_tensor is None else lam_tensor,
        state,
        LamRule(lam_max, gamma, sensitivity, min_history),
        _call(logits, target, alpha, first, options),
    )
    dispatch.changed(state)
    return values


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float,
    lam_tensor: Tensor | None,
    state: Sequence[Tensor],
    lam_max: float,
    gamma: float,
    sensitivity: float,
    min_history: int,
    backend: str,
    first: bool,
    *options: Any,
) -> tuple[Tensor, ...]:
    saved = sizes_of(logits, target, alpha, Linearity(*options), first=first).saved
    scalars = [logits.new_empty((), dtype=torch.float32) for _ in range(3)]
    return (*scalars, logits.new_empty(saved, dtype=torch.float32))


def _backward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    backend: str,
    first: bool,
    *options: Any,
) -> Tensor:
    upstream = (grad_loss, grad_ce, grad_e_lin)
    call = _call(logits, target, alpha, first, options)
    grad: Tensor = dispatch.function("elle_loss_backward", backend)(logits, target, alpha, saved, *upstream, call)
    return grad


def _backward_fake(logits: Tensor, *arguments: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _update_lam(
    e_lin: Tensor,
    state: Sequence[Tensor],
    lam_max: float,
    gamma: float,
    sensitivity: float,
    min_history: int,
    backend: str,
) -> Tensor:
    rule = LamRule(lam_max, gamma, sensitivity, min_history)
    lam: Tensor = dispatch.function("update_lam", backend)(e_lin, state, rule)
    dispatch.changed(state)
    return lam


def _update_lam_fake(e_lin: Tensor, *arguments: Any) -> Tensor:
    return e_lin.new_empty((), dtype=torch.float32)


_ELLE_LOSS = dispatch.register(
    f"elle_loss(Tensor logits, Tensor target, Tensor alpha, float lam, Tensor? lam_tensor, {_STATE}, str backend, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_ELLE_LOSS_BACKWARD = dispatch.register(
    "elle_loss_backward(Tensor logits, Tensor target, Tensor alpha, Tensor saved, Tensor? grad_loss, "
    f"Tensor? grad_ce, Tensor? grad_e_lin, str backend, {_OPTIONS}) -> Tensor",
    _backward,
    _backward_fake,
)
_UPDATE_LAM = dispatch.register(
    f"update_lam(Tensor e_lin, {_STATE}, str backend) -> Tensor", _update_lam, _update_lam_fake
)
