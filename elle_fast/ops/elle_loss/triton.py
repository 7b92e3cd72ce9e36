"""elle_loss in Triton: what its launches need from the host. Two forward (rows, reduction), one backward.

The kernels: triton_rows.py, triton_reduce.py, triton_gradient.py.

``saved`` is what the forward leaves to the backward, float32, for ``S`` rows with a loss and ``R`` residuals: losses
``[S]``, maxima ``[S]``, logarithms of the sums of exponentials ``[S]``, sums of the targets ``[S]`` (if they are
probabilities or smoothed), the slopes of E_lin: with respect to the losses ``[S]`` or, for the linearity of logits, as
factors of the residuals ``[R]``; and the lam that weighed E_lin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elle_fast.backends.device import on_device
from elle_fast.backends.triton_host import Launch, next_power_of_2
from elle_fast.ops import layout
from elle_fast.ops.elle_loss import triton_reduce
from elle_fast.ops.elle_loss.schema import ELLE_LOSS, ELLE_LOSS_BACKWARD
from elle_fast.ops.elle_loss.triton_gradient import rows_backward
from elle_fast.ops.elle_loss.triton_rows import rows_forward
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, Sizes, sizes_of

# What the constants of the kernels mean.
PENALTY = {"squared": 0, "abs": 1, "smooth_l1": 2}

OPTIONS = {"enable_fp_fusion": True}

# Elements of a tile of logits, and the most columns of one.
_TILE, _MOST_COLUMNS = 2048, 4096


def elle_loss(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    lam: float | Tensor,
    state: Sequence[Tensor],
    rule: LamRule,
    options: Linearity,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs."""
    with on_device(logits):
        sizes = sizes_of(logits, target, alpha, options)
        logits, target, alpha = _readable(logits), _readable(target), _readable(alpha)
        saved = torch.empty(sizes.saved, dtype=torch.float32, device=logits.device)
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
        ce, e_lin = torch.empty_like(loss), torch.empty_like(loss)  # takes the host half as long as `empty`
        rows, reduce = ELLE_LOSS.plan(forward_launches, *_form(logits, target), sizes, options, rule, len(state))
        rows.kernel[rows.grid](logits, target, alpha, saved, *rows.sizes, **rows.constants)
        number, tensor = (0.0, lam.resolve_neg()) if isinstance(lam, Tensor) else (lam, None)
        reduce.kernel[reduce.grid](
            saved,
            alpha,
            *(_kernel_state(state) if state else (tensor, None, None, None, None)),
            loss,
            ce,
            e_lin,
            number,
            state[3].numel() if len(state) == 4 else 0,
            *reduce.sizes,
            **reduce.constants,
        )
    return loss, ce, e_lin, saved


def elle_loss_backward(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    saved: Tensor,
    grad_loss: Tensor | None,
    grad_ce: Tensor | None,
    grad_e_lin: Tensor | None,
    options: Linearity,
) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype."""
    with on_device(logits):
        sizes = sizes_of(logits, target, alpha, options)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        logits, target, alpha = _readable(logits), _readable(target), _readable(alpha)
        launch = ELLE_LOSS_BACKWARD.plan(backward_launch, *_form(logits, target), sizes, options)
        upstream = (grad_loss, grad_ce, grad_e_lin)
        launch.kernel[launch.grid](logits, target, alpha, saved, *upstream, grad, *launch.sizes, **launch.constants)
    return grad


def update_lam(e_lin: Tensor, state: Sequence[Tensor], rule: LamRule) -> Tensor:
    """Takes in this step's E_lin; the new lam, a copy."""
    with on_device(e_lin):
        lam = torch.empty((), dtype=torch.float32, device=e_lin.device)
        window = state[3].numel() if len(state) == 4 else 0
        triton_reduce.update_lam[(1,)](
            e_lin,
            *_kernel_state(state),
            lam,
            window,
            rule.lam_max,
            rule.gamma,
            rule.min_history,
            SENSITIVITY=rule.sensitivity,
            WINDOW=window > 0,
            BLOCK=min(1024, next_power_of_2(max(window, 1))),
            **OPTIONS,
        )
    return lam


