"""elle_loss in Triton, the reduction: losses of rows to ce, E_lin and lam, by one program in one fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from elle_fast.ops.elle_loss.triton_rows import LOSSES, SLOPES, five_point_weight


@triton.jit
def _penalty(size, OPTIONS: tl.constexpr):
    """The penalty of ``|r|`` and its derivative with respect to ``|r|``: squared, abs, smooth-L1 with beta = 1."""
    if OPTIONS.penalty == "squared":
        return size * size, 2.0 * size
    elif OPTIONS.penalty == "abs":
        return size, tl.where(size > 0, 1.0, 0.0 * size)
    else:
        large = size >= 1.0  # false for NaN, which stays what it is
        return tl.where(large, size - 0.5, 0.5 * size * size), tl.where(large, 1.0, size)


@triton.jit
def _linearity_of_losses(
    losses, slopes, alphas, adv_rows, part, triplets, residuals, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """E_lin and relative E_lin from the losses of the rows, and E_lin's slope with respect to each of them."""
    penalties = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    rises = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, tl.maximum(adv_rows, part), BLOCK):
        sample = begin + tl.arange(0, BLOCK)
        live = sample < part
        adv_slope = tl.zeros([BLOCK], tl.float32)
        for triplet in range(triplets):
            row = adv_rows + triplet * OPTIONS.blocks * part + sample
            alpha = tl.load(alphas + triplet * part + sample, mask=live, other=0.0).to(tl.float32)
            if OPTIONS.points == "five-point":
                r = tl.zeros([BLOCK], tl.float32)
                for block in tl.static_range(5):
                    r += five_point_weight(block) * tl.load(losses + row + block * part, mask=live, other=0.0)
            else:
                l_a = tl.load(losses + row, mask=live, other=0.0)
                # x_b: the second block, or x_adv.
                row_b = row + part if OPTIONS.points == "elle" else sample
                l_b = tl.load(losses + row_b, mask=live, other=0.0)
                l_c = tl.load(losses + row + (OPTIONS.blocks - 1) * part, mask=live, other=0.0)
                r = l_c - (1.0 - alpha) * l_a - alpha * l_b
                squares += r * r
                rise = l_b - l_a
                rises += tl.where(live, rise * rise + 1e-12 * (1.0 + l_c * l_c), 0.0)
            size = tl.abs(r)
            penalty, derivative = _penalty(size, OPTIONS)
            penalties += penalty
            # d|r| / dr is 0 where r is 0; NaN stays NaN.
            slope = tl.where(r < 0, -derivative, tl.where(r == 0, 0.0 * size, derivative)) / residuals
            if OPTIONS.points == "five-point":
                for block in tl.static_range(5):
                    tl.store(slopes + row + block * part, five_point_weight(block) * slope, mask=live)
            else:
                tl.store(slopes + row, (alpha - 1.0) * slope, mask=live)
                tl.store(slopes + row + (OPTIONS.blocks - 1) * part, slope, mask=live)
                if OPTIONS.points == "elle":
                    tl.store(slopes + row + part, -alpha * slope, mask=live)
                else:
                    adv_slope -= alpha * slope
        tl.store(slopes + sample, adv_slope, mask=sample < adv_rows)
    square = tl.sum(squares, 0)
    whole = square + tl.sum(rises, 0)  # 0 of five points, whose relative E_lin no rule looks at
    return tl.sum(penalties, 0) / residuals, square / tl.where(whole == 0, 1.0, whole)


