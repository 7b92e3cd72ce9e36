"""What every kernel of pack_points is given: dense tensors, memory for the results, and what a plan depends on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from elle_fast.ops import layout
from elle_fast.ops.pack_points.schema import new_results
from elle_fast.ops.pack_points.validation import Packing


class Form(NamedTuple):
    """What a plan depends on beside the options: the tensors as the kernel reads and writes them."""

    shape: torch.Size  # of x
    x: torch.dtype
    x_last: bool  # channels last in memory
    given: torch.dtype | None  # of grad or x_adv
    given_last: bool
    step: bool  # given is the gradient that the attack steps along, not x_adv
    alpha_given: bool
    points: torch.dtype
    points_last: bool

    def alpha(self, packing: Packing) -> str:
        """Where alpha comes from: ``"uniform"``, ``"half"`` or ``"given"``."""
        return "given" if self.alpha_given else "half" if packing.points == "five-point" else packing.alpha

    @property
    def adv(self) -> str:
        """Where the rows of x_adv come from: ``"none"``, ``"step"`` or ``"given"``."""
        return "none" if self.given is None else "step" if self.step else "given"


class Tensors(NamedTuple):
    """The tensors of a launch, all dense."""

    x: Tensor
    given: Tensor | None
    alpha: Tensor | None
    seed: Tensor
    points: Tensor
    alphas: Tensor


def prepare(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    packing: Packing,
    out: tuple[Tensor, Tensor] | None,
) -> tuple[Tensors, Form]:
    """The tensors of a launch of pack_points, checked before, and its form."""
    given, memory_format = x_adv if grad is None else grad, packing.output_format(x)
    points, alphas = new_results(x, given, packing) if out is None else out
    x, x_last = layout.dense(x, memory_format)
    given_last = x_last
    if given is not None:
        given, given_last = layout.dense(given, memory_format)
    if alpha is not None:
        alpha = alpha.to(torch.float32).resolve_neg().contiguous()
    form = Form(
        shape=x.shape,
        x=x.dtype,
        x_last=x_last,
        given=None if given is None else given.dtype,
        given_last=given_last,
        step=grad is not None,
        alpha_given=alpha is not None,
        points=points.dtype,
        points_last=not points.is_contiguous(),
    )
    return Tensors(x, given, alpha, seed.resolve_neg(), points, alphas), form


def prepare_start(x: Tensor, seed: Tensor, packing: Packing) -> tuple[Tensors, Form]:
    """The same for random_start: ``points`` is the start, in x's dtype and layout."""
    memory_format = packing.output_format(x)
    start = torch.empty_like(x, memory_format=memory_format)
    x, x_last = layout.dense(x, memory_format)
    last = not start.is_contiguous()
    if x_last != last:  # a copy without the negative bit may be channels-last where x is not
        x = x.contiguous(memory_format=memory_format)
    form = Form(x.shape, x.dtype, last, None, last, False, False, x.dtype, last)
    return Tensors(x, None, None, seed.resolve_neg(), start, start), form
