"""What the compiled kernels of elle_loss need from the host, on the CPU and on CUDA alike.

The kernels are in csrc/. A plan holds all of a call but its tensors. What the forward leaves to the backward,
``saved``, is described in csrc/common/plans.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elle_fast.backends import extension
from elle_fast.backends.device import on_device
from elle_fast.ops import layout
from elle_fast.ops.elle_loss.schema import ELLE_LOSS, ELLE_LOSS_BACKWARD, UPDATE_LAM
from elle_fast.ops.elle_loss.validation import FIXED, LamRule, Linearity, Sizes, sizes_of

if TYPE_CHECKING:
    from elle_fast._C import Lam, Loss

# Codes of csrc/common/plans.h.
PENALTY = {"squared": 0, "abs": 1, "smooth_l1": 2}

_NO_STATE = (0, 0, 0, 0, 0)


def elle_loss(
    device: str,
    where: Callable[[Tensor], int],
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    options: Linearity,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs.

    Args:
        device: whose kernels run, ``"cpu"`` or ``"cuda"``.
        where: what gives the number of threads, or the stream on a tensor's device.
        logits, target, alpha, lam, state, rule, options: see op.py.
    """
    logits, target, alpha = _readable(logits, target, alpha)
    sizes = sizes_of(logits, target, alpha, options)
    window = _window_of(state) if state else -1
    plan = ELLE_LOSS.plan(_plan, *_form(logits, target), sizes, options, rule, window)
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    # These take the host half as long as `empty`.
    saved, ce, e_lin = loss.new_empty(sizes.saved), torch.empty_like(loss), torch.empty_like(loss)
    number, tensor = lam, None
    if isinstance(lam, Tensor):
        number, tensor = 0.0, lam.to(torch.float32).resolve_neg()
    with on_device(logits):
        plan.forward(
            device,
            logits.data_ptr(),
            target.data_ptr(),
            alpha.data_ptr(),
            saved.data_ptr(),
            0 if tensor is None else tensor.data_ptr(),
            number,
            *(_addresses(state) if state else _NO_STATE),
            loss.data_ptr(),
            ce.data_ptr(),
            e_lin.data_ptr(),
            where(logits),
        )
    return loss, ce, e_lin, saved


def elle_loss_backward(
    device: str,
    where: Callable[[Tensor], int],
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    options: Linearity,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype; ``device`` and ``where`` as in :func:`elle_loss`."""
    logits, target, alpha = _readable(logits, target, alpha)
    sizes = sizes_of(logits, target, alpha, options)
    plan = ELLE_LOSS_BACKWARD.plan(_plan, *_form(logits, target), sizes, options, FIXED, -1)
    grad = logits.new_empty(logits.shape)
    with on_device(logits):
        plan.backward(
            device,
            logits.data_ptr(),
            target.data_ptr(),
            alpha.data_ptr(),
            saved.data_ptr(),
            0 if grad_loss is None else grad_loss.data_ptr(),
            0 if grad_ce is None else grad_ce.data_ptr(),
            0 if grad_e_lin is None else grad_e_lin.data_ptr(),
            grad.data_ptr(),
            where(logits),
        )
    return grad


def update_lam(
    device: str, where: Callable[[Tensor], int], value: Tensor, state: Sequence[Tensor], rule: LamRule
) -> Tensor:
    """Takes in what the rule looks at; the new lam, a copy."""
    if value.dtype != torch.float32:
        value = value.to(torch.float64)
    value = value.resolve_neg()
    lam = torch.empty((), dtype=torch.float32, device=value.device)
    plan = UPDATE_LAM.plan(_lam_plan, rule, _window_of(state))
    double = value.dtype == torch.float64
    with on_device(value):
        plan.update(device, value.data_ptr(), double, *_addresses(state), lam.data_ptr(), where(value))
    return lam


def _form(logits: Tensor, target: Tensor) -> tuple[int, int, int, torch.dtype]:
    """Classes, distances of the rows of logits and of probabilities (-1: class indices), and dtype."""
    target_stride = target.stride(0) if target.dim() == 2 else -1
    return logits.shape[1], logits.stride(0), target_stride, logits.dtype


def _plan(
    classes: int,
    stride: int,
    target_stride: int,
    dtype: torch.dtype,
    sizes: Sizes,
    options: Linearity,
    rule: LamRule,
    window: int,
) -> Loss:
    """The plan of a call; ``window``: of ELLE-A's history, -1 without ELLE-A."""
    plan: Loss = extension.loaded().Loss(
        losses=sizes.losses,
        residuals=sizes.residuals,
        adv_rows=sizes.adv_rows,
        part=sizes.part,
        triplets=options.triplets,
        classes=classes,
        stride=stride,
        target_stride=target_stride,
        label_smoothing=options.label_smoothing,
        points=layout.POINTS_CODE[options.points],
        penalty=PENALTY[options.penalty],
        of_logits=options.of == "logits",
        type=extension.DTYPE_CODE[dtype],
        **rule._asdict(),
        window=window,
    )
    return plan


def _lam_plan(rule: LamRule, window: int) -> Lam:
    """The plan of an update of ELLE-A's state alone."""
    plan: Lam = extension.loaded().Lam(**rule._asdict(), window=window)
    return plan


def _readable(logits: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as the kernels read them: entries of a row next to each other, probabilities and alpha float32."""
    if logits.dtype not in extension.DTYPE_CODE:  # of a hook of saved tensors
        logits = logits.to(torch.float32)
    return (
        _in_rows(logits),
        _in_rows(target, torch.int64 if target.dim() == 1 else torch.float32),
        _in_rows(alpha, torch.float32),
    )


def _in_rows(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In ``dtype``, not negated, and with stride 1 along the last dimension."""
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if tensor.is_neg() or not (tensor.is_contiguous() or tensor.stride(-1) == 1):
        tensor = tensor.resolve_neg().contiguous()
    return tensor


def _window_of(state: Sequence[Tensor]) -> int:
    """How many values ELLE-A's history holds; 0 for all, or for none."""
    return state[3].numel() if state[3].dim() else 0


def _addresses(state: Sequence[Tensor]) -> tuple[int, ...]:
    """Of lam, count, skipped, mean, and deviations or the ring of the history; 0 for what is not there."""
    addresses = [each.data_ptr() for each in state]
    if state[3].dim():
        addresses.insert(3, 0)
    return (*addresses, 0)[:5]
