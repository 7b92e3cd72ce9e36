"""What the compiled kernels of pack_points need from the host, on the CPU and on CUDA alike.

The kernels are in csrc/. A plan holds all of a call but its tensors; it is made once for each kind of call. A tensor
that is neither contiguous nor channels-last is copied first.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from elle_fast.backends import extension
from elle_fast.ops import layout
from elle_fast.ops.pack_points.validation import (
    Call,
    Packing,
    output_format,
    packed_rows,
)

if TYPE_CHECKING:
    from elle_fast._C import Pack

# Codes of csrc/common/plans.h.
NORM = {"linf": 0, "l2": 1}
ALPHA = {"uniform": 0, "half": 1, "given": 2}


class Form(NamedTuple):
    """What a plan has to know of the tensors of a call."""

    shape: torch.Size
    x: tuple[torch.dtype, bool]  # and whether the channels lie last in memory
    given: tuple[torch.dtype, bool] | None  # the gradient, or x_adv
    step: bool  # whether it is the gradient
    alpha_given: bool


class _Made(NamedTuple):
    """What is made once for calls that are alike."""

    run: Callable[..., None]  # the plan's method
    shape: tuple[int, ...]  # of the points
    residuals: int
    dtype: torch.dtype  # of the points
    memory_format: torch.memory_format
    like_x: bool  # whether the points have x's dtype and are contiguous
    single: bool  # whether x is float32, as alpha is


def pack_points(
    device: str,
    where: Callable[[], int],
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    call: Call,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``.

    Args:
        device: whose kernels run, "cpu" or "cuda".
        where: gives the number of threads, or the stream.
        x, grad, x_adv, alpha, seed, out: see validation.py.
        statistics: mean and 1 / std, see schema.py.
        call: what is known of such calls. The plan is kept with it where the tensors are read as they are.
    """
    made = call.kept.get("pack")
    given = x_adv if grad is None else grad
    if made is None or _negated(x, given, alpha, seed):
        before, memory_format = (x, given, alpha, seed), output_format(x, call.packing)
        x, seed = _dense(x, memory_format), seed.resolve_neg()
        given = None if given is None else _dense(given, memory_format)
        alpha = None if alpha is None else alpha.to(torch.float32).resolve_neg().contiguous()
        kind = None if given is None else (given.dtype, _channels_last(given))
        form = Form(x.shape, (x.dtype, _channels_last(x)), kind, grad is not None, alpha is not None)
        made = _made(form, memory_format, call.packing)
        # Strides and dtypes, which the call is known by, tell all but the negative bit.
        if all(map(operator.is_, before, (x, given, alpha, seed))):
            call.kept["pack"] = made
    if out is not None:
        points, alphas = out
    else:
        # new_empty takes the host less time than empty, and less without a dtype.
        if made.like_x:
            points = x.new_empty(made.shape)
        else:
            points = torch.empty(made.shape, dtype=made.dtype, device=x.device, memory_format=made.memory_format)
        alphas = x.new_empty(made.residuals) if made.single else x.new_empty(made.residuals, dtype=torch.float32)
    made.run(
        device,
        x.data_ptr(),
        0 if given is None else given.data_ptr(),
        0 if alpha is None else alpha.data_ptr(),
        seed.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        points.data_ptr(),
        alphas.data_ptr(),
        where(),
    )
    return points, alphas


def random_start(device: str, where: Callable[[], int], x: Tensor, seed: Tensor, call: Call) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    kept = call.kept.get("start")
    if kept is None or x.is_neg() or seed.is_neg():
        before, memory_format = (x, seed), output_format(x, call.packing)
        x, seed = _dense(x, memory_format), seed.resolve_neg()
        plan = _start_plan(x.shape, (x.dtype, _channels_last(x)), memory_format, call.packing)
        kept = plan.start, memory_format
        if x is before[0] and seed is before[1]:
            call.kept["start"] = kept
    run, memory_format = kept
    start = torch.empty_like(x, memory_format=memory_format)
    run(device, x.data_ptr(), seed.data_ptr(), start.data_ptr(), where())
    return start


def _negated(*tensors: Tensor | None) -> bool:
    """Whether one is a view with a flipped sign, which strides do not tell."""
    for tensor in tensors:  # noqa: SIM110, as a generator takes the host longer
        if tensor is not None and tensor.is_neg():
            return True
    return False


def _dense(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The tensor; a copy in ``memory_format`` if it is neither contiguous nor channels-last."""
    tensor = tensor.resolve_neg()
    if tensor.is_contiguous() or _channels_last(tensor):
        return tensor
    return tensor.contiguous(memory_format=memory_format)


def _channels_last(tensor: Tensor) -> bool:
    """Whether a tensor that is not contiguous has its channels last in memory."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    return last is not None and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)


@lru_cache(maxsize=256)
def _made(form: Form, memory_format: torch.memory_format, packing: Packing) -> _Made:
    """The plan for such tensors, and what a call allocates."""
    batch = form.shape[0]
    rows, residuals = packed_rows(batch, form.given is not None, packing)
    dtype = packing.dtype or form.x[0]
    plan = _plan(
        form.shape,
        packing,
        part=layout.triplet_rows(batch, packing.fraction),
        adv=0 if form.given is None else 1 if form.step else 2,
        alpha="given" if form.alpha_given else "half" if packing.points == "five-point" else packing.alpha,
        x=form.x,
        given=form.given or form.x,
        points=(dtype, memory_format),
    )
    return _Made(
        run=plan.pack,
        shape=(rows, *form.shape[1:]),
        residuals=residuals,
        dtype=dtype,
        memory_format=memory_format,
        like_x=dtype == form.x[0] and memory_format == torch.contiguous_format,
        single=form.x[0] == torch.float32,
    )


@lru_cache(maxsize=256)
def _start_plan(
    shape: torch.Size, x: tuple[torch.dtype, bool], memory_format: torch.memory_format, packing: Packing
) -> Pack:
    """The plan of the attack's start around such a tensor."""
    packing = packing._replace(points="elle", mean=None, std=None)  # which say nothing of the start
    return _plan(shape, packing, part=1, adv=0, alpha="half", x=x, given=x, points=(x[0], memory_format))


def _plan(
    shape: torch.Size,
    packing: Packing,
    *,
    part: int,
    adv: int,
    alpha: str,
    x: tuple[torch.dtype, bool],
    given: tuple[torch.dtype, bool],
    points: tuple[torch.dtype, torch.memory_format],
) -> Pack:
    module = extension.load()
    assert module is not None
    low, high = packing.bounds or (0.0, 0.0)
    plan: Pack = module.Pack(
        batch=shape[0],
        part=part,
        channels=shape[1] if len(shape) > 1 else 1,
        plane=math.prod(shape[2:]),
        triplets=packing.triplets,
        sample_offset=packing.sample_offset,
        eps=packing.eps,
        step_size=packing.step_size,
        radius=packing.start * packing.eps,
        clamp=packing.bounds is not None,
        low=low,
        high=high,
        norm=NORM[packing.norm],
        adv=adv,
        points=layout.POINTS_CODE[packing.points],
        alpha=ALPHA[alpha],
        start=packing.start != 0,
        project=packing.project,
        normalize=packing.mean is not None,
        x_last=x[1],
        given_last=given[1],
        points_last=points[1] in (torch.channels_last, torch.channels_last_3d),
        x_type=extension.DTYPE_CODE[x[0]],
        given_type=extension.DTYPE_CODE[given[0]],
        points_type=extension.DTYPE_CODE[points[0]],
    )
    return plan
