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
normalisation or a random start add 7 to 29. A channels-last output needs a call for each element, as a pair lies C
elements apart there: 103 to 114 for FGSM, in bf16 just below the memory time, and above it with normalisation or a
random start (bf16 on an H100: 4.1 and 6.1 ns to issue against 3.6).

Each operation is rounded on its own (a fused multiply-add stands only where it is exact): points have the reference's
bits, but for those that are normalised, where a division became a product.
"""

from __future__ import annotations

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


@triton.jit
def clamp(value, low, high, CLAMP: tl.constexpr):
    """Into ``[low, high]``; NaN stays, as in torch."""
    if CLAMP:
        value = tl.minimum(tl.maximum(value, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)
    return value


@triton.jit
def _signed(step_size, grad):
    """step_size * sign(grad), 0 for NaN as torch.sign has it."""
    return tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))


@triton.jit
def between(x_a, x_b, alpha):
    """``x_c = (1 - alpha) x_a + alpha x_b``."""
    return (1.0 - alpha) * x_a + alpha * x_b


@triton.jit
def place_in(memory, C: tl.constexpr, PLANE: tl.constexpr, FROM_LAST: tl.constexpr, SAME: tl.constexpr):
    """Where the element at ``memory`` of one layout lies in the other: channels last <-> channels first."""
    if SAME:
        return memory
    if FROM_LAST:
        return (memory % C) * PLANE + memory // C
    return (memory % PLANE) * C + memory // PLANE


@triton.jit
def store_point(pointer, value, mean, scale, mask, NORMALISE: tl.constexpr):
    """One point as the model takes it: normalised, cast."""
    if NORMALISE:
        value = (value - mean) * scale
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def draw_alpha(alpha_in_ptr, k0, k1, index, sample, triplet, mask, ALPHA: tl.constexpr):
    """alpha of residual ``index``."""
    if ALPHA == 0:
        word, _, _, _ = sample_words(k0, k1, sample, triplet)
        return uniform(word)
    elif ALPHA == 1:
        return tl.full((), 0.5, tl.float32)
    else:
        return tl.load(alpha_in_ptr + index, mask=mask).to(tl.float32)


@triton.jit
def store_triplet(
    points_ptr,
    first_row,
    part,
    n,
    memory,
    x_a,
    x_b,
    alpha,
    mean,
    scale,
    mask,
    POINTS: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """The rows of one triplet; ``first_row`` is the sample's row in the first block, blocks are ``part`` rows apart."""
    out = points_ptr + first_row.to(tl.int64) * n + memory
    block = part.to(tl.int64) * n
    store_point(out, x_a, mean, scale, mask, NORMALISE)
    if POINTS == 0:
        store_point(out + block, x_b, mean, scale, mask, NORMALISE)
        store_point(out + 2 * block, between(x_a, x_b, alpha), mean, scale, mask, NORMALISE)
    elif POINTS == 1:
        store_point(out + block, between(x_a, x_b, alpha), mean, scale, mask, NORMALISE)
    else:
        for place in tl.static_range(1, 4):
            store_point(out + place * block, between(x_a, x_b, 0.25 * place), mean, scale, mask, NORMALISE)
        store_point(out + 4 * block, x_b, mean, scale, mask, NORMALISE)


