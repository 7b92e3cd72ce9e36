"""elle_loss in Triton, the forward over logits: losses of rows, residuals of logits.

Memory-bound: each logit is read once (with probabilities or label smoothing twice, the second time out of the cache).
One exponential a logit: on an H200 (132 SM at 1.98 GHz, 16 a clock) 0.24 ps each, against 0.47 ps to read two bytes at
4.3 TB/s.

A row's maximum and the logarithm of its sum are kept apart. Their sum, the usual log-sum-exp, would round away the
difference for logits that share a large offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Less than every finite float32 but one: a maximum that starts here meets no inf - inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)

# Sizes that change from batch to batch or model to model: compiled once for all of them.
SIZES = ("rows_with_loss", "residuals", "first_rows", "part", "class_groups", "stride_groups", "target_stride_groups")


@triton.jit
def sample_of(row, first_rows, part):
    """The sample that a packed row belongs to."""
    return tl.where(row < first_rows, row, (row - first_rows) % part)


@triton.jit
def load(pointer, row, stride, column, mask, other):
    """Entries of rows, as float32."""
    return tl.load(pointer + row.to(tl.int64) * stride + column, mask=mask, other=other).to(tl.float32)


@triton.jit
def probabilities(
    target_ptr, sample, target_stride, column, mask, classes, smoothing, SOFT: tl.constexpr, SMOOTH: tl.constexpr
):
    """The target of rows as probabilities, ``[ROWS, BLOCK]``; 0 where masked."""
    if SOFT:
        q = load(target_ptr, sample[:, None], target_stride, column, mask, 0.0)
    else:
        label = tl.load(target_ptr + sample.to(tl.int64) * target_stride)
        q = tl.where(column == label[:, None], 1.0, 0.0)
    if SMOOTH:
        q = (1.0 - smoothing) * q + smoothing / classes
    return tl.where(mask, q, 0.0)


@triton.jit
def _row_losses(
    logits_ptr,
    target_ptr,
    saved_ptr,
    begin_row,
    rows_with_loss,
    first_rows,
    part,
    classes,
    stride,
    target_stride,
    smoothing,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cross-entropy of rows, and what their gradient needs: maximum, log of the sum of exponentials, target's sum."""
    row = begin_row + tl.arange(0, ROWS)
    live = row < rows_with_loss
    # Rows beyond the last stand in as the last one, and are not stored.
    row = tl.minimum(row, rows_with_loss - 1)
    sample = sample_of(row, first_rows, part)
    # Each lane has a maximum and a sum of its own, so that lanes meet once, after the loop.
    largest = tl.full([ROWS, BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for begin in range(0, classes, BLOCK):
        column = begin + tl.arange(0, BLOCK)[None, :]
        z = load(logits_ptr, row[:, None], stride, column, column < classes, float("-inf"))
        gap = z - largest
        # One of the two exponentials of the rescaled sum is exp(0).
        smaller = tl.exp(-tl.abs(gap))
        total = tl.where(gap > 0, total * smaller + 1.0, total + smaller)
        largest = tl.maximum(largest, z)
    maximum = tl.max(largest, 1)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - maximum[:, None]), 1))

    # A label that is no class reads nothing and makes the loss NaN: an error would have to wait for the device.
    unknown = row < 0
    if not SOFT:
        label = tl.load(target_ptr + sample.to(tl.int64) * target_stride)
        unknown = (label < 0) | (label >= classes)
    if SOFT or SMOOTH:
        # sum_c q_c (log_sum + maximum - z_c), from the row once more: it comes out of the cache.
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        for begin in range(0, classes, BLOCK):
            column = begin + tl.arange(0, BLOCK)[None, :]
            mask = column < classes
            z = load(logits_ptr, row[:, None], stride, column, mask, 0.0)
            q = probabilities(target_ptr, sample, target_stride, column, mask, classes, smoothing, SOFT, SMOOTH)
            products += tl.where(mask, q * ((maximum[:, None] - z) + log_sum[:, None]), 0.0)
            sums += q
        loss = tl.sum(products, 1)
        tl.store(saved_ptr + 3 * rows_with_loss + row, tl.sum(sums, 1), mask=live)
    else:
        z = tl.load(logits_ptr + row.to(tl.int64) * stride + label, mask=(label >= 0) & (label < classes), other=0.0)
        loss = log_sum + (maximum - z.to(tl.float32))
    tl.store(saved_ptr + row, tl.where(unknown, float("nan"), loss), mask=live)
    tl.store(saved_ptr + rows_with_loss + row, maximum, mask=live)
    # NaN here too, and so in the row's gradient: a step with a wrong label should not look like a good one.
    tl.store(saved_ptr + 2 * rows_with_loss + row, tl.where(unknown, float("nan"), log_sum), mask=live)


