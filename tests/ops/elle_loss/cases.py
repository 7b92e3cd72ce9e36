"""elle_loss stated again: an independent formula with its gradient and error bounds."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from elle_fast.ops.layout import BLOCKS
from tests.helpers import (
    Where,
    cross_entropy64,
    labels,
    log_softmax64,
    probabilities,
    random,
    rng,
    soft_target64,
    unit_roundoff,
)

POINTS = ["elle", "elle-2p", "five-point"]
OFS = ["loss", "logits"]
PENALTIES = ["squared", "abs", "smooth_l1"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def packed_logits(batch: int, classes: int, points: str = "elle", triplets: int = 1, part: int | None = None, **k: Any):
    """Random logits ``[B + blocks * triplets * Bt, C]`` and alpha."""
    part = batch if part is None else part
    seed, scale = k.get("seed", 0), k.get("scale", 2.0)
    rows = batch + BLOCKS[points] * triplets * part
    logits = scale * torch.randn(rows, classes, generator=rng(seed), dtype=torch.float64)
    return logits, random(triplets * part, seed=seed + 1, dtype=torch.float64)


def residual_weights(points: str, triplets: int, batch: int, part: int, alpha: Any) -> Any:
    """``[residuals, rows]``: r = weights @ h, written sample by sample from the table of layouts."""
    blocks = BLOCKS[points]
    weights = np.zeros((triplets * part, batch + blocks * triplets * part))
    for t, i in itertools.product(range(triplets), range(part)):
        r, a = t * part + i, alpha[t * part + i]

        def row(block: int, t: int = t, i: int = i) -> int:
            return batch + (t * blocks + block) * part + i

        if points == "elle":
            weights[r, [row(0), row(1), row(2)]] = [-(1 - a), -a, 1]
        elif points == "elle-2p":
            weights[r, [row(0), i, row(1)]] = [-(1 - a), -a, 1]
        else:
            weights[r, [row(b) for b in range(5)]] = [-1 / 12, 4 / 3, -5 / 2, 4 / 3, -1 / 12]
    return weights


class Stated(NamedTuple):
    """ce, E_lin and their gradients ``[N, C]`` in float64, each with the error that is allowed."""

    ce: float
    ce_error: float
    e_lin: float
    e_lin_error: float
    grad_ce: Any
    grad_ce_error: Any
    grad_e_lin: Any
    grad_e_lin_error: Any


def restated(
    logits: Tensor,
    target: Tensor,
    alpha: Tensor,
    *,
    points: str = "elle",
    triplets: int = 1,
    of: str = "loss",
    penalty: str = "squared",
    label_smoothing: float = 0.0,
) -> Stated:
    """The formulas of the paper in numpy float64 with closed-form gradients, and counted bounds of rounding errors.

    The logits are taken as they are, rounded to whatever dtype they have; the bounds are for arithmetic in float32
    (float64 for float64 logits). For logits of low precision the gradient is rounded once more: see check().
    """
    z = logits.detach().double().numpy()
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    u = unit_roundoff(work) + unit_roundoff(torch.float64)  # this function rounds as well
    batch, part, classes = target.shape[0], alpha.numel() // triplets, z.shape[1]
    samples = list(range(batch)) + list(range(part)) * (BLOCKS[points] * triplets)
    q = soft_target64(target, classes, label_smoothing)[samples]
    losses = cross_entropy64(logits, target[samples], label_smoothing)
    p = np.exp(log_softmax64(z))

    # No number that a row's loss is made of exceeds `reach`, however large an offset its logits share.
    reach = z.max(axis=1) - z.min(axis=1) + math.log(classes) + 1
    # A sum over classes is kept in at least 8 partial sums, which are then added up.
    summed = min(classes, classes / 8 + 16)
    # Six operations on numbers up to `reach`, in or outside an exponential: z - max, twice an exponential's own error
    # (its argument, and a rescaling to a new maximum), log, max - z, their sum. Then those of a relative sum.
    row_error = (6 * reach + summed + 8) * u
    if target.is_floating_point() or label_smoothing:
        # The products with q, themselves rounded, and their sum.
        row_error = row_error * q.sum(axis=1) + (summed + 6) * u * reach

    def gradient_of_rows(slope: Any, slope_error: Any) -> tuple[Any, Any]:
        """``slope * (sum(q) softmax - q)`` per row; softmax's exponential takes in the errors of max and log."""
        mass = q.sum(axis=1, keepdims=True)
        softmax_error = p * (mass * (7 * reach[:, None] + summed + 8) + summed + 6) * u + 4 * u * q
        softmax_error += torch.finfo(work).tiny  # what a probability loses below it
        gradient = slope[:, None] * (mass * p - q)
        error = slope_error[:, None] * np.abs(mass * p - q) + np.abs(slope)[:, None] * softmax_error
        return gradient, error + 2 * u * np.abs(gradient)

    weights = residual_weights(points, triplets, batch, part, alpha.to(work).double().numpy())
    width = np.abs(weights)
    # 1 - alpha, or the constants; the products and up to five sums.
    if of == "loss":
        r = weights @ losses
        size, error = np.abs(r), width @ row_error + 8 * u * (width @ np.abs(losses))
    else:
        r = weights @ z
        entry_error = 8 * u * (width @ np.abs(z))
        size = np.linalg.norm(r, axis=1)
        error = np.linalg.norm(entry_error, axis=1) + (summed / 2 + 3) * u * size

    # penalty(size), its derivative, and how far an error of the size moves either.
    if penalty == "squared":
        values, value_error = size**2, (2 * size + error) * error
        slope, slope_error = 2 * size, 2 * error
    elif penalty == "abs":
        values, value_error = size, error
        slope, slope_error = np.sign(size), 2.0 * (size <= error)
    else:
        values, value_error = np.where(size < 1, size**2 / 2, size - 0.5), np.minimum(size + error, 1) * error
        slope, slope_error = np.minimum(size, 1), error
    n = size.size
    e_lin = values.mean()
    e_lin_error = value_error.mean() + (n + 4) * u * e_lin

    first = (np.arange(len(samples)) < batch) / batch
    if of == "loss":
        slope = slope * np.sign(r) / n
        slope_error = slope_error / n + 4 * u * np.abs(slope)
        row_slope_error = width.T @ slope_error + (4 + triplets) * u * (width.T @ np.abs(slope))
        grad_e_lin, grad_e_lin_error = gradient_of_rows(weights.T @ slope, row_slope_error)
    else:
        # d size / d r = r / size; for the square that is 2 r, without a division.
        safe = np.where(size > 0, size, 1)
        factor = np.full(n, 2 / n) if penalty == "squared" else slope / safe / n
        turned = 0 if penalty == "squared" else factor * error / safe
        grad_e_lin = weights.T @ (factor[:, None] * r)
        one_error = factor[:, None] * entry_error + (turned + 4 * u * factor)[:, None] * np.abs(r)
        grad_e_lin_error = width.T @ one_error + (4 + triplets) * u * (width.T @ np.abs(factor[:, None] * r))
    ce = losses[:batch].mean()
    ce_error = row_error[:batch].mean() + (batch + 2) * u * np.abs(losses[:batch]).mean()
    of_ce, of_e_lin = gradient_of_rows(first, 2 * u * first), (grad_e_lin, grad_e_lin_error)
    return Stated(float(ce), ce_error, float(e_lin), e_lin_error, *of_ce, *of_e_lin)


