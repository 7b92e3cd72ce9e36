"""What the compiled kernels of pack_points need from the host, on the CPU and on CUDA alike.

The kernels are in csrc/. A plan holds all of a call but its tensors; it is made once for each kind of call. A tensor
that is neither contiguous nor channels-last is copied first.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from elle_fast import _extension
from elle_fast.ops import layout
from elle_fast.ops.pack_points.validation import Packing, output_format, packed_rows

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


def pack_points(
    launch: str,
    where: int,
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    packing: Packing,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``.

    Args:
        launch: the plan's method.
        where: its last argument: threads, or a stream.
        x, grad, x_adv, alpha, seed, packing, out: see validation.py.
        statistics: mean and 1 / std, see schema.py.
    """
    memory_format = output_format(x, packing)
    x, x_last = _dense(x, memory_format)
    given, kind = x_adv if grad is None else grad, None
    if given is not None:
        given, given_last = _dense(given, memory_format)
        kind = given.dtype, given_last
    if alpha is not None:
        alpha = alpha.to(torch.float32).resolve_neg().contiguous()
    seed = seed.resolve_neg() if seed.is_neg() else seed
    form = Form(x.shape, (x.dtype, x_last), kind, grad is not None, alpha is not None)
    plan, shape, residuals, dtype = pack_plan(form, memory_format, packing)
    if out is None:
        points = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
        alphas = torch.empty(residuals, dtype=torch.float32, device=x.device)
    else:
        points, alphas = out
    getattr(plan, launch)(
        x.data_ptr(),
        0 if given is None else given.data_ptr(),
        0 if alpha is None else alpha.data_ptr(),
        seed.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
        points.data_ptr(),
        alphas.data_ptr(),
        where,
    )
    return points, alphas


def random_start(launch: str, where: int, x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    memory_format = output_format(x, packing)
    start = torch.empty_like(x, memory_format=memory_format)
    x, x_last = _dense(x, memory_format)
    seed = seed.resolve_neg() if seed.is_neg() else seed
    plan = _start_plan(x.shape, (x.dtype, x_last), memory_format, packing)
    getattr(plan, launch)(x.data_ptr(), seed.data_ptr(), start.data_ptr(), where)
    return start


def _dense(tensor: Tensor, memory_format: torch.memory_format) -> tuple[Tensor, bool]:
    """The tensor, or a copy in ``memory_format``, and whether its channels lie last."""
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.is_contiguous():
        return tensor, False
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last):
        return tensor, True
    return _dense(tensor.contiguous(memory_format=memory_format), memory_format)


@lru_cache(maxsize=256)
def pack_plan(
    form: Form, memory_format: torch.memory_format, packing: Packing
) -> tuple[Pack, tuple[int, ...], int, torch.dtype]:
    """The plan for such tensors, and shape of the points, residuals, dtype of the points."""
    batch = form.shape[0]
    rows, residuals = packed_rows(batch, form.given is not None, packing)
    dtype = packing.dtype or form.x[0]
    plan = _plan(
        form.shape,
        packing,
        part=layout.triplet_rows(batch, packing.fraction),
        first=0 if form.given is None else 1 if form.step else 2,
        alpha="given" if form.alpha_given else "half" if packing.points == "five-point" else packing.alpha,
        x=form.x,
        given=form.given or form.x,
        points=(dtype, memory_format),
    )
    return plan, (rows, *form.shape[1:]), residuals, dtype


@lru_cache(maxsize=256)
def _start_plan(
    shape: torch.Size, x: tuple[torch.dtype, bool], memory_format: torch.memory_format, packing: Packing
) -> Pack:
    """The plan of the attack's start around such a tensor."""
    packing = packing._replace(points="elle", mean=None, std=None)  # which say nothing of the start
    return _plan(shape, packing, part=1, first=0, alpha="half", x=x, given=x, points=(x[0], memory_format))


def _plan(
    shape: torch.Size,
    packing: Packing,
    *,
    part: int,
    first: int,
    alpha: str,
    x: tuple[torch.dtype, bool],
    given: tuple[torch.dtype, bool],
    points: tuple[torch.dtype, torch.memory_format],
) -> Pack:
    module = _extension.load()
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
        first=first,
        points=layout.POINTS_CODE[packing.points],
        alpha=ALPHA[alpha],
        start=packing.start != 0,
        project=packing.project,
        normalise=packing.mean is not None,
        x_last=x[1],
        given_last=given[1],
        points_last=points[1] in (torch.channels_last, torch.channels_last_3d),
        x_type=_extension.DTYPE_CODE[x[0]],
        given_type=_extension.DTYPE_CODE[given[0]],
        points_type=_extension.DTYPE_CODE[points[0]],
    )
    return plan