@triton.jit
def _linearity_of_logits(slopes, residuals, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """E_lin from the squared sizes of the residuals, each replaced by ``s`` with ``dE_lin / dr = s * r``."""
    penalties = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, residuals, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        live = index < residuals
        square = tl.load(slopes + index, mask=live, other=0.0)
        if OPTIONS.penalty == "squared":
            penalties += square
            slope = tl.full([BLOCK], 2.0, tl.float32)
        else:
            size = tl.sqrt(square)
            penalty, derivative = _penalty(size, OPTIONS)
            penalties += penalty
            slope = tl.where(size == 0, 0.0, derivative / tl.where(size == 0, 1.0, size))
        tl.store(slopes + index, slope / residuals, mask=live)
    return tl.sum(penalties, 0) / residuals


@triton.jit
def _moments(state, count, window, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and population standard deviation of the history, float64; both 0 while it is empty."""
    if OPTIONS.windowed:
        # spread is the ring of the last values.
        held = tl.minimum(tl.maximum(count, 1), window)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, window, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            total += tl.load(state.spread + place, mask=(place < window) & (place < held), other=0.0)
        mean = tl.sum(total, 0) / held.to(tl.float64)
        total = tl.zeros([BLOCK], tl.float64)
        for begin in range(0, window, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = (place < window) & (place < held)
            gap = tl.where(inside, tl.load(state.spread + place, mask=inside, other=0.0) - mean, 0.0)
            total += gap * gap
        return mean, tl.sqrt(tl.sum(total, 0) / held.to(tl.float64))
    else:
        mean = tl.load(state.mean)
        return mean, tl.sqrt(tl.load(state.spread) / tl.maximum(count, 1).to(tl.float64))


@triton.jit
def _next_lam(value, state, rule, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """Takes in this step's E_lin (float64; paper, Algorithm 1, lines 9 to 11), or relative E_lin; the new lam."""
    lam = tl.load(state.lam)
    count = tl.load(state.steps)
    skipped = tl.load(state.skipped)
    finite = tl.abs(value) < float("inf")
    if OPTIONS.relative:
        mean = tl.load(state.mean)
        even = 1.0 / (count + 1).to(tl.float64)
        # A number that is compiled in is of float32, unless a tensor of float64 takes it in.
        rate = tl.maximum(even, even * 0.0 + OPTIONS.rate)
        mean += rate * (value - mean)
        tl.store(state.mean, mean, mask=finite)
        above = mean > OPTIONS.threshold
    else:
        mean, std = _moments(state, count, rule.window, OPTIONS, BLOCK)
        above = value > mean + OPTIONS.sensitivity * std
    detected = above & (count >= rule.min_history)
    new = tl.where(detected, rule.lam_max, rule.gamma * lam)
    new = tl.where(finite, new, lam)
    tl.store(state.lam, new)
    if OPTIONS.relative:
        pass
    elif OPTIONS.windowed:
        tl.store(state.spread + count % rule.window, value, mask=finite)
    else:
        gap = value - mean
        step = gap / (count + 1).to(tl.float64)
        tl.store(state.spread, tl.load(state.spread) + gap * (gap - step), mask=finite)
        tl.store(state.mean, mean + step, mask=finite)
    tl.store(state.steps, count + tl.where(finite, 1, 0))
    tl.store(state.skipped, skipped + tl.where(finite, 0, 1))
    return new


@triton.jit(do_not_specialize=["losses", "adv_rows", "part", "triplets"])
def reduce_forward(
    saved,
    alpha,
    state,  # of ELLE-A, or of a fixed lam its tensor, or nothing
    outputs,
    lam_value,  # of a fixed lam that has no tensor
    losses,
    adv_rows,
    part,
    triplets,
    rule,
    OPTIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ce, E_lin, the new lam, ``loss = ce + lam * E_lin``, and the slopes and the lam that the backward needs."""
    residuals = part * triplets
    slopes = saved + SLOPES * losses
    if OPTIONS.of == "logits":
        e_lin = _linearity_of_logits(slopes, residuals, OPTIONS, BLOCK)
        relative = e_lin  # no rule looks at it
    else:
        e_lin, relative = _linearity_of_losses(
            saved, slopes, alpha, adv_rows, part, triplets, residuals, OPTIONS, BLOCK
        )
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, adv_rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        total += tl.load(saved + LOSSES * losses + row, mask=row < adv_rows, other=0.0)
    ce = tl.sum(total, 0) / tl.maximum(adv_rows, 1)
    if OPTIONS.adaptive:
        lam = _next_lam((relative if OPTIONS.relative else e_lin).to(tl.float64), state, rule, OPTIONS, BLOCK)
    elif state.lam is not None:
        lam = tl.load(state.lam).to(tl.float32)
    else:
        lam = lam_value
    tl.store(outputs.ce, ce)
    tl.store(outputs.e_lin, e_lin)
    tl.store(slopes + (residuals if OPTIONS.of == "logits" else losses), lam)
    tl.store(outputs.loss, ce + lam * e_lin)


@triton.jit
def update_lam(value, state, lam, rule, OPTIONS: tl.constexpr, BLOCK: tl.constexpr):
    """The state of ELLE-A alone, from what its rule looks at; ``lam`` gets a copy of the new one."""
    tl.store(lam, _next_lam(tl.load(value).to(tl.float64), state, rule, OPTIONS, BLOCK))