LAM = 3.0  # of the loss below


def check(where: Where, logits: Tensor, target: Tensor, alpha: Tensor, **options: Any) -> tuple[Stated, Any]:
    """The values of elle_loss against the formulas; returns both."""
    stated = restated(logits, target, alpha, **options)
    values = where.elle_loss(logits, target, alpha, LAM, **options)
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert all((v.dtype, v.dim()) == (work, 0) for v in values)
    loss, ce, e_lin = (v.item() for v in values)
    assert abs(ce - stated.ce) <= stated.ce_error
    assert abs(e_lin - stated.e_lin) <= stated.e_lin_error
    expected = stated.ce + LAM * stated.e_lin
    error = stated.ce_error + LAM * stated.e_lin_error
    # The product and the sum are rounded.
    assert abs(loss - expected) <= error + 2 * unit_roundoff(work) * (abs(expected) + error)
    return stated, values


def check_gradients(
    where: Where, logits: Tensor, target: Tensor, alpha: Tensor, each: bool = True, **options: Any
) -> None:
    """The gradients of loss, ce and E_lin, or of loss alone, for logits of whatever layout, against the formulas."""
    logits = logits.detach().requires_grad_()
    stated, values = check(where, logits, target, alpha, **options)
    grad_loss = stated.grad_ce + LAM * stated.grad_e_lin
    grad_loss_error = stated.grad_ce_error + LAM * stated.grad_e_lin_error
    both = np.abs(stated.grad_ce) + LAM * np.abs(stated.grad_e_lin)
    # A gradient is rounded to the logits' dtype once, or where that is done by torch's own backward for each of the
    # two ways on which the logits came in, and in their sum; and in the subnormal range by an absolute half unit.
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    kind = torch.finfo(logits.dtype)
    own = 3 if where.backend == "reference" and options.get("of") == "logits" else 1
    cases = [
        (grad_loss, grad_loss_error, both),
        (stated.grad_ce, stated.grad_ce_error, np.abs(stated.grad_ce)),
        (stated.grad_e_lin, stated.grad_e_lin_error, np.abs(stated.grad_e_lin)),
    ]
    for value, (expected, error, size) in list(zip(values, cases, strict=True))[: 3 if each else 1]:
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        assert (grad.dtype, grad.shape) == (logits.dtype, logits.shape)
        rounding = (own * kind.eps / 2 + 3 * unit_roundoff(work)) * (size + error) + own * kind.tiny * kind.eps / 2
        within(grad, expected, error + rounding)


def within(found: Tensor, expected: Any, error: Any) -> None:
    gap = np.abs(found.detach().double().numpy() - expected)
    wrong = np.argwhere(~(gap <= error))
    assert not wrong.size, [(place.tolist(), gap[tuple(place)], error[tuple(place)]) for place in wrong[:5]]


def some_target(kind: str, batch: int, classes: int) -> Tensor:
    return labels(batch, classes) if kind == "labels" else probabilities(batch, classes)
