"""elle_loss in Triton, the reduction: losses of rows to ce, E_lin and lam, by one program in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops.elle_loss.triton_rows import five_point_weight


@triton.jit
def _penalty(size, PENALTY: tl.constexpr):
    """The penalty of ``|r|`` and its derivative with respect to ``|r|``: squared, abs, smooth-L1 with beta = 1."""
    if PENALTY == 0:
        return size * size, 2.0 * size
    elif PENALTY == 1:
        return size, tl.where(size > 0, 1.0, 0.0 * size)
    else:
        large = size >= 1.0  # false for NaN, which stays what it is
        return tl.where(large, size - 0.5, 0.5 * size * size), tl.where(large, 1.0, size)


@triton.jit
def _slope_of(residual, size, derivative):
    """``derivative * d|r| / dr``, 0 where r is 0; NaN stays NaN."""
    return tl.where(residual < 0, -derivative, tl.where(residual == 0, 0.0 * size, derivative))


@triton.jit
def _linearity_of_losses(
    losses_ptr,
    slopes_ptr,
    alpha_ptr,
    first_rows,
    part,
    triplets,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """E_lin from the losses of the rows, and its slope with respect to each of them."""
    residuals = part * triplets
    penalties = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, tl.maximum(first_rows, part), BLOCK):
        sample = begin + tl.arange(0, BLOCK)
        live = sample < part
        first_slope = tl.zeros([BLOCK], tl.float32)
        for triplet in range(triplets):
            row = first_rows + triplet * BLOCKS * part + sample
            alpha = tl.load(alpha_ptr + triplet * part + sample, mask=live, other=0.0).to(tl.float32)
            if POINTS == 2:
                r = tl.zeros([BLOCK], tl.float32)
                for block in tl.static_range(5):
                    r += five_point_weight(block) * tl.load(losses_ptr + row + block * part, mask=live, other=0.0)
            else:
                l_a = tl.load(losses_ptr + row, mask=live, other=0.0)
                # x_b: the second block, or x_adv.
                l_b = tl.load(losses_ptr + (row + part if POINTS == 0 else sample), mask=live, other=0.0)
                l_c = tl.load(losses_ptr + row + (BLOCKS - 1) * part, mask=live, other=0.0)
                r = l_c - (1.0 - alpha) * l_a - alpha * l_b
            size = tl.abs(r)
            penalty, derivative = _penalty(size, PENALTY)
            penalties += penalty
            slope = _slope_of(r, size, derivative) / residuals
            if POINTS == 2:
                for block in tl.static_range(5):
                    tl.store(slopes_ptr + row + block * part, five_point_weight(block) * slope, mask=live)
            else:
                tl.store(slopes_ptr + row, (alpha - 1.0) * slope, mask=live)
                tl.store(slopes_ptr + row + (BLOCKS - 1) * part, slope, mask=live)
                if POINTS == 0:
                    tl.store(slopes_ptr + row + part, -alpha * slope, mask=live)
                else:
                    first_slope -= alpha * slope
        tl.store(slopes_ptr + sample, first_slope, mask=sample < first_rows)
    return tl.sum(penalties, 0) / residuals


@triton.jit
def _linearity_of_logits(sizes_ptr, residuals, PENALTY: tl.constexpr, BLOCK: tl.constexpr):
    """E_lin from the squared sizes of the residuals, each replaced by ``s`` with ``dE_lin / dr = s * r``."""
    penalties = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, residuals, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        live = index < residuals
        square = tl.load(sizes_ptr + index, mask=live, other=0.0)
        if PENALTY == 0:
            penalties += square
            slope = tl.full([BLOCK], 2.0, tl.float32)
        else:
            size = tl.sqrt(square)
            penalty, derivative = _penalty(size, PENALTY)
            penalties += penalty
            slope = tl.where(size == 0, 0.0, derivative / tl.where(size == 0, 1.0, size))
        tl.store(sizes_ptr + index, slope / residuals, mask=live)
    return tl.sum(penalties, 0) / residuals


@triton.jit
def _moments(mean_ptr, spread_ptr, count, window, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and population standard deviation of the history, float64; both 0 while it is empty."""
    if WINDOW:
        # spread_ptr is the ring of the last values.
        held = tl.minimum(tl.maximum(count, 1), window)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, window, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            total += tl.load(spread_ptr + place, mask=(place < window) & (place < held), other=0.0)
        mean = tl.sum(total, 0) / held.to(tl.float64)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, window, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = (place < window) & (place < held)
            gap = tl.where(inside, tl.load(spread_ptr + place, mask=inside, other=0.0) - mean, 0.0)
            total += gap * gap
        return mean, tl.sqrt(tl.sum(total, 0) / held.to(tl.float64))
    else:
        mean = tl.load(mean_ptr)
        return mean, tl.sqrt(tl.load(spread_ptr) / tl.maximum(count, 1).to(tl.float64))


