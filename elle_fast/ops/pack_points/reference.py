"""pack_points in plain torch: the oracle of every other backend.

Arithmetic is in float32 (float64 for float64 inputs) whatever the input's dtype; each point is rounded once, at the
end. Arguments arrive checked (validation.py).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from elle_fast.ops import philox
from elle_fast.ops.pack_points.validation import Packing


def pack_points(
    x: Tensor, grad: Tensor | None, x_adv: Tensor | None, alpha: Tensor | None, seed: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``."""
    work = _work_dtype(x)
    centre = x.to(work)
    samples = _samples(x, packing)
    adv = centre.new_empty((0, *x.shape[1:]))
    if x_adv is not None:
        adv = x_adv.to(work)
    elif grad is not None:
        adv = _attack_point(centre, grad.to(work), seed, samples, packing)

    rows = [adv]
    alphas = [centre.new_empty(0)]
    rows_per_block = packing.part(x.shape[0])
    part = slice(0, rows_per_block)
    for triplet in range(packing.triplets):
        if alpha is not None:
            a = alpha[triplet * rows_per_block :][part].to(work)
        elif packing.alpha == "uniform" and packing.points != "five-point":
            a = philox.uniform(philox.sample_words(seed, samples[part], triplet)[:, 0], work)
        else:
            a = centre.new_full((rows_per_block,), 0.5)
        x_a, x_b = _pair(centre[part], seed, samples[part], triplet, packing)
        if packing.points == "elle":
            rows += [x_a, x_b, between(x_a, x_b, a)]
        elif packing.points == "elle-2p":
            rows += [x_a, between(x_a, adv[part], a)]
        else:
            rows += [x_a, *(between(x_a, x_b, torch.full_like(a, w)) for w in (0.25, 0.5, 0.75)), x_b]
        alphas.append(a)

    points = normalize(torch.cat(rows), packing.mean, packing.std).to(packing.dtype or x.dtype)
    return points.contiguous(memory_format=packing.output_format(x)), torch.cat(alphas)


