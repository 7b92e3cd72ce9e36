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
from typing import NamedTuple

import torch
from torch import Tensor

from elle_fast.backends.device import on_device
from elle_fast.backends.triton_host import Launch, next_power_of_2
from elle_fast.ops.elle_loss import triton_reduce
from elle_fast.ops.elle_loss.schema import ELLE_LOSS, ELLE_LOSS_BACKWARD, UPDATE_LAM
from elle_fast.ops.elle_loss.triton_gradient import rows_backward
from elle_fast.ops.elle_loss.triton_rows import rows_forward
from elle_fast.ops.elle_loss.validation import LamRule, Linearity, Sizes, sizes_of

# Elements of a tile of logits, and the most columns of one.
_TILE, _MOST_COLUMNS = 2048, 4096


class Tensors(NamedTuple):
    """What the kernels over logits are given."""

    logits: Tensor
    target: Tensor
    alpha: Tensor
    saved: Tensor


class Outputs(NamedTuple):
    """The three results, 0-dim, or the gradients that reach them."""

    loss: Tensor | None
    ce: Tensor | None
    e_lin: Tensor | None


class State(NamedTuple):
    """What ELLE-A keeps; a window has no mean, and its values as ``spread``; relative E_lin has a mean alone."""

    lam: Tensor | None
    steps: Tensor | None = None
    skipped: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None


class Rule(NamedTuple):
    """What the kernels read of a :class:`LamRule`."""

    lam_max: float
    gamma: float
    min_history: int
    window: int


class RowOptions(NamedTuple):
    """What the kernels over logits are compiled for."""

    of: str
    points: str
    blocks: int
    soft: bool  # probabilities as targets
    smooth: bool


class Tile(NamedTuple):
    """``rows`` rows of ``block`` logits; ``align`` divides the distances of rows of logits and of probabilities."""

    align: int
    target_align: int
    rows: int
    block: int


class ReduceOptions(NamedTuple):
    """What the reduction and the update of lam are compiled for."""

    # Compiled in, as a number given to a kernel is rounded to float32.
    sensitivity: float
    threshold: float
    rate: float
    relative: bool
    windowed: bool
    adaptive: bool = True
    of: str = "loss"
    points: str = "elle"
    blocks: int = 3
    penalty: str = "squared"


class Form(NamedTuple):
    """Classes, and the distances of the rows of logits and of probabilities (-1: class indices)."""

    classes: int
    stride: int
    target_stride: int


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
        saved = torch.empty(sizes.saved, dtype=torch.float32, device=logits.device)
        tensors = Tensors(_readable(logits), _readable(target), _readable(alpha), saved)
        loss = torch.empty((), dtype=torch.float32, device=logits.device)
        ce, e_lin = torch.empty_like(loss), torch.empty_like(loss)  # takes the host half as long as `empty`
        form = _form(tensors)
        rows, reduce = ELLE_LOSS.plan(forward_launches, form, sizes, options, rule, bool(state), _window(state))
        rows(tensors)
        number, tensor = (0.0, lam.resolve_neg()) if isinstance(lam, Tensor) else (lam, None)
        reduce(saved, tensors.alpha, _state(state) if state else State(tensor), Outputs(loss, ce, e_lin), number)
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
        tensors = Tensors(_readable(logits), _readable(target), _readable(alpha), saved)
        launch = ELLE_LOSS_BACKWARD.plan(backward_launch, _form(tensors), sizes, options)
        launch(tensors, Outputs(grad_loss, grad_ce, grad_e_lin), grad)
    return grad


def update_lam(value: Tensor, state: Sequence[Tensor], rule: LamRule) -> Tensor:
    """Takes in what the rule looks at; the new lam, a copy."""
    with on_device(value):
        lam = torch.empty((), dtype=torch.float32, device=value.device)
        UPDATE_LAM.plan(update_launch, rule, _window(state))(value, _state(state), lam)
    return lam


def forward_launches(
    form: Form, sizes: Sizes, options: Linearity, rule: LamRule, adaptive: bool, window: int
) -> tuple[Launch, Launch]:
    """The launch over rows and that of the reduction."""
    return forward_launch(form, sizes, options), reduce_launch(sizes, options, rule, adaptive=adaptive, window=window)


