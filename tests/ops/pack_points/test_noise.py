"""The noise is a function of seed, sample and element only."""

from __future__ import annotations

import math
from typing import Any

import torch

from elle_fast.functional import draw_seed
from tests.helpers import (
    matrix,
    random,
    rng,
    seed_of,
    unit_roundoff,
)
from tests.ops.pack_points.cases import DTYPES, EPS, ORACLE, VIEWS, check_packing, unusual_views


@matrix(norm=["linf", "l2"], dtype=DTYPES)
def test_noise_does_not_depend_on_dtype(where, norm, dtype):
    # At x = 0 and eps = 1 the points are the noise.
    exact = torch.zeros(3, 41, dtype=torch.float64)
    expected, _ = ORACLE.pack_points(exact, None, 1.0, seed=seed_of(9), norm=norm)
    noise, _ = where.pack_points(exact.to(dtype), None, 1.0, seed=seed_of(9), norm=norm)
    # float32 arithmetic (16 + 41/2 roundings for l2, none for x_a and x_b of linf), then one rounding to dtype.
    bound = unit_roundoff(dtype) + 40 * unit_roundoff(torch.float32)
    assert (noise.double() - expected).abs().max().item() <= bound
    if norm == "linf" and dtype == torch.float32:
        assert torch.equal(noise[:6].double(), expected[:6])


@matrix()
def test_directions_of_the_ball_are_accurate(where):
    """In two dimensions, where a sample's noise is (cos, sin) of one angle times a radius."""
    x = torch.zeros(1024, 2)
    packed, _ = where.pack_points(x, None, 1.0, seed=seed_of(12), norm="l2")
    expected, _ = ORACLE.pack_points(x.double(), None, 1.0, seed=seed_of(12), norm="l2")
    # On numbers below 1: 3 of cosine or sine and their product with a length, 4 of the squares and their root, 2 of the
    # division, 4 of the radius and its product. The angle itself, up to 2 pi, is rounded twice by the reference.
    roundings = 13 + (2 * 2 * math.pi if where.backend == "reference" else 0)
    assert (packed.double() - expected)[:2048].abs().max().item() <= roundings * unit_roundoff(torch.float32)


@matrix(norm=["linf", "l2"], cut=[1, 2])
def test_noise_does_not_depend_on_the_batch_split(where, norm, cut):
    x, grad = random(4, 9, seed=16), random(4, 9, seed=17) - 0.5
    options: dict[str, Any] = {"seed": seed_of(1), "start": 1.0, "triplets": 2, "norm": norm}
    whole, alpha = where.pack_points(x, grad, EPS, **options)
    # For l2 another order of summation: twice 16 + d/2 roundings of the noise, and two of the point (below 1.1).
    bound = 2 * ((16 + 9 / 2) * EPS + 2 * 1.1) * unit_roundoff(torch.float32)
    for part, offset in ((slice(0, cut), 0), (slice(cut, 4), cut)):
        rows, part_alpha = where.pack_points(x[part], grad[part], EPS, sample_offset=offset, **options)
        expected = whole.view(7, 4, 9)[:, part].flatten(0, 1)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0 if norm == "linf" else bound)
        assert torch.equal(part_alpha, alpha.view(2, 4)[:, part].flatten())


@matrix(norm=["linf", "l2"])
def test_the_last_samples_that_have_a_number(where, norm):
    """A sample's number has 32 bits unsigned, though an offset has 31."""
    x, grad = random(3, 5, seed=32), random(3, 5, seed=33) - 0.5
    check_packing(where, x, grad=grad, start=1.0, norm=norm, sample_offset=2**31 - 1)


@matrix(norm=["linf", "l2"], seed=[0, -1, 2**31, 2**32 + 5, 2**63 - 1, -(2**63)])
def test_seeds_of_64_bits(where, norm, seed):
    check_packing(where, random(2, 7, seed=34), grad=random(2, 7, seed=35) - 0.5, start=1.0, norm=norm, seed=seed)


@matrix(norm=["linf", "l2"])
def test_same_seed_same_bits_and_other_seeds_other_noise(where, norm):
    x, grad = random(3, 4, 5, seed=18), random(3, 4, 5, seed=19) - 0.5
    runs = [where.pack_points(x, grad, EPS, seed=seed_of(s), start=2.0, norm=norm) for s in (3, 3, 4)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert (runs[0][0] != runs[2][0]).float().mean().item() > 0.99
    assert (runs[0][1] != runs[2][1]).all()


@matrix(
    share=0.3, dtype=DTYPES, norm=["linf", "l2"], box=[None, (0.25, 0.75)], shape=[(3, 3, 5), (2, 3, 4, 5), (2, 1134)]
)
def test_random_start_is_drawn_again_by_pack_points(where, dtype, norm, box, shape):
    x = random(*shape, seed=20, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    noise: dict[str, Any] = {"seed": seed_of(8), "start": 2.0, "bounds": box, "norm": norm}
    start = where.random_start(x, EPS, **noise)
    packed, alpha = where.pack_points(x, torch.zeros_like(x), EPS, triplets=0, **noise)
    assert (start.dtype, start.shape, start.stride()) == (x.dtype, x.shape, x.stride())
    assert torch.equal(start, packed)
    assert alpha.shape == (0,)
    if norm == "linf":
        assert torch.equal(start, ORACLE.random_start(x, EPS, **noise))


@matrix(norm=["linf", "l2"])
def test_without_a_start_x_stays_as_it_is_whatever_the_bounds(where, norm):
    x = random(2, 3, 5, seed=31)
    start = where.random_start(x, EPS, seed=seed_of(1), start=0.0, bounds=(0.3, 0.7), norm=norm)
    assert torch.equal(start, x)


@matrix(norm=["linf", "l2"], view=VIEWS)
def test_random_start_of_views(where, norm, view):
    x = random(2, 3, 7, 5, seed=36)
    options: dict[str, Any] = {"seed": seed_of(8), "norm": norm, "sample_offset": 5}
    plain, start = (where.random_start(v, EPS, **options) for v in (x, unusual_views(x)[view]))
    assert start.is_contiguous(memory_format=torch.channels_last) == (view == "channels_last")
    # As in test_views.
    bound = 0 if norm == "linf" else (105 * EPS + 2 * 1.1) * unit_roundoff(torch.float32)
    assert (start - plain).abs().max().item() <= bound


def test_draw_seed_follows_torchs_generator():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    again = draw_seed(torch.device("cpu"))
    own = draw_seed(torch.device("cpu"), rng(3))
    assert first == again == own
    assert first != second
    assert (first.dtype, first.dim()) == (torch.int64, 0)
    assert 0 <= first.item() < 2**63
