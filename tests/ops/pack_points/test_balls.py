"""Points stay in their balls and bounds, and are distributed as they should be."""

from __future__ import annotations

import math
from typing import Any

import torch

from tests.helpers import (
    matrix,
    pair_word,
    random,
    seed_of,
    unit,
    unit_roundoff,
)
from tests.ops.pack_points.cases import DTYPES, EPS, ORACLE, SEED


@matrix(dtype=DTYPES)
def test_linf_points_stay_in_the_ball_and_the_bounds(where, dtype):
    x, grad = random(8, 3, 9, seed=21, dtype=dtype), (random(8, 3, 9, seed=22) - 0.5).to(dtype)
    options: dict[str, Any] = {"start": 1.0, "step_size": 1.25 * EPS, "project": True}
    packed, _ = where.pack_points(x, grad, EPS, seed=seed_of(1), **options)
    # One rounding of a value below 1.05 in float32 (or float64), one to the output's dtype.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    slack = 1.05 * (3 * unit_roundoff(work) + (unit_roundoff(dtype) if dtype != work else 0))
    offsets = (packed.double().view(4, 8, 3, 9) - x.double()).abs()
    assert offsets.max().item() <= EPS + slack
    # And the projection bites: some of the x_adv lie on the surface.
    assert (offsets[0] > EPS - slack).any()
    packed, _ = where.pack_points(x, grad, 0.5, seed=seed_of(1), bounds=(0.25, 0.75), **options)
    assert packed[:24].min().item() == 0.25
    assert packed[:24].max().item() == 0.75
    assert packed[24:].min().item() >= 0.25 - unit_roundoff(dtype)
    assert packed[24:].max().item() <= 0.75 + unit_roundoff(dtype)


@matrix()
def test_linf_noise_reaches_both_ends_and_is_uniform(where):
    n = 1 << (14 if where.slow else 17)
    packed, _ = where.pack_points(torch.zeros(2, n), None, 1.0, seed=seed_of(5))
    x_a, x_b, _ = packed.double().view(3, 2, n)
    for noise in (x_a, x_b):
        assert noise.min().item() >= -1
        assert noise.max().item() < 1
        # P(no draw of 2n within 13/n of an end) = exp(-13) = 2e-6.
        assert noise.min().item() < -1 + 13 / n
        assert noise.max().item() > 1 - 13 / n
        assert abs(noise.mean().item()) < 5 * math.sqrt(1 / 3 / noise.numel())
        # Var of v**2 for v in U(-1, 1) is 1/5 - 1/9 = 4/45.
        assert abs(noise.square().mean().item() - 1 / 3) < 5 * math.sqrt(4 / 45 / noise.numel())
    assert abs((x_a * x_b).mean().item()) < 5 / 3 / math.sqrt(x_a.numel())


def kolmogorov_smirnov(values: torch.Tensor) -> float:
    """sqrt(n) sup |F_n - F| against U(0, 1); its tail is 2 exp(-2 t**2), 1e-4 at t = 2.23."""
    ordered, n = values.sort().values, values.numel()
    places = torch.arange(n, dtype=torch.float64)
    gap = torch.maximum((places + 1) / n - ordered, ordered - places / n).max().item()
    return math.sqrt(n) * gap


@matrix(d=[1, 2, 3, 8, 33])
def test_l2_ball_is_uniform(where, d):
    n, eps = 300 if where.slow else 4000, 0.3
    x = torch.zeros(n, d, dtype=where.exact)
    packed, alpha = where.pack_points(x, None, eps, seed=seed_of(6), norm="l2")
    x_a, x_b, _ = packed.double().view(3, n, d) / eps
    start = where.random_start(x, eps, seed=seed_of(6), norm="l2").double() / eps
    assert kolmogorov_smirnov(alpha.double()) < 2.23
    for noise in (x_a, x_b, start):
        radius = noise.norm(dim=1)
        # On a radius below 1: d / 2 of the squares' sum, 3 of the length, 2 of the root, 3 of the scale, 1 of eps.
        assert radius.max().item() <= 1 + (d / 2 + 9) * unit_roundoff(where.exact)
        assert kolmogorov_smirnov(radius**d) < 2.23
        # The direction has mean zero and E[v_i**2] = 1/d, E[v_i**4] <= 3/d**2, in every coordinate.
        direction = noise / radius[:, None]
        assert direction.mean(dim=0).abs().max().item() < 5 / math.sqrt(d * n)
        assert (direction.square().mean(dim=0) - 1 / d).abs().max().item() <= 5 * math.sqrt(2) / d / math.sqrt(n)
    for one, other in ((x_a, x_b), (x_a, start), (x_b, start)):
        # Var of (u . v) is at most 1/d for independent vectors in the unit ball.
        assert abs((one * other).sum(dim=1).mean().item()) < 5 / math.sqrt(d * n)
        # And their lengths are independent: products of two centred uniforms.
        centred = (one.norm(dim=1) ** d - 0.5) * (other.norm(dim=1) ** d - 0.5)
        assert abs(centred.mean().item()) < 5 / 12 / math.sqrt(n)


@matrix()
def test_triplets_are_independent(where):
    n = 1 << (12 if where.slow else 14)
    packed, alpha = where.pack_points(torch.zeros(4, n), None, 1.0, seed=seed_of(7), triplets=3)
    ends = packed.double().view(3, 3, 4, n)[:, :2].flatten(0, 1).flatten(1)
    products = ends @ ends.T / ends.shape[1]
    off_diagonal = products - products.diag().diag()
    assert off_diagonal.abs().max().item() < 5 / 3 / math.sqrt(ends.shape[1])
    assert len(set(alpha.tolist())) == 12


@matrix()
def test_one_large_sample(where):
    x = random(1, 3, 257, 259, seed=23)
    packed, alpha = where.pack_points(x, x - 0.5, EPS, seed=seed_of(SEED))
    assert packed.shape == (4, 3, 257, 259)
    last = x[0].numel() - 1
    for which, row in ((0, 1), (1, 2)):
        expected = x.flatten()[last].item() + EPS * (2 * unit(pair_word(SEED, 0, last, 0, which)) - 1)
        # Two roundings in float32 of values below 1.05.
        assert abs(packed[row].flatten()[last].item() - expected) <= 2 * 1.05 * unit_roundoff(torch.float32)
    # Three roundings on either side.
    bound = 2 * 3 * 1.05 * unit_roundoff(torch.float32)
    torch.testing.assert_close(packed[3], (1 - alpha) * packed[1] + alpha * packed[2], rtol=0, atol=bound)
    if where != ORACLE:
        assert torch.equal(packed, ORACLE.pack_points(x, x - 0.5, EPS, seed=seed_of(SEED))[0])
