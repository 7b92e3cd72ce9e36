"""pack_points in the l2 ball: one launch.

A sample's norms have to be known before it can be written, so a program goes over its samples twice (three times with a
projection), drawing their noise anew each time: bound by arithmetic, and for few large samples by their number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from elle_fast.ops.pack_points.triton_cube import (
    clamp,
    draw_alpha,
    logical,
    norm_of,
    read,
    store_point,
    store_triplet,
)
from elle_fast.ops.philox_triton import STREAM_PAIR, STREAM_START, block_words, load_key, sample_words, uniform


class Squares(NamedTuple):
    """Sums of squares ``[ROWS]`` as ``largest**2 * total``: the squares of a gradient may leave float32's range."""

    largest: Any
    total: Any


@triton.jit
def _normal(even, odd, element):
    """Box-Muller with the words of a pair's elements: the even one takes the cosine, the odd one the sine.

    The angle is 2 pi u with u, of the odd word, a multiple of 2**-24: the nearest quarter turn is taken off exactly,
    and what is left, within pi / 4, goes into the Taylor series to x**9 and x**10, whose next terms are below 2e-9.
    """
    length = tl.sqrt(-2.0 * tl.log(uniform(even) + 5.9604644775390625e-08))
    turns = 4.0 * uniform(odd)
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
    step = quarter.to(tl.int32) + tl.where(element % 2 == 1, 3, 0)
    turned = tl.where(step % 2 == 0, cosine, sine)
    return length * tl.where((step % 4 == 1) | (step % 4 == 2), -turned, turned)


