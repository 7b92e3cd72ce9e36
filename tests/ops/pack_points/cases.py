"""pack_points and random_start stated again: numpy float64, words from Python's integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tests.helpers import (
    Where,
    pair_word,
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
