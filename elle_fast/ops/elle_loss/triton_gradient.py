"""elle_loss in Triton, the backward: the gradient of the logits in closed form.

Memory-bound: each logit is read and its gradient written. With the forward that is 3 accesses a logit where 2 is the
least possible (read once, write once). The rows are taken from the last to the first, so that what the forward has just
read may still be in the cache; the gradient is written past it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops.elle_loss.triton_rows import SIZES, five_point_weight, load, probabilities, residual_of, sample_of


@triton.jit
def _upstream(grad_loss_ptr, grad_ce_ptr, grad_e_lin_ptr, lam_ptr):
    """What reaches ce and E_lin, each from its own gradient and from that of loss = ce + lam * E_lin."""
    to_ce = 0.0
    to_e_lin = 0.0
    if grad_loss_ptr is not None:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32)
        to_ce += grad_loss
        to_e_lin += grad_loss * tl.load(lam_ptr)
    if grad_ce_ptr is not None:
        to_ce += tl.load(grad_ce_ptr).to(tl.float32)
    if grad_e_lin_ptr is not None:
        to_e_lin += tl.load(grad_e_lin_ptr).to(tl.float32)
    return to_ce, to_e_lin


@triton.jit
def _row_gradient(
    logits_ptr,
    target_ptr,
    saved_ptr,
    row,
    sample,
    factor,
    rows_with_loss,
    classes,
    stride,
    target_stride,
    smoothing,
    column,
    mask,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
):
    """``factor * (sum(q) softmax(z) - q)``, ``[ROWS, BLOCK]``."""
    z = load(logits_ptr, row[:, None], stride, column, mask, float("-inf"))
    maximum = tl.load(saved_ptr + rows_with_loss + row)
    log_sum = tl.load(saved_ptr + 2 * rows_with_loss + row)
    softmax = tl.exp((z - maximum[:, None]) - log_sum[:, None])
    if SOFT or SMOOTH:
        softmax *= tl.load(saved_ptr + 3 * rows_with_loss + row)[:, None]
    q = probabilities(target_ptr, sample, target_stride, column, mask, classes, smoothing, SOFT, SMOOTH)
    return factor[:, None] * (softmax - q)


@triton.jit(do_not_specialize=[*SIZES, "column_programs"])
def rows_backward(
    logits_ptr,
    target_ptr,
    alpha_ptr,
    saved_ptr,
    grad_loss_ptr,
    grad_ce_ptr,
    grad_e_lin_ptr,
    grad_logits_ptr,
    rows_with_loss,
    residuals,
    first_rows,
    part,
    class_groups,
    stride_groups,
    target_stride_groups,
    smoothing,
    column_programs,
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
    """The gradient of the logits ``[N, C]``, contiguous: by rows, or by samples for the linearity of the logits."""
    classes = class_groups * ALIGN
    stride = stride_groups.to(tl.int64) * ALIGN
    target_stride = target_stride_groups.to(tl.int64) * TARGET_ALIGN
    # From the last row to the first: the forward has just read the last ones.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column = (program % column_programs) * BLOCK + tl.arange(0, BLOCK)[None, :]
    index = (program // column_programs) * ROWS + tl.arange(0, ROWS)
    slopes_ptr = saved_ptr + 4 * rows_with_loss
    slopes = residuals if OF_LOGITS else rows_with_loss
    to_ce, to_e_lin = _upstream(grad_loss_ptr, grad_ce_ptr, grad_e_lin_ptr, slopes_ptr + slopes)

    if not OF_LOGITS:
        live = index < rows_with_loss
        row = tl.minimum(index, rows_with_loss - 1)
        sample = sample_of(row, first_rows, part)
        # d loss / d L(row): the mean of the first rows, and the slope of E_lin.
        factor = to_e_lin * tl.load(slopes_ptr + row) + tl.where(
            row < first_rows, to_ce / tl.maximum(first_rows, 1), 0.0
        )
        grad = _row_gradient(
            logits_ptr,
            target_ptr,
            saved_ptr,
            row,
            sample,
            factor,
            rows_with_loss,
            classes,
            stride,
            target_stride,
            smoothing,
            column,
            column < classes,
            SOFT,
            SMOOTH,
        )
        _store_gradient(grad_logits_ptr, row, classes, column, grad, live[:, None] & (column < classes))
    else:
        # A sample's residuals are spread over its rows: here a program has a sample with all its triplets.
        samples = tl.maximum(first_rows, part)
        live = index < samples
        sample = tl.minimum(index, samples - 1)
        first = tl.zeros([ROWS, BLOCK], tl.float32)
        if rows_with_loss > 0:
            factor = tl.zeros([ROWS], tl.float32) + to_ce / rows_with_loss
            first = _row_gradient(
                logits_ptr,
                target_ptr,
                saved_ptr,
                sample,
                sample,
                factor,
                rows_with_loss,
                classes,
                stride,
                target_stride,
                smoothing,
                column,
                column < classes,
                SOFT,
                SMOOTH,
            )
        in_part = tl.minimum(sample, part - 1)
        mask = (live & (sample < part))[:, None] & (column < classes)
        for triplet in range(residuals // part):
            residual = triplet * part + in_part
            alpha = tl.load(alpha_ptr + residual).to(tl.float32)[:, None]
            r = residual_of(logits_ptr, in_part, triplet, first_rows, part, stride, column, mask, alpha, POINTS, BLOCKS)
            grad = to_e_lin * tl.load(slopes_ptr + residual)[:, None] * r
            row = first_rows + triplet * BLOCKS * part + in_part
            if POINTS == 2:
                for block in tl.static_range(5):
                    weight = five_point_weight(block)
                    _store_gradient(grad_logits_ptr, row + block * part, classes, column, weight * grad, mask)
            else:
                _store_gradient(grad_logits_ptr, row, classes, column, (alpha - 1.0) * grad, mask)
                _store_gradient(grad_logits_ptr, row + (BLOCKS - 1) * part, classes, column, grad, mask)
                if POINTS == 0:
                    _store_gradient(grad_logits_ptr, row + part, classes, column, -alpha * grad, mask)
                else:
                    first -= tl.where(mask, alpha * grad, 0.0)
        mask = (live & (sample < first_rows))[:, None] & (column < classes)
        _store_gradient(grad_logits_ptr, sample, classes, column, first, mask)


@triton.jit
def _store_gradient(pointer, row, classes, column, value, mask):
    pointer += row[:, None].to(tl.int64) * classes + column
    # Streamed: it should not push out of the cache the logits that are still to be read.
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first")
