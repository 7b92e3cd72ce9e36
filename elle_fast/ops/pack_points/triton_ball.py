"""pack_points in the l2 ball: one launch.

A sample's norms have to be known before it can be written, so a program goes over its samples twice (three times with a
projection), drawing their noise anew each time: bound by arithmetic, and for few large samples by their number. Sums of
squares are taken relative to the largest entry, as a gradient's squares may leave float32's range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops.pack_points.triton_cube import clamp, draw_alpha, place_in, store_point, store_triplet
from elle_fast.ops.philox_triton import STREAM_PAIR, STREAM_START, block_words, load_key, sample_words, uniform


@triton.jit
def _normal(word, partner, element):
    """Box-Muller: the even element of a pair takes the cosine, the odd one the sine, of the odd one's angle.

    The angle is 2 pi u with u a multiple of 2**-24: the nearest quarter turn is taken off exactly, and what is left,
    within pi / 4, goes into the Taylor series to x**9 and x**10, whose next terms are below 2e-9.
    """
    odd = element % 2 == 1
    length = tl.sqrt(-2.0 * tl.log(uniform(tl.where(odd, partner, word)) + 5.9604644775390625e-08))
    turns = 4.0 * uniform(tl.where(odd, word, partner))
    quarter = tl.floor(turns + 0.5)
    angle = (turns - quarter) * 1.5707963267948966
    square = angle * angle
    sine = 2.7557319223985893e-06 * square - 1.984126984126984e-04
    sine = (sine * square + 8.333333333333333e-03) * square - 1.6666666666666666e-01
    sine = sine * square * angle + angle
    cosine = -2.755731922398589e-07 * square + 2.48015873015873e-05
    cosine = (cosine * square - 1.3888888888888889e-03) * square + 4.1666666666666664e-02
    cosine = (cosine * square - 0.5) * square + 1.0
    # cos(angle + quarter * pi/2); a sine is a cosine a quarter turn back.
    step = quarter.to(tl.int32) + tl.where(odd, 3, 0)
    turned = tl.where(step % 2 == 0, cosine, sine)
    return length * tl.where((step % 4 == 1) | (step % 4 == 2), -turned, turned)


@triton.jit
def _pair_normals(k0, k1, element, sample, triplet):
    """Normal noise of x_a and x_b."""
    a0, b0, a1, b1 = block_words(k0, k1, element // 2, sample, STREAM_PAIR, triplet)
    odd = element % 2 == 1
    return (
        _normal(tl.where(odd, a1, a0), tl.where(odd, a0, a1), element),
        _normal(tl.where(odd, b1, b0), tl.where(odd, b0, b1), element),
    )


@triton.jit
def _start_normals(k0, k1, element, sample):
    w0, w1, w2, w3 = block_words(k0, k1, element // 4, sample, STREAM_START, 0)
    first = element % 4 < 2
    even = tl.where(first, w0, w2)
    odd = tl.where(first, w1, w3)
    is_odd = element % 2 == 1
    return _normal(tl.where(is_odd, odd, even), tl.where(is_odd, even, odd), element)


@triton.jit
def _add_squares(largest, total, value):
    """Sum of squares as ``largest**2 * total``, so that neither tiny nor huge values leave float32's range."""
    bigger = tl.maximum(largest, tl.max(tl.abs(value), 1))
    safe = tl.where(bigger > 0, bigger, 1.0)
    rescaled = largest / safe
    scaled = value / safe[:, None]
    return bigger, total * rescaled * rescaled + tl.sum(scaled * scaled, 1)