@triton.jit
def residual_of(
    logits_ptr,
    sample,
    triplet,
    first_rows,
    part,
    stride,
    column,
    mask,
    alpha,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """``r = h(x_c) - (1 - alpha) h(x_a) - alpha h(x_b)`` of logits (or the five-point sum), ``[ROWS, BLOCK]``."""
    row = (first_rows + triplet * BLOCKS * part + sample)[:, None]
    h_a = load(logits_ptr, row, stride, column, mask, 0.0)
    if POINTS == 0:
        h_b = load(logits_ptr, row + part, stride, column, mask, 0.0)
        h_c = load(logits_ptr, row + 2 * part, stride, column, mask, 0.0)
        return h_c - (1.0 - alpha) * h_a - alpha * h_b
    elif POINTS == 1:
        h_b = load(logits_ptr, sample[:, None], stride, column, mask, 0.0)
        h_c = load(logits_ptr, row + part, stride, column, mask, 0.0)
        return h_c - (1.0 - alpha) * h_a - alpha * h_b
    else:
        r = five_point_weight(0) * h_a
        for block in tl.static_range(1, 5):
            r += five_point_weight(block) * load(logits_ptr, row + block * part, stride, column, mask, 0.0)
        return r


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
def _residual_sizes(
    logits_ptr,
    alpha_ptr,
    sizes_ptr,
    begin,
    residuals,
    first_rows,
    part,
    classes,
    stride,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``||r||^2`` over the classes."""
    index = begin + tl.arange(0, ROWS)
    live = index < residuals
    index = tl.minimum(index, residuals - 1)
    alpha = tl.load(alpha_ptr + index).to(tl.float32)[:, None]
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = column < classes
        r = residual_of(
            logits_ptr, index % part, index // part, first_rows, part, stride, column, mask, alpha, POINTS, BLOCKS
        )
        squares += r * r
    tl.store(sizes_ptr + index, tl.sum(squares, 1), mask=live)


@triton.jit(do_not_specialize=[*SIZES, "loss_programs"])
def rows_forward(
    logits_ptr,
    target_ptr,
    alpha_ptr,
    saved_ptr,
    rows_with_loss,
    residuals,
    first_rows,
    part,
    class_groups,
    stride_groups,
    target_stride_groups,
    smoothing,
    loss_programs,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    OF_LOGITS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ALIGN: tl.constexpr,
    TARGET_ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One launch: losses of rows and, for the linearity of the logits, squared sizes of residuals."""
    # As products with a constant, so that the compiler knows what they are divisible by.
    classes = class_groups * ALIGN
    stride = stride_groups.to(tl.int64) * ALIGN
    target_stride = target_stride_groups.to(tl.int64) * TARGET_ALIGN
    program = tl.program_id(0)
    if program < loss_programs:
        _row_losses(
            logits_ptr,
            target_ptr,
            saved_ptr,
            program * ROWS,
            rows_with_loss,
            first_rows,
            part,
            classes,
            stride,
            target_stride,
            smoothing,
            SOFT,
            SMOOTH,
            ROWS,
            BLOCK,
        )
    elif OF_LOGITS:
        _residual_sizes(
            logits_ptr,
            alpha_ptr,
            saved_ptr + 4 * rows_with_loss,
            (program - loss_programs) * ROWS,
            residuals,
            first_rows,
            part,
            classes,
            stride,
            POINTS,
            BLOCKS,
            ROWS,
            BLOCK,
        )
