"""elle_loss, local_linearity and update_lam with checked options: check the tensors, choose a backend, call it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from elle_fast import backends
from elle_fast._core import checks
from elle_fast.ops.elle_loss import autograd, reference
from elle_fast.ops.elle_loss.schema import UPDATE_LAM
from elle_fast.ops.elle_loss.validation import FIXED, LamRule, Linearity, check_lam, check_tensors


def choose(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity, lam: float | Tensor, backend: str) -> str:
    """Check the tensors of a call, and choose the backend that runs it."""
    check_tensors(logits, target, alpha, options)
    check_lam(lam, logits.device)
    weight = lam if isinstance(lam, Tensor) else None
    constant = not (target.requires_grad or alpha.requires_grad or (weight is not None and weight.requires_grad))
    wrapped = checks.wrapped(logits, target, alpha, weight)
    return backends.choose(backend, logits.device, ("logits",), (logits.dtype,), constant, wrapped)


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    options: Linearity,
    backend: str,
    state: Sequence[Tensor] = (),
    rule: LamRule = FIXED,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, differentiable with respect to the logits.

    ``state`` and ``rule`` are those of ELLE-A, whose lam is then updated first; without them ``lam`` is what it is.
    """
    name = choose(logits, target, alpha, options, lam, backend)
    if name != "reference":
        return autograd.elle_loss(logits, target, alpha, lam, state, rule, options, name)
    ce, e_lin = reference.elle_loss(logits, target, alpha, options)
    if state:
        seen = e_lin
        if rule.relative:
            numerator, denominator = reference.relative_of_logits(logits, target, alpha, options)
            seen = numerator / denominator
        lam = reference.update_lam(seen, state, rule)
    return reference.weighted_sum(ce, e_lin, lam), ce, e_lin


def local_linearity(logits: Tensor, target: Tensor, alpha: Tensor, options: Linearity, backend: str) -> Tensor:
    """``e_lin`` alone, 0-dim, of the logits of triplets without x_adv (with it for ELLE-2p)."""
    options = options.alone
    name = choose(logits, target, alpha, options, 0.0, backend)
    if name != "reference":
        return autograd.elle_loss(logits, target, alpha, 0.0, (), FIXED, options, name)[2]
    return reference.local_linearity(logits, target, alpha, options)


def update_lam(value: Tensor, state: Sequence[Tensor], rule: LamRule, backend: str, ramp: int | None = None) -> Tensor:
    """Takes in this step's E_lin, or relative E_lin, updates ``state``, and returns the new lam, a copy."""
    name = backends.choose(backend, value.device)
    # The kernels know no ramp, nor the state of a device without float64.
    if name == "reference" or ramp is not None or state[3].dtype != torch.float64:
        return reference.update_lam(value, state, rule, ramp)
    return cast(Tensor, UPDATE_LAM(name, value, state, rule))
