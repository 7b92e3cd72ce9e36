"""pack_points against its re-statement: every shape, dtype and option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from elle_fast.ops.layout import BLOCKS
from tests.helpers import (
    matrix,
    random,
    same_values,
    seed_of,
    unit_roundoff,
)
from tests.ops.pack_points.cases import DTYPES, EPS, ORACLE, SEED, SHAPES, check_packing


@matrix(share=0.4, norm=["linf", "l2"], shape=SHAPES, dtype=DTYPES)
def test_shapes_and_dtypes(where, norm, shape, dtype):
    x, grad = random(*shape, seed=1, dtype=dtype), (random(*shape, seed=2) - 0.5).to(dtype)
    check_packing(where, x, grad=grad, norm=norm, start=1.0, project=True, step_size=1.25 * EPS)


OPTIONS: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "step": {"step_size": 0.7 * EPS},
    "n-fgsm": {"start": 2.0, "bounds": (0.0, 1.0)},
    "rs-fgsm": {"start": 1.0, "step_size": 1.25 * EPS, "project": True, "bounds": (0.0, 1.0)},
    "project alone": {"step_size": 3 * EPS, "project": True},
    "bounds": {"bounds": (0.3, 0.7)},
    "normalised": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    "normalised in bounds": {"mean": (0.4, 0.5, -2), "std": (2, 0.25, 0.3), "bounds": (0.1, 0.9), "start": 1.0},
    "elle-2p": {"points": "elle-2p"},
    "elle-2p twice": {"points": "elle-2p", "triplets": 2, "fraction": 0.5},
    "five-point": {"points": "five-point", "bounds": (0.2, 0.8)},
    "five-point three times": {"points": "five-point", "triplets": 3},
    "three triplets": {"triplets": 3},
    "attack alone": {"triplets": 0, "start": 1.0},
    "half": {"alpha": "half"},
    "fraction": {"fraction": 0.4},
    "fraction, triplets": {"fraction": 0.01, "triplets": 2, "alpha": "half"},
    "offset": {"sample_offset": 1000, "start": 1.0},
    "float16 out": {"dtype": torch.float16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    "bfloat16 out": {"dtype": torch.bfloat16, "start": 1.0},
    "no step": {"step_size": 0.0},
    "eps 0": {"eps": 0.0, "start": 1.0, "project": True},
}


@matrix(share=0.2, dtype=[torch.float32, torch.float64, torch.bfloat16], norm=["linf", "l2"], name=OPTIONS)
def test_options(where, dtype, norm, name):
    x, grad = random(4, 3, 5, seed=3, dtype=dtype), (random(4, 3, 5, seed=4) - 0.5).to(dtype)
    options = OPTIONS[name]
    points = check_packing(where, x, grad=grad, norm=norm, **options)
    part = math.ceil(options.get("fraction", 1.0) * 4)
    assert points.shape[0] == 4 + BLOCKS[options.get("points", "elle")] * options.get("triplets", 1) * part


@matrix(
    share=0.0,
    norm=["linf", "l2"],
    points=list(BLOCKS),
    covered=[(1, 1.0), (2, 0.5)],
    attack=[(0.0, False), (1.0, True)],
    bounds=[None, (0.25, 0.75)],
    normalised=[False, True],
    channels_last=[False, True],
)
def test_options_together(where, norm, points, covered, attack, bounds, normalised, channels_last):
    """In the table above an option has few others beside it."""
    x, grad = random(3, 3, 2, 3, seed=3), random(3, 3, 2, 3, seed=4) - 0.5
    options: dict[str, Any] = {"norm": norm, "points": points, "bounds": bounds, "step_size": 1.25 * EPS}
    options.update(zip(("triplets", "fraction", "start", "project"), covered + attack, strict=True))
    if channels_last:
        options["memory_format"] = torch.channels_last
    if normalised:
        options.update(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
    check_packing(where, x, grad=grad, **options)


MIXED = [
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float64, torch.float32, torch.float16),
    (torch.float32, torch.float64, torch.float64),
    (torch.float16, torch.float32, torch.float64),
]


@matrix(share=0.5, norm=["linf", "l2"], dtypes=MIXED, given=["grad", "x_adv"])
def test_mixed_dtypes(where, norm, dtypes, given):
    dtype, given_dtype, out = dtypes
    x = random(2, 3, 4, 4, seed=27, dtype=dtype)
    options: dict[str, Any] = {given: (random(2, 3, 4, 4, seed=28) - 0.5).to(given_dtype)}
    if given == "grad":
        options["start"] = 1.0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        check_packing(where, x, norm=norm, dtype=out, memory_format=memory_format, **options)


@matrix()
@pytest.mark.parametrize("options", [{}, {"points": "five-point"}, {"triplets": 2, "fraction": 0.5}], ids=str)
def test_the_triplets_alone(where, options):
    x = random(4, 6, seed=5)
    with_attack = check_packing(where, x, grad=torch.ones_like(x), **options)
    alone = check_packing(where, x, **options)
    assert torch.equal(alone, with_attack[4:])


@matrix()
@pytest.mark.parametrize("points", ["elle", "elle-2p"])
@pytest.mark.parametrize("alpha_dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_given_alpha(where, points, alpha_dtype):
    x = random(3, 5, seed=6)
    alpha = random(6, seed=7, dtype=alpha_dtype).to(torch.bfloat16).to(alpha_dtype)
    alpha[0], alpha[1] = 0, 1
    packed = check_packing(where, x, grad=torch.ones_like(x), points=points, alpha=alpha, triplets=2)
    strided = torch.stack((alpha, alpha + 1), dim=1)[:, 0]
    again = check_packing(where, x, grad=torch.ones_like(x), points=points, alpha=strided, triplets=2)
    assert torch.equal(again, packed)
    x_c = packed[3:].view(2, -1, 5)[0, -3:]
    x_a = packed[3:6]
    x_b = packed[6:9] if points == "elle" else packed[:3]
    # 1 * v + 0 * w has no rounding.
    assert torch.equal(x_c[0], x_a[0])
    assert torch.equal(x_c[1], x_b[1])


@matrix(norm=["linf", "l2"], points=list(BLOCKS))
def test_given_x_adv_is_taken_as_it_is(where, norm, points):
    x, x_adv = random(3, 4, seed=8), 10 * random(3, 4, seed=9)
    packed = check_packing(where, x, x_adv=x_adv, points=points, bounds=(0.0, 1.0), norm=norm)
    assert torch.equal(packed[:3], x_adv)


@matrix(norm=["linf", "l2"])
def test_zero_gradient_gives_no_step(where, norm):
    x, grad = random(3, 5, seed=10), random(3, 5, seed=11) - 0.5
    grad[1] = 0
    grad[0, 2] = 0
    packed = check_packing(where, x, grad=grad, norm=norm)
    assert torch.equal(packed[1], x[1])
    assert packed[0, 2] == x[0, 2]
    # A tiny gradient is no zero gradient, nor is a huge one infinite: their squares leave float32's range.
    for factor in (1e-30, 1e30):
        scaled = check_packing(where, x, grad=grad * factor, norm=norm)
        # For l2 ten roundings of a direction on either side, and those of the product with the factor.
        torch.testing.assert_close(scaled, packed, rtol=22 * unit_roundoff(x.dtype) if norm == "l2" else 0, atol=0)


@matrix(dtype=DTYPES)
def test_values_that_are_not_finite(where, dtype):
    """NaN and infinity of x and the gradient reach the points as they do in torch, and no other element."""
    x, grad = random(3, 3, 5, seed=29, dtype=dtype), (random(3, 3, 5, seed=30) - 0.5).to(dtype)
    x[0, 0, 0], x[0, 1, 1], x[1, 0, 2] = math.nan, math.inf, -math.inf
    grad[0, 2, 0], grad[1, 1, 1], grad[2, 0, 2], grad[2, 0, 3] = math.nan, math.inf, -math.inf, -0.0
    for options in ({}, {"start": 1.0, "project": True, "bounds": (0.0, 1.0)}):
        packed, alpha = where.pack_points(x, grad, EPS, seed=seed_of(SEED), **options)
        expected, expected_alpha = ORACLE.pack_points(x, grad, EPS, seed=seed_of(SEED), **options)
        assert packed.isnan().any()
        assert same_values(packed, expected)
        assert torch.equal(alpha, expected_alpha)