def forward_launches(
    classes: int, stride: int, target_stride: int, sizes: Sizes, options: Linearity, rule: LamRule, state: int
) -> tuple[Launch, Launch]:
    """The launch over rows and that of the reduction; ``state`` is how many tensors ELLE-A keeps, 0 without it."""
    rows = forward_launch(classes, stride, target_stride, sizes, options)
    return rows, reduce_launch(sizes, options, rule, windowed=state == 4, adaptive=state > 0)


def forward_launch(classes: int, stride: int, target_stride: int, sizes: Sizes, options: Linearity) -> Launch:
    """The launch over rows."""
    numbers, constants = _rows(classes, stride, target_stride, sizes, options)
    loss_programs = -(-sizes.losses // constants["ROWS"])
    programs = loss_programs + (-(-sizes.residuals // constants["ROWS"]) if constants["OF_LOGITS"] else 0)
    return Launch(rows_forward, (programs,), (*numbers, loss_programs), constants)


def backward_launch(classes: int, stride: int, target_stride: int, sizes: Sizes, options: Linearity) -> Launch:
    """The launch of the gradient."""
    numbers, constants = _rows(classes, stride, target_stride, sizes, options)
    columns = -(-classes // constants["BLOCK"])
    rows = max(sizes.adv_rows, sizes.part) if constants["OF_LOGITS"] else sizes.losses
    return Launch(rows_backward, (-(-rows // constants["ROWS"]) * columns,), (*numbers, columns), constants)


def reduce_launch(sizes: Sizes, options: Linearity, rule: LamRule, *, windowed: bool, adaptive: bool) -> Launch:
    """The launch of the reduction: one program, so that its order is fixed."""
    block = min(1024, next_power_of_2(max(sizes.adv_rows, sizes.part)))
    constants = {
        "OF_LOGITS": options.of == "logits",
        "POINTS": layout.POINTS_CODE[options.points],
        "BLOCKS": layout.BLOCKS[options.points],
        "PENALTY": PENALTY[options.penalty],
        "ADAPTIVE": adaptive,
        "SENSITIVITY": rule.sensitivity,
        "WINDOW": windowed,
        "BLOCK": block,
        "num_warps": max(1, min(8, block // 128)),
        **OPTIONS,
    }
    numbers = (sizes.losses, sizes.adv_rows, sizes.part, options.triplets, rule.lam_max, rule.gamma, rule.min_history)
    return Launch(triton_reduce.reduce_forward, (1,), numbers, constants)


def _rows(
    classes: int, stride: int, target_stride: int, sizes: Sizes, options: Linearity
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Numbers and constants that the forward and the backward share."""
    columns = min(next_power_of_2(classes), _MOST_COLUMNS)
    rows = max(1, min(_TILE // columns, 32, next_power_of_2(sizes.losses or sizes.residuals)))
    align = math.gcd(classes, stride, 16)
    soft = target_stride >= 0
    target_align = math.gcd(target_stride, 16) if soft else 1
    # Five rows of logits at once need more registers: 4 elements of each a thread instead of 8 (16 of more than 2048).
    five_logits = options.of == "logits" and options.points == "five-point"
    constants: dict[str, Any] = {
        "SOFT": soft,
        "SMOOTH": options.label_smoothing != 0,
        "OF_LOGITS": options.of == "logits",
        "POINTS": layout.POINTS_CODE[options.points],
        "BLOCKS": layout.BLOCKS[options.points],
        "ALIGN": align,
        "TARGET_ALIGN": target_align,
        "ROWS": rows,
        "BLOCK": columns,
        "num_warps": max(1, min(16, rows * columns // (128 if five_logits else 256))),
        **OPTIONS,
    }
    numbers = (sizes.losses, sizes.residuals, sizes.adv_rows, sizes.part, classes // align, stride // align)
    return (*numbers, target_stride // target_align if soft else 1, options.label_smoothing), constants


def _readable(tensor: Tensor) -> Tensor:
    """A row's entries next to each other; rows may be any distance apart."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous() if tensor.stride(-1) != 1 else tensor


def _form(logits: Tensor, target: Tensor) -> tuple[int, int, int]:
    """Classes, and the distances of the rows of logits and of probabilities (-1: class indices)."""
    return logits.shape[1], logits.stride(0), target.stride(0) if target.dim() == 2 else -1


def _kernel_state(state: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """lam, count, skipped, mean, and deviations or the ring of the history."""
    if len(state) == 4:
        return (*state[:3], None, state[3])
    return tuple(state)
