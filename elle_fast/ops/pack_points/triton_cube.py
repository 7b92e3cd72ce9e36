"""pack_points in the linf ball: one launch, one pass over memory.

``pack_cube`` reads x and grad once and writes each packed row once. In fp32 that is 8 + 16 = 24 bytes an element of x,
in bf16 or fp16 12. One Philox call serves two elements of x_a and of x_b: 20 multiplications and 20 three-input xors in
its ten rounds. benchmarks/results/static_report.json has what the compiler makes of all of it. For FGSM on 3x224x224,
contiguous, that is 54 to 57 instructions an element on sm_80 and sm_90, 31 to 36 of them on integers. By that count,
with 128 lanes issued per clock and multiprocessor, in ns per 1000 elements:

=====  ============  ====================  ===================  ===================  ========
chip   memory        issue                 memory time          time to issue        bound by
=====  ============  ====================  ===================  ===================  ========
A100   2.0 TB/s      108 SM at 1.41 GHz    fp32 12.0, bf16 6.0  fp32 2.9, bf16 2.9   memory
H100   3.35 TB/s     132 SM at 1.76 GHz    fp32 7.2, bf16 3.6   fp32 1.9, bf16 1.9   memory
=====  ============  ====================  ===================  ===================  ========

On samples of 3x32x32 it is 64 to 72 instructions, as fewer elements share the words of their sample; bounds,
normalisation or a random start add 7 to 29. A channels-last output needs a call for each element, as a pair lies
``channels`` elements apart there: 103 to 114 for FGSM, in bf16 just below the memory time, and above it with
normalisation or a random start (bf16 on an H100: 4.1 and 6.1 ns to issue against 3.6).

Each operation is rounded on its own (a fused multiply-add stands only where it is exact), so the points have the
reference's bits, except normalised ones: there a division became a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from elle_fast.ops.philox_triton import (
    load_key,
    pair_words,
    pair_words_grouped,
    sample_words,
    start_words,
    start_words_grouped,
    symmetric,
    uniform,
)


class Norm(NamedTuple):
    """mean and 1 / std of each element's channel."""

    mean: Any
    scale: Any


