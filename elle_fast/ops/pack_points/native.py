"""pack_points in the compiled extension, on the CPU and on CUDA alike. The kernels: csrc/.

A plan holds all of a call but its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from elle_fast.backends import extension
from elle_fast.backends.device import on_device
from elle_fast.ops import layout
from elle_fast.ops.pack_points.launch import Form, prepare, prepare_start
from elle_fast.ops.pack_points.schema import PACK_POINTS, RANDOM_START
from elle_fast.ops.pack_points.validation import Packing

if TYPE_CHECKING:
    from elle_fast._C import Pack

# Codes of csrc/common/plans.h.
NORM = {"linf": 0, "l2": 1}
ADV = {"none": 0, "step": 1, "given": 2, "start": 3}  # "start": the attack's start alone
ALPHA = {"uniform": 0, "half": 1, "given": 2}


def pack_points(
    device: str,
    where: Callable[[Tensor], int],
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    packing: Packing,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``.

    Args:
        device: whose kernels run, ``"cpu"`` or ``"cuda"``.
        where: what gives the number of threads, or the stream on a tensor's device.
        x, grad, x_adv, alpha, seed, packing, out: see validation.py.
        statistics: mean and 1 / std of each channel.
    """
    tensors, form = prepare(x, grad, x_adv, alpha, seed, packing, out)
    plan = PACK_POINTS.plan(_plan, form, packing)
    with on_device(x):
        plan.pack(
            device,
            tensors.x.data_ptr(),
            0 if tensors.given is None else tensors.given.data_ptr(),
            0 if tensors.alpha is None else tensors.alpha.data_ptr(),
            tensors.seed.data_ptr(),
            0 if statistics is None else statistics.data_ptr(),
            tensors.points.data_ptr(),
            tensors.alphas.data_ptr(),
            where(x),
        )
    return tensors.points, tensors.alphas


def random_start(device: str, where: Callable[[Tensor], int], x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    tensors, form = prepare_start(x, seed, packing)
    plan = RANDOM_START.plan(_start_plan, form, packing)
    x, start = tensors.x, tensors.points
    with on_device(x):
        plan.pack(device, x.data_ptr(), 0, 0, tensors.seed.data_ptr(), 0, start.data_ptr(), 0, where(x))
    return start


def _start_plan(form: Form, packing: Packing) -> Pack:
    """The start is in x's own units."""
    options = packing._replace(points="elle", alpha="half", triplets=0, mean=None, std=None)
    return _plan(form, options, "start")


def _plan(form: Form, packing: Packing, adv: str | None = None) -> Pack:
    """``adv``: what the rows of x_adv are, if the form does not tell."""
    shape, (low, high) = form.shape, packing.bounds or (0.0, 0.0)
    plan: Pack = extension.loaded().Pack(
        batch=shape[0],
        part=packing.part(shape[0]),
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
        adv=ADV[adv or form.adv],
        points=layout.POINTS_CODE[packing.points],
        alpha=ALPHA[form.alpha(packing)],
        start=packing.start != 0,
        project=packing.project,
        normalize=packing.mean is not None,
        x_last=form.x_last,
        given_last=form.given_last,
        points_last=form.points_last,
        x_type=extension.DTYPE_CODE[form.x],
        given_type=extension.DTYPE_CODE[form.given or form.x],
        points_type=extension.DTYPE_CODE[form.points],
    )
    return plan
