"""pack_points as a PyTorch operator: schema, shapes without data, and the call of the backend below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from elle_fast.ops import dispatch
from elle_fast.ops.pack_points.reference import constant
from elle_fast.ops.pack_points.validation import Call, Packing, output_format, packed_rows

# The options are the fields of Packing, in their order.
_OPTIONS = (
    "float eps, float step_size, float start, bool project, float[]? bounds, float[]? mean, float[]? std, str norm, "
    "str points, int triplets, str alpha_mode, float fraction, ScalarType? dtype, MemoryFormat memory_format, "
    "int sample_offset"
)


def _packing(options: Sequence[Any]) -> Packing:
    # The dispatcher hands sequences over as lists; a Packing has to be hashable.
    return Packing._make([tuple(option) if isinstance(option, list) else option for option in options])


def statistics(packing: Packing, device: torch.device) -> Tensor | None:
    """mean and 1 / std of each channel, float32 ``[2 C]`` on the device; ``None`` if nothing is normalised.

    An argument of the operator: a tensor that it made and kept would lie in the memory of a captured graph.
    """
    if packing.mean is None or packing.std is None:
        return None
    return constant((*packing.mean, *(1.0 / std for std in packing.std)), torch.float32, device)


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    call: Call,
    backend: str,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What ``backend`` makes of it, in ``out`` if given; by way of the operator where somebody has to see it."""
    packing = call.packing
    channels = statistics(packing, x.device)
    if dispatch.eager(x):
        packed = dispatch.function("pack_points", backend)(x, grad, x_adv, alpha, seed, channels, call, out)
        if out is not None:
            dispatch.changed(out)
    else:
        packed = _PACK_POINTS(x, grad, x_adv, alpha, seed, channels, backend, *packing)
        if out is not None:
            packed = tuple(kept.copy_(new) for kept, new in zip(out, packed, strict=True))
    return cast("tuple[Tensor, Tensor]", packed)


def random_start(x: Tensor, seed: Tensor, call: Call, backend: str) -> Tensor:
    """Likewise."""
    if dispatch.eager(x):
        start = dispatch.function("random_start", backend)(x, seed, call)
    else:
        start = _RANDOM_START(x, seed, backend, *call.packing)
    return cast(Tensor, start)


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
    kernel = dispatch.function("pack_points", backend)
    call = Call(_packing(options), (), False, {})  # checked before the operator was called
    points, alphas = kernel(x, grad, x_adv, alpha, seed, statistics, call)
    return points, alphas


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
    packing = _packing(options)
    rows, residuals = packed_rows(x.shape[0], grad is not None or x_adv is not None, packing)
    points = torch.empty(
        (rows, *x.shape[1:]),
        dtype=packing.dtype or x.dtype,
        device=x.device,
        memory_format=output_format(x, packing),
    )
    return points, x.new_empty(residuals, dtype=torch.float32)


def _random_start(x: Tensor, seed: Tensor, backend: str, *options: Any) -> Tensor:
    call = Call(_packing(options), (), False, {})
    start: Tensor = dispatch.function("random_start", backend)(x, seed, call)
    return start


def _random_start_fake(x: Tensor, seed: Tensor, backend: str, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=output_format(x, _packing(options)))


_PACK_POINTS = dispatch.register(
    "pack_points(Tensor x, Tensor? grad, Tensor? x_adv, Tensor? alpha, Tensor seed, Tensor? statistics, str backend, "
    f"{_OPTIONS}) -> (Tensor, Tensor)",
    _pack_points,
    _pack_points_fake,
)
_RANDOM_START = dispatch.register(
    f"random_start(Tensor x, Tensor seed, str backend, {_OPTIONS}) -> Tensor", _random_start, _random_start_fake
)
