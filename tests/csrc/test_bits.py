"""The reference's bits, signs of zeros among them."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from elle_fast import functional
from tests.csrc.cases import everywhere, used
from tests.helpers import Where, random, seed_of

X86 = platform.machine() in ("x86_64", "AMD64")


def bits(points: Tensor, signed_zeros: bool = True) -> Tensor:
    points = points if signed_zeros else points + 0.0
    return torch.where(points.isnan(), math.nan, points).view(torch.int32)


def cycled(values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values).repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].view(shape)


def check_bits(where: Where, x: Tensor, grad: Tensor | None, eps: float, **options: Any) -> None:
    runs = [
        [*functional.pack_points(x, grad, eps, seed=seed_of(3), backend=backend, **options)]
        for backend in ("reference", "cpp")
    ]
    if options.get("start"):
        kept = {name: options[name] for name in ("start", "bounds") if name in options}
        for run, backend in zip(runs, ("reference", "cpp"), strict=True):
            run.append(functional.random_start(x, eps, seed=seed_of(3), backend=backend, **kept))
    # On arm64 torch.clamp(-0.0, min=0.0) is 0.0 in a whole vector and -0.0 in the rest of a row; the kernels keep -0.0.
    clamped = options.get("bounds") is not None or options.get("project", False)
    signs = X86 or not clamped
    assert all(torch.equal(bits(one, signs), bits(other, signs)) for one, other in zip(*runs, strict=True))


# Around 2**-90 from where on radii are scaled, around 2**-95 from where on that is exact, and where they overflow.
NEAR = [math.nextafter(2.0**-90, 0), 2.0**-90, 2.0**-90 * (1 + 2.0**-23), 1.3 * 2.0**-96, 2.0**-126]
RADII = [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 1e-3, 8 / 255, 1.0, 3e38, *NEAR]


@everywhere
@pytest.mark.parametrize("eps", RADII)
@pytest.mark.parametrize(
    "options",
    [{}, {"start": 1.0}, {"start": 2.0, "project": True}, {"bounds": (-0.5, 0.5)}, {"points": "elle-2p"}],
    ids=str,
)
def test_points_have_the_references_bits_for_every_radius(where, eps, options):
    x = cycled([0.0, -0.0, 1e-45, -1e-40, 0.25, -1.0, eps, -eps, 2 * eps, 1e-30, -1e30], 2, 3, 40, 31)
    grad = random(2, 3, 40, 31, seed=2) - 0.5
    if options.get("start", 1) * eps > 3e38:
        pytest.skip("start * eps is refused")
    with used(where):
        check_bits(where, x, grad, eps, step_size=0.1, **options)
        check_bits(where, x, None, eps, **{**options, "points": "elle"})


@contextmanager
def flushing(denormals: bool) -> Iterator[None]:
    if denormals and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@everywhere
@pytest.mark.parametrize("step_size", [0.0, 1e-45, 1e-40, 1e-3, 1.0, 3e38])
@pytest.mark.parametrize("flush", [False, True], ids=["denormals", "flushed"])
def test_steps_have_the_references_bits_for_every_gradient(where, step_size, flush):
    """Each x, zeros of both signs among them, beside each kind of gradient, with both kinds of NaN."""
    numbers = [0.0, 1e-45, 1e-40, 2.0**-126, 0.5, 1.0, 1.5, 3e38, math.inf]
    words = [0x7F800001, 0x7FC00000, 0xFF800001 - 2**32, 0xFFC00000 - 2**32]
    nans = torch.tensor(words, dtype=torch.int32).view(torch.float32)
    grad = torch.cat((torch.tensor(numbers), -torch.tensor(numbers), nans)).repeat(13 * 9).view(1, -1)
    x = cycled(
        [0.0, -0.0, 1e-45, -1e-45, 1e-40, step_size, -step_size, 0.3, -1.0, 1e-3, 2.0**-126, 0.7, -0.1], *grad.shape
    )
    with used(where), flushing(flush):
        for options in ({}, {"start": 1.0}, {"project": True}, {"bounds": (0.0, 0.5)}, {"triplets": 0}):
            check_bits(where, x, grad, 0.1, step_size=step_size, **options)
