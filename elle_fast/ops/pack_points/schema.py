"""The operators of pack_points and random_start: schemas, and shapes without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elle_fast.ops import dispatch
from elle_fast.ops.pack_points.validation import Packing

_OPTIONS = dispatch.fields_of(Packing).replace("str alpha,", "str alpha_mode,")  # beside the tensor of that name


def _pack_points(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    backend: str,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    packing = Packing(*dispatch.hashable(options))
    packed: tuple[Tensor, Tensor] = PACK_POINTS.kernel(backend)(x, grad, x_adv, alpha, seed, statistics, packing)
    return packed


def _pack_points_fake(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    backend: str,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    packing = Packing(*dispatch.hashable(options))
    shape = packing.rows(x.shape[0], adv=grad is not None or x_adv is not None), *x.shape[1:]
    dtype, memory_format = packing.dtype or x.dtype, packing.output_format(x)
    points = torch.empty(shape, dtype=dtype, device=x.device, memory_format=memory_format)
    return points, x.new_empty(packing.residuals(x.shape[0]), dtype=torch.float32)


def _random_start(x: Tensor, seed: Tensor, backend: str, *options: Any) -> Tensor:
    start: Tensor = RANDOM_START.kernel(backend)(x, seed, Packing(*dispatch.hashable(options)))
    return start


def _random_start_fake(x: Tensor, seed: Tensor, backend: str, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=Packing(*dispatch.hashable(options)).output_format(x))


PACK_POINTS = dispatch.Op(
    "pack_points(Tensor x, Tensor? grad, Tensor? x_adv, Tensor? alpha, Tensor seed, Tensor? statistics, str backend, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _pack_points,
    _pack_points_fake,
    folder="pack_points",
)
RANDOM_START = dispatch.Op(
    f"random_start(Tensor x, Tensor seed, str backend, {_OPTIONS}) -> Tensor",
    _random_start,
    _random_start_fake,
    folder="pack_points",
)