@triton.jit
def _ball_scale(radius, word, length, n):
    """``radius * u**(1/d) / length``: what turns normal noise into a point of the ball."""
    u = uniform(word)
    root = tl.where(u > 0, tl.exp(tl.log(tl.where(u > 0, u, 1.0)) / n), 0.0)
    return tl.where(length > 0, radius * root / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def _ball_step(
    x,
    grad,
    grad_length,
    k0,
    k1,
    element,
    sample,
    start_scale,
    step_size,
    low,
    high,
    START: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """The attack's point before its projection."""
    point = x
    if START:
        point = clamp(x + _start_normals(k0, k1, element, sample) * start_scale[:, None], low, high, CLAMP)
    length = grad_length[:, None]
    return point + step_size * tl.where(length > 0, grad / tl.where(length > 0, length, 1.0), 0.0)


# Sizes that change from batch to batch: compiled once for all of them.
@triton.jit(do_not_specialize=["batch", "part", "groups", "sample_offset"])
def pack_ball(
    x_ptr,
    grad_ptr,
    alpha_in_ptr,
    seed_ptr,
    statistics_ptr,  # mean [C], 1 / std [C]
    points_ptr,
    alpha_ptr,
    batch,
    part,
    groups,  # elements of a sample // ALIGN
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some samples, whole."""
    # As a product with a constant, so that the compiler knows what a sample's length is divisible by.
    n = (groups.to(tl.int64) if WIDE else groups) * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    sample = sample_offset + rows
    base = rows.to(tl.int64) * n
    k0, k1 = load_key(seed_ptr)
    zero = tl.zeros([ROWS], tl.float32)

    start_scale = zero
    grad_length = zero
    pull = zero + 1.0  # eps / length where the projection bites
    if FIRST == 1:
        grad_largest, grad_total, start_largest, start_total = zero, zero, zero, zero
        for begin in range(0, n, BLOCK):
            memory = begin + tl.arange(0, BLOCK)[None, :]
            mask = (memory < n) & (rows < batch)
            offset = place_in(memory, C, PLANE, LAST, GRAD_SAME)
            grad = tl.load(grad_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
            grad_largest, grad_total = _add_squares(grad_largest, grad_total, grad)
            if START:
                element = place_in(memory, C, PLANE, True, not LAST)
                noise = tl.where(mask, _start_normals(k0, k1, element, sample), 0.0)
                start_largest, start_total = _add_squares(start_largest, start_total, noise)
        grad_length = grad_largest * tl.sqrt(grad_total)
        if START:
            _, _, _, word = sample_words(k0, k1, sample_offset + row, 0)
            start_scale = _ball_scale(radius, word, start_largest * tl.sqrt(start_total), n)
        if PROJECT:
            largest, total = zero, zero
            for begin in range(0, n, BLOCK):
                memory = begin + tl.arange(0, BLOCK)[None, :]
                mask = (memory < n) & (rows < batch)
                element = place_in(memory, C, PLANE, True, not LAST)
                x = tl.load(x_ptr + base + place_in(memory, C, PLANE, LAST, X_SAME), mask=mask, other=0.0)
                grad = tl.load(grad_ptr + base + place_in(memory, C, PLANE, LAST, GRAD_SAME), mask=mask, other=0.0)
                x = x.to(tl.float32)
                point = _ball_step(
                    x,
                    grad.to(tl.float32),
                    grad_length,
                    k0,
                    k1,
                    element,
                    sample,
                    start_scale,
                    step_size,
                    low,
                    high,
                    START,
                    CLAMP,
                )
                largest, total = _add_squares(largest, total, tl.where(mask, point - x, 0.0))
            length = largest * tl.sqrt(total)
            pull = tl.where(length > eps, eps / tl.where(length > 0, length, 1.0), 1.0)

    # Rows of x_adv are written with the first triplet, or alone.
    passes = triplets
    if FIRST != 0:
        passes = tl.maximum(triplets, 1)
    for triplet in range(passes):
        used = row < tl.where(triplet < triplets, part, 0)
        residual = triplet * part + row
        a_largest, a_total, b_largest, b_total = zero, zero, zero, zero
        for begin in range(0, n, BLOCK):
            memory = begin + tl.arange(0, BLOCK)[None, :]
            element = place_in(memory, C, PLANE, True, not LAST)
            noise_a, noise_b = _pair_normals(k0, k1, element, sample, triplet)
            inside = memory < n
            a_largest, a_total = _add_squares(a_largest, a_total, tl.where(inside, noise_a, 0.0))
            b_largest, b_total = _add_squares(b_largest, b_total, tl.where(inside, noise_b, 0.0))
        _, word_a, word_b, _ = sample_words(k0, k1, sample_offset + row, triplet)
        scale_a = _ball_scale(eps, word_a, a_largest * tl.sqrt(a_total), n)[:, None]
        scale_b = _ball_scale(eps, word_b, b_largest * tl.sqrt(b_total), n)[:, None]
        alpha = draw_alpha(alpha_in_ptr, k0, k1, residual, sample_offset + row, triplet, used, ALPHA)
        if ALPHA == 1:
            alpha = zero + alpha
        tl.store(alpha_ptr + residual, alpha, mask=used)

        for begin in range(0, n, BLOCK):
            memory = begin + tl.arange(0, BLOCK)[None, :]
            mask = (memory < n) & (rows < batch)
            element = place_in(memory, C, PLANE, True, not LAST)
            x = tl.load(x_ptr + base + place_in(memory, C, PLANE, LAST, X_SAME), mask=mask, other=0.0).to(tl.float32)
            mean, scale = x, x
            if NORMALISE:
                channel = memory % C if LAST else memory // PLANE
                mean = tl.load(statistics_ptr + channel, mask=memory < n, other=0.0)
                scale = tl.load(statistics_ptr + C + channel, mask=memory < n, other=0.0)
            first = x
            first_rows = 0
            if FIRST != 0:
                first_rows = batch
                offset = place_in(memory, C, PLANE, LAST, GRAD_SAME)
                first = tl.load(grad_ptr + base + offset, mask=mask, other=0.0).to(tl.float32)
                if FIRST == 1:
                    point = _ball_step(
                        x, first, grad_length, k0, k1, element, sample, start_scale, step_size, low, high, START, CLAMP
                    )
                    # Only what lies outside is moved, so that a point inside keeps its bits.
                    pulled = x + (point - x) * pull[:, None]
                    first = clamp(tl.where(pull[:, None] < 1.0, pulled, point), low, high, CLAMP)
                store_point(
                    points_ptr + base + memory,
                    first,
                    mean,
                    scale,
                    mask & (rows < tl.where(triplet == 0, batch, 0)),
                    NORMALISE,
                )
            noise_a, noise_b = _pair_normals(k0, k1, element, sample, triplet)
            x_a = clamp(x + noise_a * scale_a, low, high, CLAMP)
            if POINTS == 1:
                x_b = first
            else:
                x_b = clamp(x + noise_b * scale_b, low, high, CLAMP)
            store_triplet(
                points_ptr,
                first_rows + triplet * BLOCKS * part + rows,
                part,
                n,
                memory,
                x_a,
                x_b,
                alpha[:, None],
                mean,
                scale,
                mask & used[:, None],
                POINTS,
                NORMALISE,
            )


@triton.jit(do_not_specialize=["batch", "groups", "sample_offset"])
def start_ball(
    x_ptr,
    seed_ptr,
    start_ptr,
    batch,
    groups,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The attack's start alone."""
    # As a product with a constant, so that the compiler knows what a sample's length is divisible by.
    n = (groups.to(tl.int64) if WIDE else groups) * ALIGN
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = row[:, None]
    base = rows.to(tl.int64) * n
    k0, k1 = load_key(seed_ptr)
    largest, total = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for begin in range(0, n, BLOCK):
        memory = begin + tl.arange(0, BLOCK)[None, :]
        noise = _start_normals(k0, k1, place_in(memory, C, PLANE, True, not LAST), sample_offset + rows)
        largest, total = _add_squares(largest, total, tl.where(memory < n, noise, 0.0))
    _, _, _, word = sample_words(k0, k1, sample_offset + row, 0)
    scale = _ball_scale(radius, word, largest * tl.sqrt(total), n)[:, None]
    for begin in range(0, n, BLOCK):
        memory = begin + tl.arange(0, BLOCK)[None, :]
        mask = (memory < n) & (rows < batch)
        x = tl.load(x_ptr + base + memory, mask=mask, other=0.0).to(tl.float32)
        noise = _start_normals(k0, k1, place_in(memory, C, PLANE, True, not LAST), sample_offset + rows)
        start = clamp(x + noise * scale, low, high, CLAMP)
        tl.store(start_ptr + base + memory, start.to(start_ptr.dtype.element_ty), mask=mask)
