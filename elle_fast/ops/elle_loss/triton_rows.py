"""elle_loss in Triton, the forward over logits: losses of rows, residuals of logits.

Memory-bound: each logit is read once (with probabilities or label smoothing twice, the second time out of the cache).
One exponential a logit: on an H200 (132 SM at 1.98 GHz, 16 a clock) 0.24 ps each, against 0.47 ps to read two bytes at
4.3 TB/s.

A row's maximum and the logarithm of its sum are kept apart. Their sum, the usual log-sum-exp, would round away the
difference for logits that share a large offset.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# The lowest float32, not -inf: a maximum that starts here meets no inf - inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)

# What ``saved`` holds, each ``losses`` numbers after the one before; see triton.py.
LOSSES, MAXIMA, LOG_SUMS, TARGET_SUMS, SLOPES = (tl.constexpr(place) for place in range(5))

# Sizes that change from batch to batch or model to model: compiled once for all of them. They are arguments of their
# own, as Triton specialises the integers in a tuple whatever do_not_specialize says.
SIZES = ("losses", "residuals", "adv_rows", "part", "class_groups", "stride_groups", "target_groups", "programs")


class Shape(NamedTuple):
    """The sizes of a call, and its label smoothing."""

    losses: Any  # rows that have a loss
    residuals: Any
    adv_rows: Any
    part: Any
    classes: Any
    stride: Any  # from row to row of the logits
    target_stride: Any
    smoothing: Any


@triton.jit
def shape_of(
    losses, residuals, adv_rows, part, class_groups, stride_groups, target_groups, smoothing, TILE: tl.constexpr
):
    """The :class:`Shape`, with products of a constant where the compiler has to know what a size is divisible by."""
    classes = class_groups * TILE.align
    stride = stride_groups.to(tl.int64) * TILE.align
    target_stride = target_groups.to(tl.int64) * TILE.target_align
    return Shape(losses, residuals, adv_rows, part, classes, stride, target_stride, smoothing)


@triton.jit
def sample_of(row, shape):
    """The sample that a packed row belongs to."""
    return tl.where(row < shape.adv_rows, row, (row - shape.adv_rows) % shape.part)


@triton.jit
def load(pointer, row, stride, column, mask, other):
    """Entries of rows, as float32."""
    return tl.load(pointer + row.to(tl.int64) * stride + column, mask=mask, other=other).to(tl.float32)


@triton.jit
def probabilities(tensors, shape, sample, column, mask, OPTIONS: tl.constexpr):
    """The target of rows as probabilities, ``[ROWS, BLOCK]``; 0 where masked."""
    if OPTIONS.soft:
        q = load(tensors.target, sample[:, None], shape.target_stride, column, mask, 0.0)
    else:
        label = tl.load(tensors.target + sample.to(tl.int64) * shape.target_stride)
        q = tl.where(column == label[:, None], 1.0, 0.0)
    if OPTIONS.smooth:
        q = (1.0 - shape.smoothing) * q + shape.smoothing / shape.classes
    return tl.where(mask, q, 0.0)


@triton.jit
def _row_losses(tensors, shape, begin_row, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """Cross-entropy of rows, and what their gradient needs: maximum, log of the sum of exponentials, target's sum."""
    row = begin_row + tl.arange(0, TILE.rows)
    live = row < shape.losses
    # Rows beyond the last stand in as the last one, and are not stored.
    row = tl.minimum(row, shape.losses - 1)
    sample = sample_of(row, shape)
    # Each lane has a maximum and a sum of its own, so that lanes meet once, after the loop.
    largest = tl.full([TILE.rows, TILE.block], _LOWEST, tl.float32)
    total = tl.full([TILE.rows, TILE.block], 0.0, tl.float32)
    for begin in range(0, shape.classes, TILE.block):
        column = begin + tl.arange(0, TILE.block)[None, :]
        z = load(tensors.logits, row[:, None], shape.stride, column, column < shape.classes, float("-inf"))
        gap = z - largest
        # One of the two exponentials of the rescaled sum is exp(0).
        smaller = tl.exp(-tl.abs(gap))
        total = tl.where(gap > 0, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, z)
    maximum = tl.max(largest, 1)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - maximum[:, None]), 1))

    # A label that is no class reads nothing and makes the loss NaN: an error would have to wait for the device.
    unknown = row < 0
    if not OPTIONS.soft:
        label = tl.load(tensors.target + sample.to(tl.int64) * shape.target_stride)
        unknown = (label < 0) | (label >= shape.classes)
    if OPTIONS.soft or OPTIONS.smooth:
        # sum_c q_c (log_sum + maximum - z_c), from the row once more: it comes out of the cache.
        products = tl.full([TILE.rows, TILE.block], 0.0, tl.float32)
        sums = tl.full([TILE.rows, TILE.block], 0.0, tl.float32)
        for begin in range(0, shape.classes, TILE.block):
            column = begin + tl.arange(0, TILE.block)[None, :]
            mask = column < shape.classes
            z = load(tensors.logits, row[:, None], shape.stride, column, mask, 0.0)
            q = probabilities(tensors, shape, sample, column, mask, OPTIONS)
            products += tl.where(mask, q * ((maximum[:, None] - z) + log_sum[:, None]), 0.0)
            sums += q
        loss = tl.sum(products, 1)
        tl.store(tensors.saved + TARGET_SUMS * shape.losses + row, tl.sum(sums, 1), mask=live)
    else:
        known = (label >= 0) & (label < shape.classes)
        z = tl.load(tensors.logits + row.to(tl.int64) * shape.stride + label, mask=known, other=0.0)
        loss = log_sum + (maximum - z.to(tl.float32))
    tl.store(tensors.saved + LOSSES * shape.losses + row, tl.where(unknown, float("nan"), loss), mask=live)
    tl.store(tensors.saved + MAXIMA * shape.losses + row, maximum, mask=live)
    # NaN here too, and so in the row's gradient: a step with a wrong label should not look like a good one.
    tl.store(tensors.saved + LOG_SUMS * shape.losses + row, tl.where(unknown, float("nan"), log_sum), mask=live)