@triton.jit
def _next_lam(
    value,
    lam_ptr,
    count_ptr,
    skipped_ptr,
    mean_ptr,
    spread_ptr,
    lam_max,
    gamma,
    min_history,
    window,
    SENSITIVITY: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Takes in this step's E_lin (float64) and returns the new lam (paper, Algorithm 1, lines 9 to 11)."""
    lam = tl.load(lam_ptr)
    count = tl.load(count_ptr)
    skipped = tl.load(skipped_ptr)
    mean, std = _moments(mean_ptr, spread_ptr, count, window, WINDOW, BLOCK)
    finite = tl.abs(value) < float("inf")
    detected = (value > mean + SENSITIVITY * std) & (count >= min_history)
    new = tl.where(detected, lam_max, gamma * lam)
    new = tl.where(finite, new, lam)
    tl.store(lam_ptr, new)
    if WINDOW:
        tl.store(spread_ptr + count % window, value, mask=finite)
    else:
        gap = value - mean
        step = gap / (count + 1).to(tl.float64)
        tl.store(spread_ptr, tl.load(spread_ptr) + gap * (gap - step), mask=finite)
        tl.store(mean_ptr, mean + step, mask=finite)
    tl.store(count_ptr, count + tl.where(finite, 1, 0))
    tl.store(skipped_ptr, skipped + tl.where(finite, 0, 1))
    return new


@triton.jit(do_not_specialize=["window", "rows_with_loss", "first_rows", "part", "triplets", "min_history"])
def reduce_forward(
    saved_ptr,
    alpha_ptr,
    lam_ptr,  # the value of lam, or the state of ELLE-A
    count_ptr,
    skipped_ptr,
    mean_ptr,
    spread_ptr,
    loss_ptr,
    ce_ptr,
    e_lin_ptr,
    lam_value,
    window,
    rows_with_loss,
    first_rows,
    part,
    triplets,
    lam_max,
    gamma,
    min_history,
    OF_LOGITS: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PENALTY: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    SENSITIVITY: tl.constexpr,  # compiled in, as a number given to a kernel is rounded to float32
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ce, E_lin, the new lam, ``loss = ce + lam * E_lin``, and the slopes and the lam that the backward needs."""
    slopes_ptr = saved_ptr + 4 * rows_with_loss
    if OF_LOGITS:
        e_lin = _linearity_of_logits(slopes_ptr, part * triplets, PENALTY, BLOCK)
    else:
        e_lin = _linearity_of_losses(
            saved_ptr, slopes_ptr, alpha_ptr, first_rows, part, triplets, POINTS, BLOCKS, PENALTY, BLOCK
        )
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, first_rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        total += tl.load(saved_ptr + row, mask=row < first_rows, other=0.0)
    ce = tl.sum(total, 0) / tl.maximum(first_rows, 1)
    if ADAPTIVE:
        lam = _next_lam(
            e_lin.to(tl.float64),
            lam_ptr,
            count_ptr,
            skipped_ptr,
            mean_ptr,
            spread_ptr,
            lam_max,
            gamma,
            min_history,
            window,
            SENSITIVITY,
            WINDOW,
            BLOCK,
        )
    elif lam_ptr is not None:
        lam = tl.load(lam_ptr).to(tl.float32)
    else:
        lam = lam_value
    tl.store(ce_ptr, ce)
    tl.store(e_lin_ptr, e_lin)
    tl.store(slopes_ptr + (part * triplets if OF_LOGITS else rows_with_loss), lam)
    tl.store(loss_ptr, ce + lam * e_lin)


@triton.jit(do_not_specialize=["window", "min_history"])
def update_lam(
    e_lin_ptr,
    lam_ptr,
    count_ptr,
    skipped_ptr,
    mean_ptr,
    spread_ptr,
    used_lam_ptr,
    window,
    lam_max,
    gamma,
    min_history,
    SENSITIVITY: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state of ELLE-A alone."""
    value = tl.load(e_lin_ptr).to(tl.float64)
    lam = _next_lam(
        value,
        lam_ptr,
        count_ptr,
        skipped_ptr,
        mean_ptr,
        spread_ptr,
        lam_max,
        gamma,
        min_history,
        window,
        SENSITIVITY,
        WINDOW,
        BLOCK,
    )
    tl.store(used_lam_ptr, lam)
