"""The operators of pack_points and random_start: schemas, and shapes without data."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast.ops import dispatch
from elle_fast.ops.pack_points.validation import Packing


def new_results(x: Tensor, given: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
    """Memory for points and alpha, float32. ``given``: grad or x_adv."""
    shape = packing.rows(x.shape[0], adv=given is not None), *x.shape[1:]
    dtype, memory_format = packing.dtype or x.dtype, packing.output_format(x)
    points = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
    return points, torch.empty(packing.residuals(x.shape[0]), dtype=torch.float32, device=x.device)


def _pack_points_fake(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    return new_results(x, x_adv if grad is None else grad, packing)


def _random_start_fake(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    return torch.empty_like(x, memory_format=packing.output_format(x))


PACK_POINTS = dispatch.Op(
    "pack_points",
    # Not alpha, which is the name of an option.
    "Tensor x, Tensor? grad, Tensor? x_adv, Tensor? given_alpha, Tensor seed, Tensor? statistics",
    (Packing,),
    "(Tensor, Tensor)",
    _pack_points_fake,
    folder="pack_points",
)
RANDOM_START = dispatch.Op(
    "random_start", "Tensor x, Tensor seed", (Packing,), "Tensor", _random_start_fake, folder="pack_points"
)
