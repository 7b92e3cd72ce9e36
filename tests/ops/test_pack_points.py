"""pack_points and random_start against an independent re-statement: numpy float64, words from Python's integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast.functional import draw_seed, pack_points, random_start
from tests.helpers import (
    BACKENDS,
    no_host_sync,
    pair_word,
    poison_uninitialised_memory,
    random,
    rng,
    sample_word,
    seed_of,
    start_word,
    unit,
    unit_roundoff,
)

SHAPES = [(1, 3, 7, 5), (3, 423), (4, 129), (2, 1134), (2, 3, 4, 5, 6), (5,)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SEED, EPS = -(2**62) - 12345, 0.05
backends = pytest.mark.parametrize("backend", BACKENDS)

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


def check_packing(backend: str, x: torch.Tensor, eps: float = EPS, seed: int = SEED, **options: Any) -> torch.Tensor:
    stated = {k: v for k, v in options.items() if k not in ("dtype", "memory_format")}
    expected, expected_alpha = restated(x, eps, seed=seed, **stated)
    tensors = {"grad": options.pop("grad", None)}
    with no_host_sync():
        points, alpha = pack_points(x, eps=eps, seed=seed_of(seed), backend=backend, **tensors, **options)
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
    return points


# ---- Every shape, dtype, option


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_shapes_and_dtypes(backend, shape, dtype, norm):
    x, grad = random(*shape, seed=1, dtype=dtype), (random(*shape, seed=2) - 0.5).to(dtype)
    check_packing(backend, x, grad=grad, norm=norm, start=1.0, project=True, step_size=1.25 * EPS)


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
    "float64 out": {"dtype": torch.float64},
    "float16 out": {"dtype": torch.float16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
    "bfloat16 out": {"dtype": torch.bfloat16, "start": 1.0},
    "eps 0 of no step": {"step_size": 0.0},
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name, norm, dtype):
    x, grad = random(4, 3, 5, seed=3, dtype=dtype), (random(4, 3, 5, seed=4) - 0.5).to(dtype)
    points = check_packing(backend, x, grad=grad, norm=norm, **OPTIONS[name])
    options = OPTIONS[name]
    blocks = {"elle": 3, "elle-2p": 2, "five-point": 5}[options.get("points", "elle")]
    part = math.ceil(options.get("fraction", 1.0) * 4)
    assert points.shape[0] == 4 + blocks * options.get("triplets", 1) * part


@backends
@pytest.mark.parametrize("options", [{}, {"points": "five-point"}, {"triplets": 2, "fraction": 0.5}], ids=str)
def test_the_triplets_alone(backend, options):
    x = random(4, 6, seed=5)
    with_attack = check_packing(backend, x, grad=torch.ones_like(x), **options)
    alone = check_packing(backend, x, **options)
    assert torch.equal(alone, with_attack[4:])


@backends
@pytest.mark.parametrize("points", ["elle", "elle-2p"])
@pytest.mark.parametrize("alpha_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_given_alpha(backend, points, alpha_dtype):
    x = random(3, 5, seed=6)
    alpha = random(6, seed=7, dtype=alpha_dtype).to(torch.float16).to(alpha_dtype)
    alpha[0], alpha[1] = 0, 1
    packed = check_packing(backend, x, grad=torch.ones_like(x), points=points, alpha=alpha, triplets=2)
    x_c = packed[3:].view(2, -1, 5)[0, -3:]
    x_a = packed[3:6]
    x_b = packed[6:9] if points == "elle" else packed[:3]
    # 1 * v + 0 * w has no rounding.
    assert torch.equal(x_c[0], x_a[0])
    assert torch.equal(x_c[1], x_b[1])


@backends
@pytest.mark.parametrize("points", ["elle", "elle-2p", "five-point"])
def test_given_x_adv_is_taken_as_it_is(backend, points):
    x, x_adv = random(3, 4, seed=8), 10 * random(3, 4, seed=9)
    packed = check_packing(backend, x, x_adv=x_adv, points=points, bounds=(0.0, 1.0))
    assert torch.equal(packed[:3], x_adv)


@backends
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_gives_no_step(backend, norm):
    x, grad = random(3, 5, seed=10), random(3, 5, seed=11) - 0.5
    grad[1] = 0
    grad[0, 2] = 0
    packed = check_packing(backend, x, grad=grad, norm=norm)
    assert torch.equal(packed[1], x[1])
    assert packed[0, 2] == x[0, 2]
    # A tiny gradient is no zero gradient: its squares underflow in float32.
    tiny = check_packing(backend, x, grad=grad * 1e-30, norm=norm)
    torch.testing.assert_close(tiny, packed, rtol=1e-6 if norm == "l2" else 0, atol=0)


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


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_views(backend, dtype, norm):
    x, grad = random(2, 3, 7, 5, seed=12, dtype=dtype), (random(2, 3, 7, 5, seed=13) - 0.5).to(dtype)
    plain = check_packing(backend, x, grad=grad, norm=norm)
    for name, x_view in unusual_views(x).items():
        for grad_view in unusual_views(grad).values():
            packed, _ = pack_points(x_view, grad_view, EPS, seed=seed_of(SEED), norm=norm, backend=backend)
            assert packed.is_contiguous(memory_format=torch.channels_last) == (name == "channels_last")
            assert packed.is_contiguous() == (name != "channels_last")
            if norm == "linf":
                assert torch.equal(packed, plain), name
            else:
                # Another order of summation in the lengths: d = 105 roundings at most, then one of the output's.
                bound = 105 * unit_roundoff(torch.float32) * EPS + 2 * unit_roundoff(dtype) * 1.1
                assert (packed - plain).abs().max().item() <= bound


@backends
def test_stride_zero(backend):
    x = torch.tensor([[[0.2]], [[0.6]]]).expand(2, 3, 5)
    grad = torch.tensor([1.0]).expand(2, 3, 5)
    packed = check_packing(backend, x, grad=grad)
    assert torch.equal(packed, check_packing(backend, x.contiguous(), grad=grad.contiguous()))
    whole_batch = torch.tensor([[0.2, 0.5, 0.7]]).expand(4, 3)
    packed = check_packing(backend, whole_batch, grad=torch.zeros(1, 1).expand(4, 3))
    assert len({tuple(row) for row in packed[4:8].tolist()}) == 4  # the same x, but a noise for each sample


@backends
@pytest.mark.parametrize(
    "asked, shape",
    [
        (torch.channels_last, (2, 3, 7, 5)),
        (torch.contiguous_format, (2, 3, 7, 5)),
        (torch.channels_last_3d, (2, 3, 4, 5, 6)),
    ],
    ids=str,
)
def test_memory_format_asked_for(backend, asked, shape):
    x = random(*shape, seed=14)
    for source in (x, x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)):
        packed = check_packing(backend, source, grad=x - 0.5, memory_format=asked)
        assert packed.is_contiguous(memory_format=asked)
        assert torch.equal(packed, check_packing(backend, x, grad=x - 0.5))


@backends
def test_channels_last_3d_is_kept(backend):
    x = random(2, 3, 4, 5, 6, seed=15).contiguous(memory_format=torch.channels_last_3d)
    assert check_packing(backend, x).is_contiguous(memory_format=torch.channels_last_3d)


# ---- The noise is a function of (seed, sample, element) only


@backends
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_noise_does_not_depend_on_dtype(backend, norm):
    # At x = 0 and eps = 1 the points are the noise.
    noise = {d: pack_points(torch.zeros(3, 41, dtype=d), None, 1.0, seed=seed_of(9), norm=norm)[0] for d in DTYPES}
    for dtype in DTYPES[1:]:
        # float32 arithmetic (16 + 41/2 roundings for l2, none for x_a and x_b of linf), then one rounding to dtype.
        bound = unit_roundoff(dtype) + 40 * unit_roundoff(torch.float32)
        assert (noise[dtype].double() - noise[torch.float64]).abs().max().item() <= bound
    ends = slice(0, 6)
    if norm == "linf":
        assert torch.equal(noise[torch.float32][ends].double(), noise[torch.float64][ends])


@backends
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_noise_does_not_depend_on_the_batch_split(backend, norm, cut):
    x, grad = random(4, 9, seed=16), random(4, 9, seed=17) - 0.5
    options: dict[str, Any] = {"seed": seed_of(1), "start": 1.0, "triplets": 2, "norm": norm, "backend": backend}
    whole, alpha = pack_points(x, grad, EPS, **options)
    for part, offset in ((slice(0, cut), 0), (slice(cut, 4), cut)):
        rows, part_alpha = pack_points(x[part], grad[part], EPS, sample_offset=offset, **options)
        expected = whole.view(7, 4, 9)[:, part].flatten(0, 1)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0 if norm == "linf" else 4e-7)
        assert torch.equal(part_alpha, alpha.view(2, 4)[:, part].flatten())


@backends
def test_same_seed_same_bits_and_other_seeds_other_noise(backend):
    x, grad = random(3, 4, 5, seed=18), random(3, 4, 5, seed=19) - 0.5
    runs = [pack_points(x, grad, EPS, seed=seed_of(s), start=2.0, backend=backend) for s in (3, 3, 4)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert (runs[0][0] != runs[2][0]).float().mean().item() > 0.99
    assert (runs[0][1] != runs[2][1]).all()


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("box", [None, (0.25, 0.75)], ids=str)
def test_random_start_is_drawn_again_by_pack_points(backend, dtype, norm, box):
    x = random(3, 3, 5, seed=20, dtype=dtype)
    with no_host_sync():
        start = random_start(x, EPS, seed=seed_of(8), start=2.0, bounds=box, norm=norm, backend=backend)
    options: dict[str, Any] = {"start": 2.0, "bounds": box, "norm": norm, "triplets": 0, "backend": backend}
    packed, alpha = pack_points(x, torch.zeros_like(x), EPS, seed=seed_of(8), **options)
    assert (start.dtype, start.shape) == (x.dtype, x.shape)
    assert torch.equal(start, packed)
    assert alpha.shape == (0,)


# ---- Balls, bounds, distributions


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linf_points_stay_in_the_ball_and_the_bounds(backend, dtype):
    x, grad = random(8, 3, 9, seed=21, dtype=dtype), (random(8, 3, 9, seed=22) - 0.5).to(dtype)
    options: dict[str, Any] = {"start": 1.0, "step_size": 1.25 * EPS, "project": True, "backend": backend}
    packed, _ = pack_points(x, grad, EPS, seed=seed_of(1), **options)
    # One rounding of a value below 1.05 in float32 (or float64), one to the output's dtype.
    work = torch.float64 if dtype == torch.float64 else torch.float32
    slack = 1.05 * (3 * unit_roundoff(work) + (unit_roundoff(dtype) if dtype != work else 0))
    offsets = (packed.double().view(4, 8, 3, 9) - x.double()).abs()
    assert offsets.max().item() <= EPS + slack
    # And the projection bites: some of the x_adv lie on the surface.
    assert (offsets[0] > EPS - slack).any()
    packed, _ = pack_points(x, grad, 0.5, seed=seed_of(1), bounds=(0.25, 0.75), **options)
    assert packed[:24].min().item() == 0.25
    assert packed[:24].max().item() == 0.75
    assert packed[24:].min().item() >= 0.25 - unit_roundoff(dtype)
    assert packed[24:].max().item() <= 0.75 + unit_roundoff(dtype)


@backends
def test_linf_noise_reaches_both_ends_and_is_uniform(backend):
    n = 1 << 17
    packed, _ = pack_points(torch.zeros(2, n), None, 1.0, seed=seed_of(5), backend=backend)
    x_a, x_b, _ = packed.double().view(3, 2, n)
    for noise in (x_a, x_b):
        assert noise.min().item() >= -1
        assert noise.max().item() < 1
        # P(no draw of 2**18 beyond 1 - 1e-4 at an end) = exp(-13) = 2e-6.
        assert noise.min().item() < -1 + 1e-4
        assert noise.max().item() > 1 - 1e-4
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


@backends
@pytest.mark.parametrize("d", [1, 2, 3, 8, 33])
def test_l2_ball_is_uniform(backend, d):
    n, eps = 4000, 0.3
    packed, alpha = pack_points(
        torch.zeros(n, d, dtype=torch.float64), None, eps, seed=seed_of(6), norm="l2", backend=backend
    )
    x_a, x_b, _ = packed.view(3, n, d) / eps
    start = random_start(torch.zeros(n, d, dtype=torch.float64), eps, seed=seed_of(6), norm="l2", backend=backend) / eps
    assert kolmogorov_smirnov(alpha) < 2.23
    for noise in (x_a, x_b, start):
        radius = noise.norm(dim=1)
        # d / 2 + 4 roundings, on a radius below 1.
        assert radius.max().item() <= 1 + (d / 2 + 4) * unit_roundoff(torch.float64)
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


@backends
def test_triplets_are_independent(backend):
    n = 1 << 14
    packed, alpha = pack_points(torch.zeros(4, n), None, 1.0, seed=seed_of(7), triplets=3, backend=backend)
    ends = packed.double().view(3, 3, 4, n)[:, :2].flatten(0, 1).flatten(1)
    products = ends @ ends.T / ends.shape[1]
    off_diagonal = products - products.diag().diag()
    assert off_diagonal.abs().max().item() < 5 / 3 / math.sqrt(ends.shape[1])
    assert len(set(alpha.tolist())) == 12


@backends
def test_one_large_sample(backend):
    x = random(1, 3, 257, 259, seed=23)
    packed, alpha = pack_points(x, x - 0.5, EPS, seed=seed_of(SEED), backend=backend)
    assert packed.shape == (4, 3, 257, 259)
    last = x[0].numel() - 1
    for which, row in ((0, 1), (1, 2)):
        expected = x.flatten()[last].item() + EPS * (2 * unit(pair_word(SEED, 0, last, 0, which)) - 1)
        # Two roundings in float32 of values below 1.05.
        assert abs(packed[row].flatten()[last].item() - expected) <= 2 * 1.05 * unit_roundoff(torch.float32)
    torch.testing.assert_close(packed[3], (1 - alpha) * packed[1] + alpha * packed[2], rtol=0, atol=2e-7)


@backends
def test_inputs_are_left_alone(backend):
    x, grad = random(2, 3, 4, 4, seed=24), random(2, 3, 4, 4, seed=25) - 0.5
    seed, alpha = seed_of(3), random(2, seed=26)
    before = [t.clone() for t in (x, grad, seed, alpha)]
    pack_points(x, grad, EPS, seed=seed, alpha=alpha, bounds=(0.4, 0.6), mean=[0.5] * 3, std=[2.0] * 3, backend=backend)
    pack_points(x, None, EPS, seed=seed, x_adv=grad, mean=[0.5] * 3, std=[2.0] * 3, backend=backend)
    random_start(x, EPS, seed=seed, bounds=(0.4, 0.6), backend=backend)
    assert all(torch.equal(b, t) for b, t in zip(before, (x, grad, seed, alpha), strict=True))


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