# Sizes that change from batch to batch: compiled once for all of them.
@triton.jit(do_not_specialize=["batch", "part", "groups", "tiles", "sample_offset"])
def pack_cube(
    x_ptr,
    grad_ptr,  # the attack's gradient, or its points (FIRST)
    alpha_in_ptr,
    seed_ptr,
    statistics_ptr,  # mean [C], 1 / std [C]
    points_ptr,
    alpha_ptr,
    batch,
    part,
    groups,  # elements of a sample // ALIGN
    tiles,
    triplets,
    sample_offset,
    eps,
    step_size,
    radius,
    low,
    high,
    FIRST: tl.constexpr,
    START: tl.constexpr,
    PROJECT: tl.constexpr,
    CLAMP: tl.constexpr,
    NORMALISE: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALPHA: tl.constexpr,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    LAST: tl.constexpr,
    X_SAME: tl.constexpr,
    GRAD_SAME: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of one sample: its attack's point and its triplets."""
    program = tl.program_id(0)
    row = program // tiles  # of x
    tile = program % tiles
    sample = sample_offset + row
    k0, k1 = load_key(seed_ptr)

    # As a product with a constant, so that the compiler knows what a sample's length is divisible by.
    n = groups * ALIGN
    if WIDE:
        n = groups.to(tl.int64) * ALIGN
        tile = tile.to(tl.int64)
    group = tile * (BLOCK // VEC) + tl.arange(0, BLOCK // VEC)
    memory = group[:, None] * VEC + tl.arange(0, VEC)[None, :]
    mask = memory < n
    base = row.to(tl.int64) * n
    element = place_in(memory, C, PLANE, True, not LAST)  # in logical order

    x = tl.load(x_ptr + base + place_in(memory, C, PLANE, LAST, X_SAME), mask=mask, other=0.0).to(tl.float32)
    mean, scale = x, x  # not used unless replaced
    if NORMALISE:
        channel = memory % C if LAST else memory // PLANE
        mean = tl.load(statistics_ptr + channel, mask=mask, other=0.0)
        scale = tl.load(statistics_ptr + C + channel, mask=mask, other=0.0)

    first = x
    first_rows = 0
    if FIRST != 0:
        first_rows = batch
        given = tl.load(grad_ptr + base + place_in(memory, C, PLANE, LAST, GRAD_SAME), mask=mask, other=0.0)
        first = given.to(tl.float32)
        if FIRST == 1:
            point = x
            if START:
                if LAST:
                    words = start_words(k0, k1, element, sample)
                else:
                    words = start_words_grouped(k0, k1, group, sample, VEC)
                point = clamp(x + radius * symmetric(words), low, high, CLAMP)
            point = point + _signed(step_size, first)
            if PROJECT:
                point = x + clamp(point - x, -eps, eps, True)
            first = clamp(point, low, high, CLAMP)
        store_point(points_ptr + base + memory, first, mean, scale, mask, NORMALISE)

    if row < part:
        for triplet in range(triplets):
            residual = triplet * part + row
            alpha = draw_alpha(alpha_in_ptr, k0, k1, residual, sample, triplet, None, ALPHA)
            tl.store(alpha_ptr + residual, alpha, mask=tile == 0)
            if LAST:
                words_a, words_b = pair_words(k0, k1, element, sample, triplet)
            else:
                words_a, words_b = pair_words_grouped(k0, k1, group, sample, triplet, VEC)
            x_a = clamp(x + eps * symmetric(words_a), low, high, CLAMP)
            if POINTS == 1:
                x_b = first
            else:
                x_b = clamp(x + eps * symmetric(words_b), low, high, CLAMP)
            first_row = first_rows + triplet * BLOCKS * part + row
            store_triplet(points_ptr, first_row, part, n, memory, x_a, x_b, alpha, mean, scale, mask, POINTS, NORMALISE)


@triton.jit(do_not_specialize=["groups", "tiles", "sample_offset"])
def start_cube(
    x_ptr,
    seed_ptr,
    start_ptr,
    groups,
    tiles,
    sample_offset,
    radius,
    low,
    high,
    CLAMP: tl.constexpr,
    C: tl.constexpr,
    PLANE: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGN: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The attack's start alone; reads x once, writes it once."""
    program = tl.program_id(0)
    row = program // tiles
    tile = program % tiles
    sample = sample_offset + row
    k0, k1 = load_key(seed_ptr)
    n = groups * ALIGN
    if WIDE:
        n = groups.to(tl.int64) * ALIGN
        tile = tile.to(tl.int64)
    group = tile * (BLOCK // VEC) + tl.arange(0, BLOCK // VEC)
    memory = group[:, None] * VEC + tl.arange(0, VEC)[None, :]
    mask = memory < n
    base = row.to(tl.int64) * n
    x = tl.load(x_ptr + base + memory, mask=mask, other=0.0).to(tl.float32)
    if LAST:
        words = start_words(k0, k1, place_in(memory, C, PLANE, True, False), sample)
    else:
        words = start_words_grouped(k0, k1, group, sample, VEC)
    start = clamp(x + radius * symmetric(words), low, high, CLAMP)
    tl.store(start_ptr + base + memory, start.to(start_ptr.dtype.element_ty), mask=mask)