def random_start(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    start = _start(x.to(_work_dtype(x)), seed, _samples(x, packing), packing)
    return torch.empty_like(x, memory_format=packing.output_format(x)).copy_(start)


def _attack_point(x: Tensor, grad: Tensor, seed: Tensor, samples: Tensor, packing: Packing) -> Tensor:
    """One step from the attack's start along the sign (linf) or the direction (l2) of the gradient."""
    start = _start(x, seed, samples, packing)
    if packing.norm == "linf":
        point = start + packing.step_size * grad.sign()
        if packing.project:
            point = x + (point - x).clamp(-packing.eps, packing.eps)
    else:
        point = start + packing.step_size * unit(grad)
        if packing.project:
            offset = point - x
            length = lengths(offset)
            # Only what lies outside is scaled, so that a point inside keeps its bits.
            point = torch.where(length > packing.eps, x + offset * (packing.eps / length), point)
    return _clamp(point, packing)


def _start(x: Tensor, seed: Tensor, samples: Tensor, packing: Packing) -> Tensor:
    if packing.start == 0:
        return x
    radius = packing.start * packing.eps
    words = philox.start_words(seed, samples, _words_needed(x, packing))
    if packing.norm == "linf":
        noise = _cube(words, radius, x)
    else:
        noise = _ball(words, philox.sample_words(seed, samples, 0)[:, 3], radius, x)
    return _clamp(x + noise, packing)


def _pair(x: Tensor, seed: Tensor, samples: Tensor, triplet: int, packing: Packing) -> tuple[Tensor, Tensor]:
    """x_a and x_b: independent, uniform in the eps ball around x, then clamped to the bounds."""
    words_a, words_b = philox.pair_words(seed, samples, _words_needed(x, packing), triplet)
    if packing.norm == "linf":
        noise_a, noise_b = _cube(words_a, packing.eps, x), _cube(words_b, packing.eps, x)
    else:
        radii = philox.sample_words(seed, samples, triplet)
        noise_a = _ball(words_a, radii[:, 1], packing.eps, x)
        noise_b = _ball(words_b, radii[:, 2], packing.eps, x)
    return _clamp(x + noise_a, packing), _clamp(x + noise_b, packing)


def _words_needed(x: Tensor, packing: Packing) -> int:
    """One word per element; Box-Muller takes them in twos."""
    elements = x[0].numel()
    return elements + elements % 2 if packing.norm == "l2" else elements


def _cube(words: Tensor, radius: float, like: Tensor) -> Tensor:
    """Uniform in ``[-radius, radius)``; ``2u - 1`` is exact, so there is one rounding."""
    return (radius * (2.0 * philox.uniform(words, like.dtype) - 1.0)).view(like.shape)


def _ball(words: Tensor, radius_word: Tensor, radius: float, like: Tensor) -> Tensor:
    """Uniform in the l2 ball: a normal direction (Box-Muller on words 2k, 2k+1), length ``radius * u**(1/d)``."""
    elements = like[0].numel()
    # u in (0, 1] keeps the logarithm finite.
    length = torch.sqrt(-2.0 * torch.log(philox.uniform(words[:, 0::2], like.dtype) + 2.0**-24))
    angle = (2.0 * math.pi) * philox.uniform(words[:, 1::2], like.dtype)
    normal = torch.stack((length * angle.cos(), length * angle.sin()), dim=-1).flatten(1)[:, :elements]
    scale = radius * philox.uniform(radius_word, like.dtype) ** (1.0 / elements)
    noise: Tensor = unit(normal.reshape(like.shape)) * scale.view(-1, *[1] * (like.dim() - 1))
    return noise


def unit(x: Tensor) -> Tensor:
    """Each sample divided by its 2-norm; a zero sample stays zero."""
    length = lengths(x)
    return torch.where(length > 0, x / length, torch.zeros_like(x))


def lengths(x: Tensor) -> Tensor:
    """2-norms ``[B, 1, ...]``; scaled by the largest entry first, so that tiny gradients do not underflow to zero."""
    flat = x.reshape(x.shape[0], -1)
    largest = flat.abs().amax(dim=1, keepdim=True)
    scaled = torch.where(largest > 0, flat / largest, flat)
    lengths: Tensor = largest * torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return lengths.view(-1, *[1] * (x.dim() - 1))


def between(x_a: Tensor, x_b: Tensor, alpha: Tensor) -> Tensor:
    """``x_c = (1 - alpha) x_a + alpha x_b``, alpha ``[B]``, one per sample."""
    a = alpha.view(-1, *[1] * (x_a.dim() - 1))
    x_c: Tensor = (1.0 - a) * x_a + a * x_b
    return x_c


def _clamp(x: Tensor, packing: Packing) -> Tensor:
    return x if packing.bounds is None else x.clamp(*packing.bounds)


def normalize(points: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    """``(points - mean) / std`` along dimension 1; ``None`` changes nothing."""
    if mean is None or std is None:
        return points
    shape = (1, -1, *[1] * (points.dim() - 2))
    centre, scale = (constant(values, points.dtype, points.device).view(shape) for values in (mean, std))
    return (points - centre) / scale


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small tensor of constants on ``device``."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        # Part of the graph, with nothing to copy from the host; or what a mode, as that of fake tensors, makes of it.
        return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
    found = _cached_constant(values, dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _CAPTURED[values, dtype, device] = found
    return found


# What a graph captured it reads for as long as it is replayed, so none of these is dropped.
_CAPTURED: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


@lru_cache(maxsize=32)
def _cached_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cached, as a copy from the host in each step would wait for the device. Not an inference tensor even when the
    # first call is under inference_mode, as a later one may need it in a graph.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _samples(x: Tensor, packing: Packing) -> Tensor:
    return torch.arange(packing.sample_offset, packing.sample_offset + x.shape[0], device=x.device)


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
