"""The closed-form gradient of elle_loss as a ``torch.autograd.Function``, around the operators of schema.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from elle_fast.ops import dispatch
from elle_fast.ops.elle_loss.schema import ELLE_LOSS, ELLE_LOSS_BACKWARD
from elle_fast.ops.elle_loss.validation import LamRule, Linearity


class _ELLELoss(torch.autograd.Function):
    """``d E_lin / dz_row = (2/R) r_i w_row (softmax(z_row) - q_i)`` (arXiv 2401.11618, section 3), one launch."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        # In one tuple, as torch looks at each argument by itself, in Python.
        backend, target, alpha, *rest, options = arguments
        loss, ce, e_lin, saved = ELLE_LOSS(backend, logits, target, alpha, *rest, options)
        ctx.save_for_backward(logits, target, alpha, saved)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return loss, ce, e_lin

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, grad_ce: Tensor | None, grad_e_lin: Tensor | None) -> Any:
        if grad_loss is None and grad_ce is None and grad_e_lin is None:
            return None, None
        logits, target, alpha, saved = ctx.saved_tensors
        # A hook of saved tensors may give them back in another form, and a gradient may be a view with a flipped sign.
        if saved.dtype != torch.float32 or not saved.is_contiguous():
            saved = saved.to(torch.float32).contiguous()
        upstream: tuple[Tensor | None, ...] = (grad_loss, grad_ce, grad_e_lin)
        # A compiler may not ask for the flag.
        if is_compiling() or any(grad is not None and grad.is_neg() for grad in upstream):
            upstream = tuple(None if grad is None else grad.resolve_neg() for grad in upstream)
        # With create_graph the gradient would look like a constant; a second derivative has to fail instead.
        gradient: Any = _Gradient.apply if torch.is_grad_enabled() else ELLE_LOSS_BACKWARD
        return gradient(ctx.backend, logits, target, alpha, saved, *upstream, ctx.options), None


# Without what `Function.apply` does for transforms of torch.func, which backends.choose keeps away.
_APPLY = super(torch.autograd.Function, _ELLELoss).apply


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return ELLE_LOSS_BACKWARD(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(
            "elle_loss: expected one backward pass, as its closed-form gradient cannot be differentiated again, got a "
            "second derivative (create_graph=True); backend='reference' can be differentiated any number of times"
        )


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    options: Linearity,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim float32, differentiable with respect to the logits once.

    ``state`` and ``rule`` are those of ELLE-A, whose lam is then updated; without them ``lam`` is what it is.
    """
    eager = dispatch.eager(logits, target, alpha, lam, state)
    if not eager and not isinstance(lam, Tensor):
        # As a number it would be a constant of the graph, which each new value compiles again; `torch.full` too.
        lam = torch.ones((), dtype=torch.float32, device=logits.device) * lam
    if logits.requires_grad and torch.is_grad_enabled():
        apply: Any = _APPLY if eager else _ELLELoss.apply
        loss, ce, e_lin = apply(logits, (backend, target, alpha, lam, state, rule, options))
    else:
        loss, ce, e_lin, _ = ELLE_LOSS(backend, logits, target, alpha, lam, state, rule, options)
    return loss, ce, e_lin
