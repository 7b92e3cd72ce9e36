"""What the compiled kernels of elle_loss need from the host, on the CPU and on CUDA alike.

The kernels are in csrc/. A plan holds all of a call but its tensors; it is made once for each kind of call. What the
forward leaves to the backward, ``saved``, is described in csrc/common/plans.h.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, empty_like

from elle_fast._core.checks import MOST_KEPT
from elle_fast.backends import extension
from elle_fast.ops import layout
from elle_fast.ops.elle_loss.validation import FIXED, Call, LamRule, Linearity, Sizes

if TYPE_CHECKING:
    from elle_fast._C import Lam, Loss

# Codes of csrc/common/plans.h.
PENALTY = {"squared": 0, "abs": 1, "smooth_l1": 2}

_NO_STATE = (0, 0, 0, 0, 0)


def elle_loss(
    device: str,
    where: Callable[[], int],
    like: Tensor,
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs.

    Args:
        device: whose kernels run, "cpu" or "cuda".
        where: gives the number of threads, or the stream.
        like: a 0-dim float32 tensor there, as ``empty_like`` takes the host less time than ``empty``.
        logits, target, alpha, lam, state, rule: see schema.py.
        call: what is known of such calls. The plan is kept with it where the tensors are read as they are.
    """
    window = _window_of(state) if state else -1
    key = (rule, window) if state else None
    run = call.kept.get(key)
    if run is None or logits.is_neg() or target.is_neg() or alpha.is_neg():
        given = logits, target, alpha
        logits, target, alpha, plan = _prepared(logits, target, alpha, call, rule, window)
        run = plan.forward
        # Strides and dtypes, which the call is known by, tell all but the negative bit.
        if all(map(operator.is_, given, (logits, target, alpha))):
            if len(call.kept) >= MOST_KEPT:  # as where lam_max is another one in each step
                call.kept.clear()
            call.kept[key] = run
    saved = like.new_empty(call.sizes.saved)
    loss, ce, e_lin = empty_like(like), empty_like(like), empty_like(like)
    tensor, number = None, lam
    if type(lam) is not float and isinstance(lam, Tensor):
        tensor, number = lam.to(torch.float32).resolve_neg(), 0.0
    run(
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
        where(),
    )
    return loss, ce, e_lin, saved


def elle_loss_backward(
    device: str,
    where: Callable[[], int],
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    call: Call,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype; ``device`` and ``where`` as in :func:`elle_loss`."""
    # Looked at anew, as hooks of saved tensors may give them back in another form.
    logits, target, alpha, plan = _prepared(logits, target, alpha, call)
    grad = logits.new_empty(logits.shape)
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
        where(),
    )
    return grad


def update_lam(device: str, where: int, e_lin: Tensor, state: Sequence[Tensor], rule: LamRule) -> Tensor:
    """Takes in this step's E_lin; the new lam, a copy. ``where``: the number of threads, or the stream."""
    if e_lin.dtype != torch.float32:
        e_lin = e_lin.to(torch.float64)
    e_lin = e_lin.resolve_neg()
    lam = torch.empty((), dtype=torch.float32, device=e_lin.device)
    plan = _lam_plan(rule, _window_of(state))
    double = e_lin.dtype == torch.float64
    plan.update(device, e_lin.data_ptr(), double, *_addresses(state), lam.data_ptr(), where)
    return lam


def _prepared(
    logits: Tensor, target: Tensor, alpha: Tensor, call: Call, rule: LamRule = FIXED, window: int = -1
) -> tuple[Tensor, Tensor, Tensor, Loss]:
    """The tensors as the kernels read them, and the plan for them."""
    logits, target, alpha = _readable(logits, target, alpha)
    plan = _loss_plan(
        logits.shape, logits.stride(), target.stride(), logits.dtype, call.sizes, call.options, rule, window
    )
    return logits, target, alpha, plan


@lru_cache(maxsize=256)
def _loss_plan(
    shape: torch.Size,
    stride: tuple[int, ...],
    target_stride: tuple[int, ...],
    dtype: torch.dtype,
    sizes: Sizes,
    options: Linearity,
    rule: LamRule,
    window: int,
) -> Loss:
    """The plan for logits of such shape and stride; ``window``: of ELLE-A's history, -1 without."""
    module = extension.load()
    assert module is not None
    plan: Loss = module.Loss(
        losses=sizes.losses,
        residuals=sizes.residuals,
        adv_rows=sizes.first,
        part=sizes.part,
        triplets=options.triplets,
        classes=shape[1],
        stride=stride[0],
        target_stride=target_stride[0] if len(target_stride) == 2 else -1,  # -1: class indices
        label_smoothing=options.label_smoothing,
        points=layout.POINTS_CODE[options.points],
        penalty=PENALTY[options.penalty],
        of_logits=options.of == "logits",
        type=extension.DTYPE_CODE[dtype],
        lam_max=rule.lam_max,
        gamma=rule.gamma,
        sensitivity=rule.sensitivity,
        min_history=rule.min_history,
        window=window,
    )
    return plan


@lru_cache(maxsize=256)
def _lam_plan(rule: LamRule, window: int) -> Lam:
    """The plan of an update of ELLE-A's state alone."""
    module = extension.load()
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
    if logits.dtype not in extension.DTYPE_CODE:  # of a hook of saved tensors
        logits = logits.to(torch.float32)
    if (not logits.is_contiguous() and logits.stride(-1) != 1) or logits.is_neg():
        logits = logits.resolve_neg().contiguous()
    target = target.to(torch.int64 if target.dim() == 1 else torch.float32)
    if (not target.is_contiguous() and target.stride(-1) != 1) or target.is_neg():
        target = target.resolve_neg().contiguous()
    return logits, target, alpha.to(torch.float32).resolve_neg().contiguous()


def _window_of(state: Sequence[Tensor]) -> int:
    """How many values ELLE-A's history holds; 0 for all."""
    return state[3].numel() if len(state) == 4 else 0


def _addresses(state: Sequence[Tensor]) -> tuple[int, ...]:
    """Of lam, count, skipped, mean, and deviations or the ring of the history; 0 for what is not there."""
    if len(state) == 4:
        lam, count, skipped, history = state
        return lam.data_ptr(), count.data_ptr(), skipped.data_ptr(), 0, history.data_ptr()
    lam, count, skipped, mean, deviations = state
    return lam.data_ptr(), count.data_ptr(), skipped.data_ptr(), mean.data_ptr(), deviations.data_ptr()