def forward_launch(form: Form, sizes: Sizes, options: Linearity) -> Launch:
    """The launch over rows."""
    numbers, own, tile, warps = _rows(form, sizes, options)
    loss_programs = -(-sizes.losses // tile.rows)
    programs = loss_programs + (-(-sizes.residuals // tile.rows) if options.of == "logits" else 0)
    return Launch(rows_forward, (programs,), (*numbers, loss_programs), own, tile, warps, contract=True)


def backward_launch(form: Form, sizes: Sizes, options: Linearity) -> Launch:
    """The launch of the gradient."""
    numbers, own, tile, warps = _rows(form, sizes, options)
    columns = -(-form.classes // tile.block)
    rows = max(sizes.adv_rows, sizes.part) if options.of == "logits" else sizes.losses
    programs = -(-rows // tile.rows) * columns
    return Launch(rows_backward, (programs,), (*numbers, columns), own, tile, warps, contract=True)


def reduce_launch(sizes: Sizes, options: Linearity, rule: LamRule, *, adaptive: bool, window: int) -> Launch:
    """The launch of the reduction: one program, so that its order is fixed."""
    block = min(1024, next_power_of_2(max(sizes.adv_rows, sizes.part)))
    of_points = (options.of, options.points, options.blocks, options.penalty)
    own = ReduceOptions(*_compiled_in(rule), window > 0, adaptive, *of_points)
    numbers = (
        sizes.losses,
        sizes.adv_rows,
        sizes.part,
        options.triplets,
        Rule(rule.lam_max, rule.gamma, rule.min_history, window),
    )
    warps = max(1, min(8, block // 128))
    return Launch(triton_reduce.reduce_forward, (1,), numbers, own, block, warps, contract=True)


def update_launch(rule: LamRule, window: int) -> Launch:
    """The launch of the update of lam alone."""
    own, block = ReduceOptions(*_compiled_in(rule), window > 0), min(1024, next_power_of_2(max(window, 1)))
    return Launch(
        triton_reduce.update_lam,
        (1,),
        (Rule(rule.lam_max, rule.gamma, rule.min_history, window),),
        own,
        block,
        warps=4,
        contract=True,
    )


def _compiled_in(rule: LamRule) -> tuple[float, float, float, bool]:
    return rule.sensitivity, rule.threshold, rule.rate, rule.relative


def _tile(form: Form, sizes: Sizes, options: Linearity) -> tuple[Tile, int]:
    """The tile of the forward and the backward over logits, and its warps."""
    columns = min(next_power_of_2(form.classes), _MOST_COLUMNS)
    rows = max(1, min(_TILE // columns, 32, next_power_of_2(sizes.losses or sizes.residuals)))
    align = math.gcd(form.classes, form.stride, 16)
    target_align = math.gcd(form.target_stride, 16) if form.target_stride >= 0 else 1
    # Five rows of logits at once need more registers: 4 elements of each a thread instead of 8 (16 of more than 2048).
    five_logits = options.of == "logits" and options.points == "five-point"
    warps = max(1, min(16, rows * columns // (128 if five_logits else 256)))
    return Tile(align, target_align, rows, columns), warps


def _rows(form: Form, sizes: Sizes, options: Linearity) -> tuple[tuple[float, ...], RowOptions, Tile, int]:
    """Sizes, options, tile and warps that the forward and the backward over logits share."""
    tile, warps = _tile(form, sizes, options)
    soft, smoothing = form.target_stride >= 0, options.label_smoothing
    numbers = (sizes.losses, sizes.residuals, sizes.adv_rows, sizes.part, form.classes // tile.align)
    strides = (form.stride // tile.align, form.target_stride // tile.target_align if soft else 1)
    own = RowOptions(options.of, options.points, options.blocks, soft, smoothing != 0)
    return (*numbers, *strides, smoothing), own, tile, warps


def _readable(tensor: Tensor) -> Tensor:
    """Without a negative bit, and a row's entries next to each other; rows may be any distance apart."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor.contiguous() if tensor.stride(-1) != 1 else tensor


def _form(tensors: Tensors) -> Form:
    logits, target = tensors.logits, tensors.target
    return Form(logits.shape[1], logits.stride(0), target.stride(0) if target.dim() == 2 else -1)


def _window(state: Sequence[Tensor]) -> int:
    """The length of the history that is kept, 0 without a window."""
    return state[3].numel() if state and state[3].dim() else 0


def _state(state: Sequence[Tensor]) -> State:
    lam, steps, skipped, *history = state
    mean, spread = (None, *history) if history[0].dim() else (*history, None)[:2]
    return State(lam, steps, skipped, mean, spread)
