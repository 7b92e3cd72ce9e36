"""elle_loss and local_linearity against tables by hand and an independent formula."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast.ops.layout import FIVE_POINT_WEIGHTS
from tests.helpers import (
    labels,
    matrix,
    probabilities,
    unit_roundoff,
)
from tests.ops.elle_loss.cases import OFS, PENALTIES, POINTS, check, check_gradients, packed_logits, some_target


@matrix()
def test_hand_computed_table(where):
    """Two classes and logits (log p, log (1 - p)), so that the losses are -log p."""
    p = {"x_adv": (1 / 2, 1 / 4), "x_a": (1 / 2, 1 / 8), "x_b": (1 / 8, 1 / 2), "x_c": (1 / 4, 1 / 4)}
    rows = [[math.log(q), math.log(1 - q)] for name in ("x_adv", "x_a", "x_b", "x_c") for q in p[name]]
    logits = torch.tensor(rows, dtype=where.exact)
    target, alpha = torch.tensor([0, 0]), torch.tensor([1 / 2, 1 / 4], dtype=where.exact)
    loss, ce, e_lin = where.elle_loss(logits, target, alpha, 10.0)
    # In units of log 2: ce = (1 + 2) / 2; r = 2 - (1 + 3) / 2 = 0 and 2 - (3/4 * 3 + 1/4 * 1) = -1/2.
    unit, u = math.log(2), unit_roundoff(where.exact)
    # Ten roundings of numbers up to 3 log 2 in each loss; three of those and four more in r, which enters squared.
    error = 10 * u * 3 * unit
    gap = (2 * 10 + 4) * u * 3 * unit
    e_lin_error = (unit / 2 * 2 * gap + 2 * gap**2) / 2
    assert abs(ce.item() - 1.5 * unit) <= error
    assert abs(e_lin.item() - (0 + (unit / 2) ** 2) / 2) <= e_lin_error
    assert abs(loss.item() - (1.5 * unit + 10 * unit**2 / 8)) <= error + 10 * e_lin_error + 4 * u
    alone = where.local_linearity(logits[2:], target, alpha)
    assert alone.item() == e_lin.item()


@matrix()
@pytest.mark.parametrize(
    "penalty, expected",
    [("squared", (25.0 + 0.25) / 2), ("abs", (5.0 + 0.5) / 2), ("smooth_l1", (4.5 + 0.125) / 2)],
)
def test_hand_computed_logits(where, penalty, expected):
    """h = logits with r = (3, 4) and (0, 1/2): norms 5 and 1/2."""
    x_adv = [[9.0, 9.0], [9.0, 9.0]]
    x_a, x_b = [[0.0, 0.0], [2.0, 4.0]], [[4.0, 8.0], [2.0, 0.0]]
    x_c = [[5.0, 8.0], [2.0, 3.5]]  # midpoints (2, 4) with alpha 1/2; (2, 3) with alpha 1/4
    logits = torch.tensor(x_adv + x_a + x_b + x_c)
    alpha = torch.tensor([0.5, 0.25])
    _, ce, e_lin = where.elle_loss(logits, torch.tensor([0, 1]), alpha, 0.0, of="logits", penalty=penalty)
    assert e_lin.item() == expected  # every number is a small dyadic one
    # An exponential, a logarithm and two sums of numbers up to 1.
    assert abs(ce.item() - math.log(2)) <= 4 * unit_roundoff(torch.float32)


@matrix(alpha=[0.0, 0.25, 0.7, 1.0])
def test_residual_of_a_parabola(where, alpha):
    """h(x) = h'' x^2 / 2 in one dimension: r = -alpha (1 - alpha) (x_a - x_b)^2 h'' / 2."""
    x_a, x_b, curvature = 0.3, -0.9, 2.6
    x_c = (1 - alpha) * x_a + alpha * x_b
    points = torch.tensor([[0.0], [x_a], [x_b], [x_c]], dtype=torch.float64)
    logits = (points.square() * curvature / 2).to(where.exact)
    weight, target = torch.tensor([alpha], dtype=torch.float64), torch.tensor([0])
    e_lin = where.elle_loss(logits, target, weight, 1.0, of="logits")[2]
    r = -alpha * (1 - alpha) * (x_a - x_b) ** 2 * curvature / 2
    # r is a sum of terms below 1.1 with some ten roundings; it enters squared.
    error = 12 * unit_roundoff(where.exact)
    assert abs(e_lin.item() - r**2) <= 2 * abs(r) * error + error**2 + 2 * unit_roundoff(where.exact) * r**2
    # The sign shows through the gradient: dE/dh_c = 2 r.
    row = logits.clone().requires_grad_()
    e = where.elle_loss(row, target, weight, 1.0, of="logits")[2]
    (grad,) = torch.autograd.grad(e, row)
    assert grad[3, 0].item() == pytest.approx(2 * r, abs=2 * error)


def test_five_point_weights():
    assert abs(sum(FIVE_POINT_WEIGHTS)) <= 4 * unit_roundoff(torch.float64) * 2.5
    # They kill cubics too, and give h^2 f'' of a parabola; the places are 0, 1/4, 1/2, 3/4, 1, so h = 1/4.
    places = np.array([0, 0.25, 0.5, 0.75, 1])
    for power, expected in ((0, 0), (1, 0), (2, 2 / 16)):
        assert np.dot(FIVE_POINT_WEIGHTS, places**power) == pytest.approx(expected, abs=1e-15)
    assert np.dot(FIVE_POINT_WEIGHTS, (places - 0.5) ** 3) == pytest.approx(0, abs=1e-15)


# ---- Against the independent formula


@matrix(
    share=0.2,
    points=POINTS,
    of=OFS,
    penalty=PENALTIES,
    layout=[(1, 5), (3, 5), (2, 3), (1, 1)],
    kind=["labels", "probabilities"],
    label_smoothing=[0.0, 0.1, 1.0],
)
def test_formula(where, points, of, penalty, layout, kind, label_smoothing):
    batch, classes, (triplets, part) = 5, 6, layout
    logits, alpha = packed_logits(batch, classes, points, triplets, part)
    logits = logits.to(where.exact)
    target = some_target(kind, batch, classes)
    options: dict[str, Any] = {"points": points, "of": of, "penalty": penalty, "triplets": triplets}
    options["label_smoothing"] = label_smoothing
    stated, _ = check(where, logits, target, alpha, **options)
    first = 0 if points == "elle-2p" else batch
    alone = where.local_linearity(logits[first:], target, alpha, **options)
    assert abs(alone.item() - stated.e_lin) <= stated.e_lin_error


@matrix(of=OFS)
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_probabilities_of_any_dtype(where, of, target_dtype):
    logits, alpha = packed_logits(3, 4)
    target = probabilities(3, 4).to(target_dtype)
    for dtype in where.dtypes:
        check_gradients(where, logits.to(dtype), target, alpha, of=of)


@matrix()
@pytest.mark.parametrize("alpha_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_alpha_of_any_dtype(where, alpha_dtype):
    logits, alpha = packed_logits(3, 4)
    for of in OFS:
        check_gradients(where, logits.to(where.exact), labels(3, 4), alpha.to(alpha_dtype), of=of)


@matrix()
def test_lam_as_a_tensor(where):
    logits, alpha = packed_logits(3, 4)
    logits, target = logits.to(where.exact), labels(3, 4)
    plain = where.elle_loss(logits.requires_grad_(), target, alpha, 2.5)[0]
    for lam in (torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64), torch.tensor(2.5, dtype=torch.bfloat16)):
        loss, _, _ = where.elle_loss(logits, target, alpha, lam)
        assert torch.equal(loss, plain)
        assert (loss.dtype, loss.dim()) == (where.exact, 0)
        assert torch.equal(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, plain)))


@matrix(share=0.0, of=OFS, batch_and_part=[(1, 1), (33, 2), (33, 33), (1030, 7), (1030, 1027)], points=POINTS)
def test_batches_of_any_size(where, of, batch_and_part, points):
    """Rows and residuals that fill no block, and more than one block of each."""
    batch, part = batch_and_part
    logits, alpha = packed_logits(batch, 2, points, part=part)
    check_gradients(where, logits.to(where.exact), labels(batch, 2), alpha, each=False, points=points, of=of)
