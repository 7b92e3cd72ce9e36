"""pack_points and random_start with checked options: check the tensors, choose a backend, call it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from elle_fast import backends
from elle_fast._core import checks
from elle_fast.ops import dispatch
from elle_fast.ops.pack_points import reference
from elle_fast.ops.pack_points.schema import PACK_POINTS, RANDOM_START
from elle_fast.ops.pack_points.validation import Packing, check_out, check_start, check_tensors


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    packing: Packing,
    *,
    seed: Tensor,
    x_adv: Tensor | None = None,
    alpha: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`elle_fast.functional.pack_points`, with its options as a :class:`Packing`."""
    check_tensors(x, grad, x_adv, alpha, seed, packing)
    given = x_adv if grad is None else grad
    wrapped = checks.wrapped(x, given, alpha)
    if out is not None:
        check_out(out, x, given, alpha, seed, packing)
        wrapped = wrapped or checks.wrapped(*out)
    dtypes = x.dtype, None if given is None else given.dtype, packing.dtype
    name = backends.choose(backend, x.device, ("x", "grad or x_adv", "dtype"), dtypes, True, wrapped)
    # An argument of the operator: a tensor that it made and kept would lie in the memory of a captured graph.
    arguments = x, grad, x_adv, alpha, seed, statistics(packing, x.device), packing
    packed: tuple[Tensor, Tensor]
    if name == "reference":
        with torch.no_grad():
            packed = reference.pack_points(x, grad, x_adv, alpha, seed, packing)
    elif out is None or not dispatch.eager(*arguments, *out):
        packed = PACK_POINTS(name, *arguments)
    else:
        packed = PACK_POINTS.kernel(name)(*arguments, out)
        dispatch.changed(out)
        return packed
    return packed if out is None else (out[0].copy_(packed[0]), out[1].copy_(packed[1]))


def random_start(x: Tensor, packing: Packing, *, seed: Tensor, backend: str = "auto") -> Tensor:
    """As :func:`elle_fast.functional.random_start`, with its options as a :class:`Packing`."""
    check_start(x, seed)
    if packing.memory_format != torch.preserve_format:  # of the points: the start keeps x's layout
        packing = packing._replace(memory_format=torch.preserve_format)
    name = backends.choose(backend, x.device, ("x",), (x.dtype,), True, checks.wrapped(x))
    if name == "reference" or packing.start == 0:  # x itself, which a kernel's sum with no noise is not: -0.0 + 0.0
        with torch.no_grad():
            return reference.random_start(x, seed, packing)
    return cast(Tensor, RANDOM_START(name, x, seed, packing))


def statistics(packing: Packing, device: torch.device) -> Tensor | None:
    """mean and 1 / std of each channel, float32 ``[2 C]`` on the device; ``None`` if nothing is normalized."""
    if packing.mean is None or packing.std is None:
        return None
    return reference.constant((*packing.mean, *(1.0 / std for std in packing.std)), torch.float32, device)