@triton.jit
def _pair_normals(key, element, sample, triplet):
    """Normal noise of x_a and x_b."""
    a0, b0, a1, b1 = block_words(key, element // 2, sample, STREAM_PAIR, triplet)
    return _normal(a0, a1, element), _normal(b0, b1, element)


@triton.jit
def _start_normals(key, element, sample):
    w0, w1, w2, w3 = block_words(key, element // 4, sample, STREAM_START, 0)
    low_pair = element % 4 < 2
    return _normal(tl.where(low_pair, w0, w2), tl.where(low_pair, w1, w3), element)


@triton.jit
def _no_squares(ROWS: tl.constexpr):
    return Squares(tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32))


@triton.jit
def _add(squares, value):
    """The squares of ``value [ROWS, BLOCK]`` too."""
    bigger = tl.maximum(squares.largest, tl.max(tl.abs(value), 1))
    safe = tl.where(bigger > 0, bigger, 1.0)
    rescaled = squares.largest / safe
    scaled = value / safe[:, None]
    return Squares(bigger, squares.total * rescaled * rescaled + tl.sum(scaled * scaled, 1))


@triton.jit
def _length(squares):
    return squares.largest * tl.sqrt(squares.total)


@triton.jit
def _ball_scale(radius, word, squares, n):
    """``radius * u**(1/d) / length``: what turns normal noise into a point of the ball."""
    u = uniform(word)
    length = _length(squares)
    root = tl.where(u > 0, tl.exp(tl.log(tl.where(u > 0, u, 1.0)) / n), 0.0)
    return tl.where(length > 0, radius * root / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def _ball_step(x, grad, grad_length, key, element, sample, start_scale, numbers, OPTIONS: tl.constexpr):
    """The attack's point before its projection."""
    point = x
    if OPTIONS.start:
        point = clamp(x + _start_normals(key, element, sample) * start_scale[:, None], numbers, OPTIONS)
    length = grad_length[:, None]
    return point + numbers.step_size * tl.where(length > 0, grad / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
def _samples(groups, TILE: tl.constexpr):
    """The program's rows of x, and a sample's length."""
    # As a product with a constant, so that the compiler knows what a sample's length is divisible by.
    n = (groups.to(tl.int64) if TILE.wide else groups) * TILE.align
    return tl.program_id(0) * TILE.rows + tl.arange(0, TILE.rows), n


@triton.jit
def _tile(begin, rows, batch, n, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Places in memory from ``begin`` on, which of them exist, and their numbers in logical order."""
    memory = begin + tl.arange(0, TILE.block)[None, :]
    return memory, (memory < n) & (rows < batch), logical(memory, OPTIONS)


# Sizes that change from batch to batch: see pack_cube.
@triton.jit(do_not_specialize=["batch", "part", "groups", "sample_offset"])
def pack_ball(
    tensors,
    statistics,
    batch,
    part,
    groups,  # elements of a sample // align
    sample_offset,
    numbers,
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some samples, whole. See triton.py for what the arguments hold."""
    row, n = _samples(groups, TILE)
    rows = row[:, None]
    sample = sample_offset + rows
    base = rows.to(tl.int64) * n
    key = load_key(tensors.seed)

    start_scale = tl.full([TILE.rows], 0.0, tl.float32)
    grad_length = start_scale
    pull = start_scale + 1.0  # eps / length where the projection bites
    if OPTIONS.adv == "step":
        grad_squares = _no_squares(TILE.rows)
        start_squares = _no_squares(TILE.rows)
        for begin in range(0, n, TILE.block):
            memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
            grad = read(tensors.given, base, memory, mask, OPTIONS.given_same, OPTIONS)
            grad_squares = _add(grad_squares, grad)
            if OPTIONS.start:
                start_squares = _add(start_squares, tl.where(mask, _start_normals(key, element, sample), 0.0))
        grad_length = _length(grad_squares)
        if OPTIONS.start:
            _, _, _, word = sample_words(key, sample_offset + row, 0)
            start_scale = _ball_scale(numbers.radius, word, start_squares, n)
        if OPTIONS.project:
            moved = _no_squares(TILE.rows)
            for begin in range(0, n, TILE.block):
                memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
                x = read(tensors.x, base, memory, mask, OPTIONS.x_same, OPTIONS)
                grad = read(tensors.given, base, memory, mask, OPTIONS.given_same, OPTIONS)
                point = _ball_step(x, grad, grad_length, key, element, sample, start_scale, numbers, OPTIONS)
                moved = _add(moved, tl.where(mask, point - x, 0.0))
            length = _length(moved)
            pull = tl.where(length > numbers.eps, numbers.eps / tl.where(length > 0, length, 1.0), 1.0)

    # Rows of x_adv are written with the first triplet, or alone.
    passes = numbers.triplets
    if OPTIONS.adv != "none":
        passes = tl.maximum(numbers.triplets, 1)
    for triplet in range(passes):
        used = row < tl.where(triplet < numbers.triplets, part, 0)
        residual = triplet * part + row
        a_squares = _no_squares(TILE.rows)
        b_squares = _no_squares(TILE.rows)
        for begin in range(0, n, TILE.block):
            memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
            noise_a, noise_b = _pair_normals(key, element, sample, triplet)
            a_squares = _add(a_squares, tl.where(mask, noise_a, 0.0))
            b_squares = _add(b_squares, tl.where(mask, noise_b, 0.0))
        _, word_a, word_b, _ = sample_words(key, sample_offset + row, triplet)
        scale_a = _ball_scale(numbers.eps, word_a, a_squares, n)[:, None]
        scale_b = _ball_scale(numbers.eps, word_b, b_squares, n)[:, None]
        alpha = draw_alpha(tensors.alpha, key, residual, sample_offset + row, triplet, used, OPTIONS)
        if OPTIONS.alpha == "half":
            alpha = tl.full([TILE.rows], 0.5, tl.float32)
        tl.store(tensors.alphas + residual, alpha, mask=used)

        for begin in range(0, n, TILE.block):
            memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
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
                    point = _ball_step(x, adv, grad_length, key, element, sample, start_scale, numbers, OPTIONS)
                    # Only what lies outside is moved, so that a point inside keeps its bits.
                    pulled = x + (point - x) * pull[:, None]
                    adv = clamp(tl.where(pull[:, None] < 1.0, pulled, point), numbers, OPTIONS)
                once = mask & (rows < tl.where(triplet == 0, batch, 0))
                store_point(tensors.points + base + memory, adv, norm, once)
            noise_a, noise_b = _pair_normals(key, element, sample, triplet)
            x_a = clamp(x + noise_a * scale_a, numbers, OPTIONS)
            x_b = adv
            if OPTIONS.points != "elle-2p":
                x_b = clamp(x + noise_b * scale_b, numbers, OPTIONS)
            out_rows = adv_rows + triplet * OPTIONS.blocks * part + rows
            mask &= used[:, None]
            store_triplet(tensors.points, out_rows, part, n, memory, x_a, x_b, alpha[:, None], norm, mask, OPTIONS)


@triton.jit(do_not_specialize=["batch", "groups", "sample_offset"])
def start_ball(tensors, batch, groups, sample_offset, numbers, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """The attack's start alone."""
    row, n = _samples(groups, TILE)
    rows = row[:, None]
    sample = sample_offset + rows
    base = rows.to(tl.int64) * n
    key = load_key(tensors.seed)
    squares = _no_squares(TILE.rows)
    for begin in range(0, n, TILE.block):
        memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
        squares = _add(squares, tl.where(mask, _start_normals(key, element, sample), 0.0))
    _, _, _, word = sample_words(key, sample_offset + row, 0)
    scale = _ball_scale(numbers.radius, word, squares, n)[:, None]
    for begin in range(0, n, TILE.block):
        memory, mask, element = _tile(begin, rows, batch, n, OPTIONS, TILE)
        x = read(tensors.x, base, memory, mask, True, OPTIONS)
        start = clamp(x + _start_normals(key, element, sample) * scale, numbers, OPTIONS)
        store_point(tensors.points + base + memory, start, None, mask)
