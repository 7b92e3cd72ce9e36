"""elle_loss in Triton, the backward: the gradient of the logits in closed form.

Memory-bound: each logit is read and its gradient written. With the forward that is 3 accesses a logit where 2 is the
least possible (read once, write once). The rows are taken from the last to the first, so that what the forward has just
read may still be in the cache; the gradient is written past it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops.elle_loss.triton_rows import (
    LOG_SUMS,
    MAXIMA,
    SIZES,
    SLOPES,
    TARGET_SUMS,
    five_point_weight,
    load,
    probabilities,
    residual_of,
    sample_of,
    shape_of,
)


@triton.jit
def _upstream(upstream, lam_ptr):
    """What reaches ce and E_lin, each from its own gradient and from that of loss = ce + lam * E_lin."""
    to_ce = 0.0
    to_e_lin = 0.0
    if upstream.loss is not None:
        grad_loss = tl.load(upstream.loss).to(tl.float32)
        to_ce += grad_loss
        to_e_lin += grad_loss * tl.load(lam_ptr)
    if upstream.ce is not None:
        to_ce += tl.load(upstream.ce).to(tl.float32)
    if upstream.e_lin is not None:
        to_e_lin += tl.load(upstream.e_lin).to(tl.float32)
    return to_ce, to_e_lin


@triton.jit
def _row_gradient(tensors, shape, row, sample, factor, column, OPTIONS: tl.constexpr):
    """``factor * (sum(q) softmax(z) - q)``, ``[ROWS, BLOCK]``."""
    mask = column < shape.classes
    z = load(tensors.logits, row[:, None], shape.stride, column, mask, float("-inf"))
    maximum = tl.load(tensors.saved + MAXIMA * shape.losses + row)
    log_sum = tl.load(tensors.saved + LOG_SUMS * shape.losses + row)
    softmax = tl.exp((z - maximum[:, None]) - log_sum[:, None])
    if OPTIONS.soft or OPTIONS.smooth:
        softmax *= tl.load(tensors.saved + TARGET_SUMS * shape.losses + row)[:, None]
    q = probabilities(tensors, shape, sample, column, mask, OPTIONS)
    return factor[:, None] * (softmax - q)


@triton.jit
def _store(pointer, shape, row, column, value, mask):
    pointer += row[:, None].to(tl.int64) * shape.classes + column
    # Streamed: it should not push out of the cache the logits that are still to be read.
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=SIZES)
def rows_backward(
    tensors,
    upstream,
    grad_logits,
    losses,
    residuals,
    adv_rows,
    part,
    class_groups,  # classes // align
    stride_groups,
    target_groups,
    smoothing,
    programs,  # side by side over the columns
    OPTIONS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The gradient of the logits ``[N, C]``, contiguous: by rows, or by samples for the linearity of the logits."""
    shape = shape_of(losses, residuals, adv_rows, part, class_groups, stride_groups, target_groups, smoothing, TILE)
    # From the last row to the first: the forward has just read the last ones.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column = (program % programs) * TILE.block + tl.arange(0, TILE.block)[None, :]
    index = (program // programs) * TILE.rows + tl.arange(0, TILE.rows)
    slopes = tensors.saved + SLOPES * losses
    to_ce, to_e_lin = _upstream(upstream, slopes + (residuals if OPTIONS.of == "logits" else losses))

    if OPTIONS.of == "loss":
        live = index < losses
        row = tl.minimum(index, losses - 1)
        # d loss / d L(row): the mean of the rows of x_adv, and the slope of E_lin.
        sample = sample_of(row, shape)
        factor = to_e_lin * tl.load(slopes + row) + tl.where(row < adv_rows, to_ce / tl.maximum(adv_rows, 1), 0.0)
        grad = _row_gradient(tensors, shape, row, sample, factor, column, OPTIONS)
        _store(grad_logits, shape, row, column, grad, live[:, None] & (column < shape.classes))
    else:
        # A sample's residuals are spread over its rows: here a program has a sample with all its triplets.
        samples = tl.maximum(adv_rows, part)
        live = index < samples
        sample = tl.minimum(index, samples - 1)
        adv_grad = tl.full([TILE.rows, TILE.block], 0.0, tl.float32)
        if losses > 0:
            factor = tl.full([TILE.rows], 0.0, tl.float32) + to_ce / losses
            adv_grad = _row_gradient(tensors, shape, sample, sample, factor, column, OPTIONS)
        in_part = tl.minimum(sample, part - 1)
        mask = (live & (sample < part))[:, None] & (column < shape.classes)
        for triplet in range(residuals // part):
            residual = triplet * part + in_part
            alpha = tl.load(tensors.alpha + residual).to(tl.float32)[:, None]
            r = residual_of(tensors, shape, in_part, triplet, column, mask, alpha, OPTIONS)
            grad = to_e_lin * tl.load(slopes + residual)[:, None] * r
            row = adv_rows + triplet * OPTIONS.blocks * part + in_part
            if OPTIONS.points == "five-point":
                for block in tl.static_range(5):
                    _store(grad_logits, shape, row + block * part, column, five_point_weight(block) * grad, mask)
            else:
                _store(grad_logits, shape, row, column, (alpha - 1.0) * grad, mask)
                _store(grad_logits, shape, row + (OPTIONS.blocks - 1) * part, column, grad, mask)
                if OPTIONS.points == "elle":
                    _store(grad_logits, shape, row + part, column, -alpha * grad, mask)
                else:
                    adv_grad -= tl.where(mask, alpha * grad, 0.0)
        mask = (live & (sample < adv_rows))[:, None] & (column < shape.classes)
        _store(grad_logits, shape, sample, column, adv_grad, mask)
