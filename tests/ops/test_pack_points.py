"""pack_points and random_start against an independent re-statement: numpy float64, words from Python's integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast.functional import draw_seed
from elle_fast.ops.layout import BLOCKS
from tests.helpers import (
    Where,
    let_kernels_write_nothing,
    matrix,
    pair_word,
    poison_uninitialised_memory,
    random,
    rng,
    same_values,
    sample_word,
    seed_of,
    start_word,
    unit,
    unit_roundoff,
)

SHAPES = [(1, 3, 7, 5), (3, 423), (4, 129), (2, 1134), (2, 3, 4, 5, 6), (5,), (1,), (2, 3, 8, 8)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEED, EPS = -(2**62) - 12345, 0.05
ORACLE = Where("reference", "cpu")

poisoned = pytest.fixture(autouse=True)(poison_uninitialised_memory)


# ---- The re-statement


def ball_noise(norm: str, words: list[int], radius_word: int, radius: float, elements: int) -> Any:
    if norm == "linf":
        return np.array([radius * (2 * unit(w) - 1) for w in words[:elements]])
    normal = []
    for first, second in zip(words[0::2], words[1::2], strict=True):
        length = math.sqrt(-2 * math.log(unit(first) + 2.0**-24))
        normal += [length * math.cos(2 * math.pi * unit(second)), length * math.sin(2 * math.pi * unit(second))]
    direction = np.array(normal[:elements])
    return direction / np.linalg.norm(direction) * radius * unit(radius_word) ** (1 / elements)


def restated(
    x: torch.Tensor,
    eps: float,
    *,
    grad: torch.Tensor | None = None,
    x_adv: torch.Tensor | None = None,
    seed: int = SEED,
    step_size: float | None = None,
    start: float = 0.0,
    project: bool = False,
    bounds: tuple[float, float] | None = None,
    mean: Any = None,
    std: Any = None,
    norm: str = "linf",
    points: str = "elle",
    triplets: int = 1,
    alpha: Any = "uniform",
    fraction: float = 1.0,
    sample_offset: int = 0,
) -> tuple[Any, Any]:
    """Points ``[rows, ...]`` and alpha, float64."""
    batch, elements = x.shape[0], x[0].numel()
    flat = x.double().reshape(batch, elements).numpy()
    part = math.ceil(fraction * batch)
    step = eps if step_size is None else step_size
    even = elements + elements % 2

    def clip(point: Any) -> Any:
        return point if bounds is None else np.clip(point, *bounds)

    def attacked(i: int) -> Any:
        assert grad is not None
        g = grad.double().reshape(batch, elements).numpy()[i]
        point = flat[i]
        if start:
            words = [start_word(seed, sample_offset + i, e) for e in range(even)]
            radius_word = sample_word(seed, sample_offset + i, 0, 3)
            point = clip(point + ball_noise(norm, words, radius_word, start * eps, elements))
        if norm == "linf":
            point = point + step * np.sign(g)
            if project:
                point = np.clip(point, flat[i] - eps, flat[i] + eps)
        else:
            point = point + (step * g / np.linalg.norm(g) if g.any() else 0)
            if project:
                length = np.linalg.norm(point - flat[i])
                point = flat[i] + (point - flat[i]) * min(1.0, eps / length) if length > 0 else point
        return clip(point)

    first: list[Any] = []
    if x_adv is not None:
        first = list(x_adv.double().reshape(batch, elements).numpy())
    elif grad is not None:
        first = [attacked(i) for i in range(batch)]

    blocks, alphas = [], []
    for t in range(triplets):
        names: dict[str, list[Any]] = {name: [] for name in ("a", "b", "c", "q1", "q2", "q3")}
        for i in range(part):
            sample = sample_offset + i
            ends = []
            for which in (0, 1):
                words = [pair_word(seed, sample, e, t, which) for e in range(even)]
                radius_word = sample_word(seed, sample, t, 1 + which)
                ends.append(clip(flat[i] + ball_noise(norm, words, radius_word, eps, elements)))
            a, b = ends[0], first[i] if points == "elle-2p" else ends[1]
            if isinstance(alpha, torch.Tensor):
                weight = alpha.double()[t * part + i].item()
            elif alpha == "uniform" and points != "five-point":
                weight = unit(sample_word(seed, sample, t, 0))
            else:
                weight = 0.5
            alphas.append(weight)
            for name, w in (("c", weight), ("q1", 0.25), ("q2", 0.5), ("q3", 0.75)):
                names[name].append((1 - w) * a + w * b)
            names["a"].append(a)
            names["b"].append(b)
        order = {"elle": ("a", "b", "c"), "elle-2p": ("a", "c"), "five-point": ("a", "q1", "q2", "q3", "b")}[points]
        blocks += [row for name in order for row in names[name]]
    packed = np.stack(first + blocks).reshape(-1, *x.shape[1:])
    if mean is not None:
        channel = (1, -1, *[1] * (x.dim() - 2))
        packed = (packed - np.reshape(mean, channel)) / np.reshape(std, channel)
    return packed, np.array(alphas)


def allowed_error(expected: Any, x: torch.Tensor, dtype: torch.dtype, reach: float, options: dict[str, Any]) -> Any:
    """Elementwise bound on the rounding errors, from the number of operations.

    In the working precision: at most 12 roundings of values no larger than max|x| + reach (noise 2, sum 1, step 2,
    projection 2, x_c 3, 1 - alpha 0, normalisation 2 + 2 for its constants, which scale as 1 / min std). The l2 ball
    adds the length: a worst-case sum of d squares, d/2 roundings after the root, and 16 for log, root, cosine (whose
    argument 2 pi u carries 2 pi * 2 roundings). Last, one rounding to the output's dtype, whose subnormals have an
    absolute error.
    """
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    largest = x.abs().max().item() + reach
    statistics = options.get("mean") is not None
    scale = (largest + max(map(abs, options["mean"]))) / min(options["std"]) if statistics else largest
    roundings = 12.0
    if options.get("norm") == "l2":
        roundings += 16 + x[0].numel() / 2
    # The re-statement itself rounds in float64.
    error = roundings * scale * (unit_roundoff(work) + unit_roundoff(torch.float64))
    return error + unit_roundoff(dtype) * (np.abs(expected) + error) + torch.finfo(dtype).smallest_normal * 2**-10


def check_packing(where: Where, x: torch.Tensor, eps: float = EPS, seed: int = SEED, **options: Any) -> torch.Tensor:
    layout = ("dtype", "memory_format")
    stated = {k: v for k, v in options.items() if k not in layout}
    expected, expected_alpha = restated(x, eps, seed=seed, **stated)
    grad = options.pop("grad", None)
    points, alpha = where.pack_points(x, grad, eps, seed=seed_of(seed), **options)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    dtype = options.get("dtype") or x.dtype
    assert (points.dtype, alpha.dtype) == (dtype, work)
    assert points.shape == expected.shape
    assert not points.requires_grad
    assert not alpha.requires_grad
    # u has 24 bits: exact in float32; a given alpha is representable in what it is converted to.
    assert alpha.tolist() == expected_alpha.tolist()
    reach = (1 + options.get("start", 0)) * eps + (options.get("step_size") or eps)
    error = np.abs(points.double().numpy() - expected)
    assert (error <= allowed_error(expected, x, dtype, reach, stated)).all(), error.max()
    if where != ORACLE and options.get("norm", "linf") == "linf" and options.get("mean") is None:
        # In the cube every operation is rounded on its own, in the same order.
        assert torch.equal(points, ORACLE.pack_points(x, grad, eps, seed=seed_of(seed), **options)[0])
    return points


# ---- Every shape, dtype, option


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


# ---- Layouts in memory


def unusual_views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)
    flat[1:] = x.reshape(-1)
    wide = torch.stack((x, x + 1), dim=-1)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "unaligned": flat[1:].view(x.shape),
        "strided": wide[..., 0],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "reversed batch": x.flip(0)[[1, 0]],
    }


VIEWS = list(unusual_views(torch.zeros(2, 3, 7, 5)))


@matrix(share=0.1, dtype=DTYPES, norm=["linf", "l2"], x_view=VIEWS, grad_view=VIEWS)
def test_views(where, dtype, norm, x_view, grad_view):
    x, grad = random(2, 3, 7, 5, seed=12, dtype=dtype), (random(2, 3, 7, 5, seed=13) - 0.5).to(dtype)
    plain = check_packing(where, x, grad=grad, norm=norm)
    views = unusual_views(x)[x_view], unusual_views(grad)[grad_view]
    packed, _ = where.pack_points(*views, EPS, seed=seed_of(SEED), norm=norm)
    assert packed.is_contiguous(memory_format=torch.channels_last) == (x_view == "channels_last")
    assert packed.is_contiguous() == (x_view != "channels_last")
    if norm == "linf":
        assert torch.equal(packed, plain)
    else:
        # Another order of summation in the lengths: d = 105 roundings at most, then one of the output's.
        bound = 105 * unit_roundoff(torch.float32) * EPS + 2 * unit_roundoff(dtype) * 1.1
        assert (packed - plain).abs().max().item() <= bound


@matrix()
def test_stride_zero(where):
    x = torch.tensor([[[0.2]], [[0.6]]]).expand(2, 3, 5)
    grad = torch.tensor([1.0]).expand(2, 3, 5)
    packed = check_packing(where, x, grad=grad)
    assert torch.equal(packed, check_packing(where, x.contiguous(), grad=grad.contiguous()))
    whole_batch = torch.tensor([[0.2, 0.5, 0.7]]).expand(4, 3)
    packed = check_packing(where, whole_batch, grad=torch.zeros(1, 1).expand(4, 3))
    assert len({tuple(row) for row in packed[4:8].tolist()}) == 4  # the same x, but a noise for each sample


FORMATS = [
    (torch.channels_last, (2, 3, 7, 5)),
    (torch.contiguous_format, (2, 3, 7, 5)),
    (torch.channels_last_3d, (2, 3, 4, 5, 6)),
    (torch.contiguous_format, (2, 3, 4, 5, 6)),
]


@matrix(share=0.3, norm=["linf", "l2"], form=FORMATS, x_last=[False, True], grad_last=[False, True])
def test_memory_format_asked_for(where, norm, form, x_last, grad_last):
    asked, shape = form
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x = random(*shape, seed=14)
    source = x.contiguous(memory_format=last) if x_last else x
    grad = (x - 0.5).contiguous(memory_format=last) if grad_last else x - 0.5
    packed = check_packing(where, source, grad=grad, memory_format=asked, norm=norm, start=1.0)
    assert packed.is_contiguous(memory_format=asked)
    if norm == "linf":
        assert torch.equal(packed, check_packing(where, x, grad=x - 0.5, start=1.0))


@matrix(shape=[(2, 1, 4, 4), (2, 5, 1, 1), (1, 1, 1, 1), (2, 1, 2, 3, 2)])
def test_formats_that_coincide(where, shape):
    """With one channel or one pixel a tensor is contiguous and channels-last at once."""
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x, channels = random(*shape, seed=31), shape[1]
    options: dict[str, Any] = {"mean": [0.5] * channels, "std": [i + 1.0 for i in range(channels)], "start": 1.0}
    for source in (x, x.contiguous(memory_format=last)):
        for asked in (torch.preserve_format, last):
            packed = check_packing(where, source, grad=x - 0.5, memory_format=asked, **options)
            assert packed.is_contiguous()
            assert packed.is_contiguous(memory_format=last)


@matrix()
def test_channels_last_3d_is_kept(where):
    x = random(2, 3, 4, 5, 6, seed=15).contiguous(memory_format=torch.channels_last_3d)
    assert check_packing(where, x).is_contiguous(memory_format=torch.channels_last_3d)


# ---- The noise is a function of (seed, sample, element) only


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


# ---- Balls, bounds, distributions


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


@matrix(norm=["linf", "l2"])
def test_inputs_are_left_alone(where, norm):
    """``Where.call`` compares them before and after; here with every option that might be applied in place."""
    x, grad = random(2, 3, 4, 4, seed=24), random(2, 3, 4, 4, seed=25) - 0.5
    seed, alpha = seed_of(3), random(2, seed=26)
    options: dict[str, Any] = {"seed": seed, "norm": norm, "mean": [0.5] * 3, "std": [2.0] * 3, "bounds": (0.4, 0.6)}
    where.pack_points(x, grad, EPS, alpha=alpha, start=1.0, project=True, **options)
    where.pack_points(x, None, EPS, x_adv=grad, **options)
    where.random_start(x, EPS, seed=seed, bounds=(0.4, 0.6), norm=norm)


@matrix(dtype=DTYPES, channels_last=[False, True])
def test_out_is_written_and_returned(where, dtype, channels_last):
    form = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (random(3, 3, 5, 7, seed=s).to(dtype).to(memory_format=form) for s in (51, 52))
    options: dict[str, Any] = {"seed": seed_of(SEED), "fraction": 0.5, "triplets": 2}
    expected = where.pack_points(x, grad, EPS, **options)
    out = tuple(torch.full_like(tensor, math.nan, device=where.device) for tensor in expected)
    result = where.pack_points(x, grad, EPS, out=out, **options)
    for kept, got, right in zip(out, result, expected, strict=True):
        assert kept.data_ptr() == got.data_ptr() or where.device != "cpu"
        assert torch.equal(kept.cpu(), right)
        assert torch.equal(got, right)
        assert kept._version > 0  # so that autograd refuses a graph that saved what was there
    assert result[0].is_contiguous(memory_format=form)


def test_the_fixture_poisons_what_no_kernel_writes(monkeypatch):
    """Without their kernels every result is NaN, so the comparisons above see whatever is not written."""
    where = let_kernels_write_nothing(monkeypatch)
    x = random(2, 3, seed=37)
    points, alpha = where.pack_points(x, x, EPS, seed=seed_of(1))
    start = where.random_start(x, EPS, seed=seed_of(1))
    assert all(t.isnan().all() for t in (points, alpha, start))


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