@triton.jit
def residual_of(tensors, shape, sample, triplet, column, mask, alpha, OPTIONS: tl.constexpr):
    """``r = h(x_c) - (1 - alpha) h(x_a) - alpha h(x_b)`` of logits (or the five-point sum), ``[ROWS, BLOCK]``."""
    row = (shape.adv_rows + triplet * OPTIONS.blocks * shape.part + sample)[:, None]
    h_a = load(tensors.logits, row, shape.stride, column, mask, 0.0)
    if OPTIONS.points == "five-point":
        r = five_point_weight(0) * h_a
        for block in tl.static_range(1, 5):
            h = load(tensors.logits, row + block * shape.part, shape.stride, column, mask, 0.0)
            r += five_point_weight(block) * h
        return r
    else:
        # x_b: the second block, or x_adv.
        row_b = row + shape.part if OPTIONS.points == "elle" else sample[:, None]
        h_b = load(tensors.logits, row_b, shape.stride, column, mask, 0.0)
        h_c = load(tensors.logits, row + (OPTIONS.blocks - 1) * shape.part, shape.stride, column, mask, 0.0)
        return h_c - (1.0 - alpha) * h_a - alpha * h_b


@triton.jit
def five_point_weight(block: tl.constexpr):
    """Definition 3 of the paper: -1/12, 4/3, -5/2, 4/3, -1/12."""
    if block == 2:
        return -2.5
    elif block == 0 or block == 4:
        return -1.0 / 12.0
    else:
        return 4.0 / 3.0


@triton.jit
def _residual_sizes(tensors, shape, slopes, begin, OPTIONS: tl.constexpr, TILE: tl.constexpr):
    """``||r||^2`` over the classes."""
    index = begin + tl.arange(0, TILE.rows)
    live = index < shape.residuals
    index = tl.minimum(index, shape.residuals - 1)
    alpha = tl.load(tensors.alpha + index).to(tl.float32)[:, None]
    squares = tl.full([TILE.rows, TILE.block], 0.0, tl.float32)
    for start in range(0, shape.classes, TILE.block):
        column = start + tl.arange(0, TILE.block)[None, :]
        mask = column < shape.classes
        r = residual_of(tensors, shape, index % shape.part, index // shape.part, column, mask, alpha, OPTIONS)
        squares += r * r
    tl.store(slopes + index, tl.sum(squares, 1), mask=live)


@triton.jit(do_not_specialize=SIZES)
def rows_forward(
    tensors,
    losses,
    residuals,
    adv_rows,
    part,
    class_groups,  # classes // align
    stride_groups,
    target_groups,
    smoothing,
    programs,  # over rows; those beyond take residuals
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One launch: losses of rows and, for the linearity of the logits, squared sizes of residuals."""
    shape = shape_of(losses, residuals, adv_rows, part, class_groups, stride_groups, target_groups, smoothing, TILE)
    program = tl.program_id(0)
    if program < programs:
        _row_losses(tensors, shape, program * TILE.rows, OPTIONS, TILE)
    elif OPTIONS.of == "logits":
        slopes = tensors.saved + SLOPES * losses
        _residual_sizes(tensors, shape, slopes, (program - programs) * TILE.rows, OPTIONS, TILE)
