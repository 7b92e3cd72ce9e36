"""What the compiled kernels of elle_loss need from the host, on the CPU and on CUDA alike.

The kernels are in csrc/. A plan holds all of a call but its tensors; it is made once for each kind of call. What the
forward leaves to the backward, ``saved``, is described in csrc/common/plans.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elle_fast import _extension
from elle_fast.ops import layout
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, Sizes

if TYPE_CHECKING:
    from elle_fast._C import Lam, Loss

# Codes of csrc/common/plans.h.
PENALTY = {"squared": 0, "abs": 1, "smooth_l1": 2}

_FIXED = LamRule(0.0, 0.0, 0.0, 0)
_NO_STATE = (0, 0, 0, 0, 0)


def elle_loss(
    launch: str,
    where: Callable[[], int],
    like: Tensor,
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    sizes: Sizes,
    options: Linearity,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs.

    Args:
        launch: the plan's method.
        where: gives its last argument: threads, or a stream.
        like: a 0-dim float32 tensor on the device, as ``empty_like`` takes the host less time than ``empty``.
        logits, target, alpha, lam, state, rule, sizes, options: see schema.py.
    """
    logits, target, alpha = _readable(logits, target, alpha)
    saved = like.new_empty(sizes.saved)
    loss, ce, e_lin = torch.empty_like(like), torch.empty_like(like), torch.empty_like(like)
    tensor, number = None, 0.0
    if isinstance(lam, Tensor):
        tensor = lam.to(torch.float32).resolve_neg()
    else:
        number = lam
    window = _window_of(state) if state else -1
    plan = _loss_plan(logits.shape, logits.stride(), target.stride(), logits.dtype, sizes, options, rule, window)
    getattr(plan, launch)(
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
        where(),
    )
    return loss, ce, e_lin, saved


def elle_loss_backward(
    launch: str,
    where: Callable[[], int],
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
    """The gradient of the logits, contiguous, in their dtype; ``launch`` and ``where`` as in :func:`elle_loss`."""
    grad = logits.new_empty(logits.shape)
    logits, target, alpha = _readable(logits, target, alpha)
    plan = _loss_plan(logits.shape, logits.stride(), target.stride(), logits.dtype, sizes, options)
    getattr(plan, launch)(
        logits.data_ptr(),
        target.data_ptr(),
        alpha.data_ptr(),
        saved.data_ptr(),
        0 if grad_loss is None else grad_loss.data_ptr(),
        0 if grad_ce is None else grad_ce.data_ptr(),
        0 if grad_e_lin is None else grad_e_lin.data_ptr(),
        grad.data_ptr(),
        where(),
    )
    return grad


def update_lam(launch: str, where: tuple[int, ...], e_lin: Tensor, state: Sequence[Tensor], rule: LamRule) -> Tensor:
    """Takes in this step's E_lin; the new lam, a copy. ``where``: a stream, if it is launched on one."""
    if e_lin.dtype != torch.float32:
        e_lin = e_lin.to(torch.float64)
    e_lin = e_lin.resolve_neg()
    lam = torch.empty((), dtype=torch.float32, device=e_lin.device)
    plan = _lam_plan(rule, _window_of(state))
    double = e_lin.dtype == torch.float64
    getattr(plan, launch)(e_lin.data_ptr(), double, *_addresses(state), lam.data_ptr(), *where)
    return lam


@lru_cache(maxsize=256)
def _loss_plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    target_stride: tuple[int, ...],
    dtype: torch.dtype,
    sizes: Sizes,
    options: Linearity,
    rule: LamRule = _FIXED,
    window: int = -1,
) -> Loss:
    """The plan for logits of such shape and stride; ``window``: of ELLE-A's history, -1 without."""
    module = _extension.load()
    assert module is not None
    plan: Loss = module.Loss(
        losses=sizes.losses,
        residuals=sizes.residuals,
        first=sizes.first,
        part=sizes.part,
        triplets=options.triplets,
        classes=shape[1],
        stride=stride[0],
        target_stride=target_stride[0] if len(target_stride) == 2 else -1,  # -1: class indices
        label_smoothing=options.label_smoothing,
        points=layout.POINTS_CODE[options.points],
        penalty=PENALTY[options.penalty],
        of_logits=options.of == "logits",
        type=_extension.DTYPE_CODE[dtype],
        adaptive=window >= 0,
        lam_max=rule.lam_max,
        gamma=rule.gamma,
        sensitivity=rule.sensitivity,
        min_history=rule.min_history,
        window=max(window, 0),
    )
    return plan


@lru_cache(maxsize=256)
def _lam_plan(rule: LamRule, window: int) -> Lam:
    """The plan of an update of ELLE-A's state alone."""
    module = _extension.load()
    assert module is not None
    plan: Lam = module.Lam(
        lam_max=rule.lam_max,
        gamma=rule.gamma,
        sensitivity=rule.sensitivity,
        min_history=rule.min_history,
        window=window,
    )
    return plan


def _readable(logits: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors as the kernels read them: entries of a row next to each other, probabilities and alpha float32."""
    # is_contiguous first, as it takes a third of the time of stride(-1).
    if (not logits.is_contiguous() and logits.stride(-1) != 1) or logits.is_neg():
        logits = logits.resolve_neg().contiguous()
    if target.dtype != torch.int64:
        target = target.to(torch.float32)
    if (not target.is_contiguous() and target.stride(-1) != 1) or target.is_neg():
        target = target.resolve_neg().contiguous()
    if alpha.dtype != torch.float32 or not alpha.is_contiguous() or alpha.is_neg():
        alpha = alpha.to(torch.float32).resolve_neg().contiguous()
    return logits, target, alpha


def _window_of(state: Sequence[Tensor]) -> int:
    """How many values ELLE-A's history holds; 0 for all."""
    return state[3].numel() if len(state) == 4 else 0


def _addresses(state: Sequence[Tensor]) -> tuple[int, ...]:
    """Of lam, count, skipped, mean, and deviations or the ring of the history; 0 for what is not there."""
    kept = [tensor.data_ptr() for tensor in state]
    return (*kept[:3], 0, kept[3]) if len(kept) == 4 else tuple(kept)