@triton.jit
def limit(value, low, high):
    """Into ``[low, high]``; NaN stays, as in torch."""
    return tl.minimum(tl.maximum(value, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def clamp(value, numbers, OPTIONS: tl.constexpr):
    """Into the image's range, if there is one."""
    if OPTIONS.clamp:
        value = limit(value, numbers.low, numbers.high)
    return value


@triton.jit
def transposed(memory, OPTIONS: tl.constexpr):
    """Where the element at ``memory`` of the points' layout lies in the other one: channels last <-> channels first."""
    if OPTIONS.last:
        return (memory % OPTIONS.channels) * OPTIONS.plane + memory // OPTIONS.channels
    else:  # What follows a return is compiled even so, and would divide by 0.
        return (memory % OPTIONS.plane) * OPTIONS.channels + memory // OPTIONS.plane


@triton.jit
def logical(memory, OPTIONS: tl.constexpr):
    """The number of the element at ``memory`` in logical order."""
    if OPTIONS.last:
        memory = transposed(memory, OPTIONS)
    return memory


@triton.jit
def read(pointer, base, memory, mask, SAME: tl.constexpr, OPTIONS: tl.constexpr):
    """Elements of a sample of x, grad or x_adv, as float32; ``SAME``: in the points' layout."""
    if not SAME:
        memory = transposed(memory, OPTIONS)
    return tl.load(pointer + base + memory, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def norm_of(statistics, memory, mask, OPTIONS: tl.constexpr):
    """The :class:`Norm` of elements, from mean ``[C]`` and 1 / std ``[C]``."""
    channel = memory % OPTIONS.channels if OPTIONS.last else memory // OPTIONS.plane
    mean = tl.load(statistics + channel, mask=mask, other=0.0)
    return Norm(mean, tl.load(statistics + OPTIONS.channels + channel, mask=mask, other=0.0))


@triton.jit
def store_point(pointer, value, norm, mask):
    """One point as the model takes it: normalised, cast."""
    if norm is not None:
        value = (value - norm.mean) * norm.scale
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def draw_alpha(given, key, index, sample, triplet, mask, OPTIONS: tl.constexpr):
    """alpha of residual ``index``."""
    if OPTIONS.alpha == "uniform":
        word, _, _, _ = sample_words(key, sample, triplet)
        return uniform(word)
    elif OPTIONS.alpha == "half":
        return tl.full((), 0.5, tl.float32)
    else:
        return tl.load(given + index, mask=mask).to(tl.float32)


@triton.jit
def between(x_a, x_b, alpha):
    """``x_c = (1 - alpha) x_a + alpha x_b``."""
    return (1.0 - alpha) * x_a + alpha * x_b


@triton.jit
def store_triplet(points, row, part, n, memory, x_a, x_b, alpha, norm, mask, OPTIONS: tl.constexpr):
    """The rows of one triplet; ``row`` is the sample's row in its x_a block, and blocks are ``part`` rows apart."""
    out = points + row.to(tl.int64) * n + memory
    block = part.to(tl.int64) * n
    store_point(out, x_a, norm, mask)
    if OPTIONS.points == "elle":
        store_point(out + block, x_b, norm, mask)
        store_point(out + 2 * block, between(x_a, x_b, alpha), norm, mask)
    elif OPTIONS.points == "elle-2p":
        store_point(out + block, between(x_a, x_b, alpha), norm, mask)
    else:
        for place in tl.static_range(1, 4):
            store_point(out + place * block, between(x_a, x_b, 0.25 * place), norm, mask)
        store_point(out + 4 * block, x_b, norm, mask)


@triton.jit
def _tile(groups, tiles, TILE: tl.constexpr):
    """The program's row of x and tile; the tile's groups of ``vec`` elements and their places; a sample's length."""
    program = tl.program_id(0)
    row = program // tiles
    tile = program % tiles
    # As a product with a constant, so that the compiler knows what a sample's length is divisible by.
    n = groups * TILE.align
    if TILE.wide:
        n = groups.to(tl.int64) * TILE.align
        tile = tile.to(tl.int64)
    group = tile * (TILE.block // TILE.vec) + tl.arange(0, TILE.block // TILE.vec)
    return row, tile, group, group[:, None] * TILE.vec + tl.arange(0, TILE.vec)[None, :], n


@triton.jit
def _start(x, key, group, memory, sample, numbers, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The attack's random start."""
    if OPTIONS.last:
        words = start_words(key, logical(memory, OPTIONS), sample)
    else:
        words = start_words_grouped(key, group, sample, TILE.vec)
    return clamp(x + numbers.radius * symmetric(words), numbers, OPTIONS)


# Sizes that change from batch to batch are compiled once for all of them. They are arguments of their own, as Triton
# specialises the integers in a tuple whatever do_not_specialize says.
@triton.jit(do_not_specialize=["batch", "part", "groups", "tiles", "sample_offset"])
def pack_cube(
    tensors,
    statistics,
    batch,
    part,
    groups,  # elements of a sample // align
    tiles,
    sample_offset,
    numbers,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A tile of one sample: its x_adv and its triplets. See triton.py for what the arguments hold."""
    row, tile, group, memory, n = _tile(groups, tiles, TILE)
    mask = memory < n
    base = row.to(tl.int64) * n
    element = logical(memory, OPTIONS)
    sample = sample_offset + row
    key = load_key(tensors.seed)
    x = read(tensors.x, base, memory, mask, OPTIONS.x_same, OPTIONS)
    norm = None
    if OPTIONS.normalize:
        norm = norm_of(statistics, memory, mask, OPTIONS)

    adv = x
    adv_rows = 0
    if OPTIONS.adv != "none":
        adv_rows = batch
        adv = read(tensors.given, base, memory, mask, OPTIONS.given_same, OPTIONS)
        if OPTIONS.adv == "step":
            point = x
            if OPTIONS.start:
                point = _start(x, key, group, memory, sample, numbers, OPTIONS, TILE)
            # 0 for NaN, as torch.sign has it.
            step = numbers.step_size
            point = point + tl.where(adv > 0, step, tl.where(adv < 0, -step, 0.0))
            if OPTIONS.project:
                point = x + limit(point - x, -numbers.eps, numbers.eps)
            adv = clamp(point, numbers, OPTIONS)
        store_point(tensors.points + base + memory, adv, norm, mask)

    if row < part:
        for triplet in range(numbers.triplets):
            residual = triplet * part + row
            alpha = draw_alpha(tensors.alpha, key, residual, sample, triplet, None, OPTIONS)
            tl.store(tensors.alphas + residual, alpha, mask=tile == 0)
            if OPTIONS.last:
                words_a, words_b = pair_words(key, element, sample, triplet)
            else:
                words_a, words_b = pair_words_grouped(key, group, sample, triplet, TILE.vec)
            x_a = clamp(x + numbers.eps * symmetric(words_a), numbers, OPTIONS)
            x_b = adv
            if OPTIONS.points != "elle-2p":
                x_b = clamp(x + numbers.eps * symmetric(words_b), numbers, OPTIONS)
            out_row = adv_rows + triplet * OPTIONS.blocks * part + row
            store_triplet(tensors.points, out_row, part, n, memory, x_a, x_b, alpha, norm, mask, OPTIONS)


@triton.jit(do_not_specialize=["groups", "tiles", "sample_offset"])
def start_cube(tensors, groups, tiles, sample_offset, numbers, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The attack's start alone; reads x once, writes it once."""
    row, _, group, memory, n = _tile(groups, tiles, TILE)
    mask = memory < n
    base = row.to(tl.int64) * n
    x = read(tensors.x, base, memory, mask, True, OPTIONS)
    start = _start(x, load_key(tensors.seed), group, memory, sample_offset + row, numbers, OPTIONS, TILE)
    store_point(tensors.points + base + memory, start, None, mask)
