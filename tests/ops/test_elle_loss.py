"""elle_loss and local_linearity: tables by hand, an independent formula with its gradient, numerical gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from elle_fast.functional import elle_loss, local_linearity
from elle_fast.ops.layout import BLOCKS, FIVE_POINT_WEIGHTS
from tests.helpers import (
    Where,
    cross_entropy64,
    labels,
    let_kernels_write_nothing,
    log_softmax64,
    matrix,
    not_finite,
    poison_uninitialised_memory,
    probabilities,
    random,
    rng,
    soft_target64,
    unit_roundoff,
)

poisoned = pytest.fixture(autouse=True)(poison_uninitialised_memory)

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


# ---- By hand


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


# ---- Gradients


@matrix(
    share=0.06,
    dtype=DTYPES,
    points=POINTS,
    of=OFS,
    penalty=PENALTIES,
    layout=[(1, 4), (2, 3)],
    kind=["labels", "probabilities"],
    label_smoothing=[0.0, 0.2],
)
def test_closed_form_gradient(where, dtype, points, of, penalty, layout, kind, label_smoothing):
    """dE/dz_row = (2/B) r_i w_row (softmax(z_row) - q_i), and (softmax - q)/B of the cross-entropy on x_adv."""
    batch, classes, (triplets, part) = 4, 5, layout
    logits, alpha = packed_logits(batch, classes, points, triplets, part, seed=3)
    logits, target = logits.to(dtype), some_target(kind, batch, classes)
    options: dict[str, Any] = {"points": points, "triplets": triplets, "of": of, "penalty": penalty}
    options["label_smoothing"] = label_smoothing
    check_gradients(where, logits, target, alpha, **options)
    # The regulariser alone has the same gradient on the rows that it is given.
    first = 0 if points == "elle-2p" else batch
    whole, alone = logits.clone().requires_grad_(), logits[first:].clone().requires_grad_()
    (expected,) = torch.autograd.grad(where.elle_loss(whole, target, alpha, 1.0, **options)[2], whole)
    (grad,) = torch.autograd.grad(where.local_linearity(alone, target, alpha, **options), alone)
    assert torch.equal(grad, expected[first:])


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("of", OFS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("triplets, part", [(1, 2), (2, 1)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck_of_the_reference(points, of, penalty, triplets, part, soft, label_smoothing):
    # Random logits: no residual is near the kink of |r| at 0.
    logits, alpha = packed_logits(2, 3, points, triplets, part, seed=5)
    target = probabilities(2, 3) if soft else labels(2, 3)
    options: dict[str, Any] = {"points": points, "triplets": triplets, "of": of, "penalty": penalty}
    options |= {"label_smoothing": label_smoothing, "backend": "reference"}
    lam = torch.tensor(2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: elle_loss(z, target, alpha, lam, **options), logits.requires_grad_())
    first = 0 if points == "elle-2p" else 2
    alone = logits.detach()[first:].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: local_linearity(z, target, alpha, **options), alone)


@matrix(of=OFS, penalty=PENALTIES, points=POINTS)
def test_gradient_is_finite_where_the_residual_is_zero(where, of, penalty, points):
    logits = torch.zeros(2 + 2 * BLOCKS[points], 4, requires_grad=True)
    alpha = torch.tensor([0.5, 0.5])
    loss, _, e_lin = where.elle_loss(logits, labels(2, 4), alpha, 1.0, of=of, penalty=penalty, points=points)
    grad, whole = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (e_lin, loss))
    assert whole.isfinite().all()
    if points != "five-point" or of == "logits":  # five weights leave a rounding of log 4 behind
        assert e_lin.item() == 0
        assert torch.equal(grad, torch.zeros_like(grad))
    assert grad.isfinite().all()


@matrix(of=OFS)
@pytest.mark.parametrize("used", [names for n in (1, 2, 3) for names in itertools.combinations(range(3), n)], ids=str)
def test_upstream_gradients(where, of, used):
    """Of any of loss, ce and E_lin, absent, not 1, and entries of an expanded tensor."""
    logits, alpha = packed_logits(4, 5, seed=6)
    logits, target = logits.to(where.exact).requires_grad_(), labels(4, 5)
    values = where.elle_loss(logits, target, alpha, LAM, of=of)
    upstream = [v.to(where.exact).expand(3)[1] for v in torch.tensor([-2.0, 0.75, 5.0])]
    grads = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in values]
    (found,) = torch.autograd.grad([values[i] for i in used], logits, [upstream[i] for i in used], retain_graph=True)
    terms = [upstream[i] * grads[i] for i in used]
    # Three factors and three sums on either side; an entry of loss' gradient is a sum itself.
    size = sum(t.abs() for t in terms) + 2 * (grads[1].abs() + LAM * grads[2].abs())
    assert ((found - sum(terms)).abs() <= 12 * unit_roundoff(where.exact) * size).all()
    # The same through an ordinary graph, which hands the gradients over as it likes.
    total = torch.stack([values[i].expand(2, 3).mean() * upstream[i] for i in used]).sum()
    (graph,) = torch.autograd.grad(total, logits)
    assert ((graph - found).abs() <= 24 * unit_roundoff(where.exact) * size).all()


@matrix(of=OFS)
def test_no_graph_where_none_is_wanted(where, of):
    logits, alpha = packed_logits(3, 4)
    logits, target = logits.to(where.exact).requires_grad_(), labels(3, 4)
    with_graph = where.elle_loss(logits, target, alpha, LAM, of=of)
    with torch.no_grad():
        under_no_grad = where.elle_loss(logits, target, alpha, LAM, of=of)
    constant = where.elle_loss(logits.detach(), target, alpha, LAM, of=of)
    assert all(v.requires_grad for v in with_graph)
    for values in (under_no_grad, constant):
        assert not any(v.requires_grad for v in values)
        assert all(torch.equal(one, other) for one, other in zip(values, with_graph, strict=True))


# ---- Precision


@matrix(dtype=DTYPES, classes=[1, 2, 10, 1000], of=OFS)
def test_low_precision_logits_are_taken_in_float32(where, dtype, classes, of):
    logits, alpha = packed_logits(6, classes, scale=3.0)
    check_gradients(where, logits.to(dtype), labels(6, classes), alpha.float(), of=of)


@matrix(dtype=DTYPES, scale=[1e2, 1e4], kind=["labels", "probabilities"])
def test_confident_logits(where, dtype, scale, kind):
    logits, alpha = packed_logits(8, 10, scale=scale / 3)
    logits, alpha = logits.clamp(-scale, scale).to(dtype), alpha.to(dtype)
    logits[0, 0], logits[1, 1] = scale, -scale
    target = some_target(kind, 8, 10)
    check_gradients(where, logits, target, alpha)
    logits.requires_grad_()
    loss, _, _ = where.elle_loss(logits, target, alpha, 1.0)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert loss.isfinite()


@matrix(dtype=[torch.float64, torch.float32], shift=[1.0, 1e3, -1e4], kind=["labels", "probabilities"])
def test_a_shift_of_a_row_changes_nothing(where, dtype, shift, kind):
    logits, alpha = packed_logits(4, 7)
    shifts = shift * torch.randn(logits.shape[0], 1, generator=rng(1), dtype=torch.float64)
    logits, target = logits.to(dtype), some_target(kind, 4, 7)
    moved = (logits + shifts).to(dtype)
    # Against the formula for the shifted logits as they are, whose bound knows nothing of the shift.
    check_gradients(where, moved, target, alpha)
    plain, shifted = (where.elle_loss(z, target, alpha, 1.0) for z in (logits, moved))
    # The shifted logits are rounded once, at 4 |shift|; losses move by twice that, and E_lin by 2 |r| * 4 of those.
    stated = restated(logits, target, alpha)
    error = 2 * 4 * abs(shift) * unit_roundoff(dtype) + stated.ce_error
    for one, other in zip(plain, shifted, strict=True):
        assert abs(one.item() - other.item()) <= 8 * error * (math.sqrt(plain[2].item()) + 1)


@matrix(classes=[1, 2, 10, 20_000], dtype=DTYPES)
def test_equal_logits(where, classes, dtype):
    logits = torch.full((4 * 3, classes), 3.0, dtype=dtype)
    alpha = torch.tensor([0.1, 0.5, 1.0])
    for target in (labels(3, classes), torch.full((3, classes), 1 / classes, dtype=dtype)):
        _, ce, e_lin = where.elle_loss(logits, target, alpha, 1.0)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        # log C after a sum of C ones, exact below 2^24; probabilities 1 / C carry one rounding of their dtype,
        # and their sum C more.
        roundings = 8.0 + (0 if target.dim() == 1 else classes)
        given = unit_roundoff(target.dtype) if target.is_floating_point() else 0
        size = math.log(classes) + 1
        if target.is_floating_point() and dtype == torch.float16 and classes > 1000:
            given = 2.0**-25 * classes  # 1 / C is subnormal in float16, with an absolute error of 2^-25
        error = size * (roundings * unit_roundoff(work) + given)
        assert abs(ce.item() - math.log(classes)) <= error
        # Equal losses; the weights 1, 1 - alpha, alpha round thrice.
        assert e_lin.item() <= (4 * unit_roundoff(work) * size * (1 + given)) ** 2


@matrix(
    share=0.0,
    classes=[4095, 4096, 4097, 20_000, 100_000],
    of=OFS,
    kind=["labels", "probabilities", "smoothed"],
    dtype=[torch.float64, torch.float32, torch.bfloat16],
)
def test_large_vocabularies(where, classes, of, kind, dtype):
    logits, alpha = packed_logits(1, classes, seed=9, scale=1.0)
    # What a block might lose or count twice has most of the mass.
    for place in (0, 1023, 1024, 4093, 4094, 4095, 4096, classes - 2, classes - 1):
        logits[:, min(place, classes - 1)] += 10
    target = torch.tensor([classes - 1])
    if kind == "probabilities":
        target = (probabilities(1, classes) + one_hot(target, classes)) / 2
    label_smoothing = 0.1 if kind == "smoothed" else 0.0
    check_gradients(where, logits.to(dtype), target, alpha, each=False, of=of, label_smoothing=label_smoothing)


@matrix(points=POINTS)
def test_a_linear_model_is_linear(where, points):
    weight = torch.randn(6, 4, generator=rng(1), dtype=torch.float64)
    x_a, x_b = random(3, 6, seed=2, dtype=torch.float64), random(3, 6, seed=3, dtype=torch.float64)
    alpha = random(3, seed=4, dtype=torch.float64)
    a = alpha[:, None]
    x_c = (1 - a) * x_a + a * x_b
    inputs = {
        "elle": [x_a, x_a, x_b, x_c],
        "elle-2p": [x_b, x_a, x_c],
        "five-point": [x_a] + [(1 - w) * x_a + w * x_b for w in (0, 0.25, 0.5, 0.75, 1)],
    }
    logits = (torch.cat(inputs[points]) @ weight).to(where.exact)
    target = labels(3, 4)
    e_lin = where.elle_loss(logits, target, alpha, 1.0, of="logits", points=points)[2]
    # Each entry of r: some 40 roundings of values below 12 with weights that sum to 6 in magnitude; C = 4 of them.
    assert e_lin.item() <= 4 * (40 * 6 * 12 * unit_roundoff(where.exact)) ** 2
    curved = where.elle_loss(logits.square(), target, alpha, 1.0, of="logits", points=points)[2]
    assert curved.item() > 1e-6


@matrix(of=OFS, dtype=DTYPES)
def test_same_inputs_same_bits(where, of, dtype):
    logits, alpha = packed_logits(32, 100)
    logits, alpha, target = logits.to(dtype).requires_grad_(), alpha.float(), labels(32, 100)
    runs = []
    for _ in range(2 if where.slow else 5):
        values = where.elle_loss(logits, target, alpha, 5.0, of=of)
        runs.append([v.detach() for v in values] + list(torch.autograd.grad(values[0], logits)))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


# ---- Layouts in memory


def unusual_views(tensor: Tensor) -> dict[str, Tensor]:
    unaligned = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    unaligned[1:] = tensor.flatten()
    wide = torch.cat((tensor, tensor + 1, tensor[:, :1]), dim=1)
    return {
        "rows apart": wide[:, : tensor.shape[1]],
        "columns apart": torch.stack((tensor, tensor + 1), dim=-1)[..., 0],
        "transposed": tensor.T.contiguous().T,
        "unaligned": unaligned[1:].view_as(tensor),
        "one row": tensor[:1].expand_as(tensor),
        "one column": tensor[:, :1].expand_as(tensor),
    }


VIEWS = list(unusual_views(torch.zeros(2, 2)))


@matrix(share=0.2, points=POINTS, of=OFS, dtype=[torch.float64, torch.float32, torch.float16], view=VIEWS)
def test_views(where, points, of, dtype, view):
    """The layout of an argument changes neither values nor gradients: the formula is that of the same numbers."""
    logits, alpha = packed_logits(4, 6, points)
    target, strided = labels(4, 6), torch.stack((alpha, alpha + 1), 1)[:, 0]
    check_gradients(where, unusual_views(logits.to(dtype))[view], target, strided, each=False, points=points, of=of)
    check(where, logits.to(dtype), torch.stack((target, target), dim=1)[:, 0], alpha, points=points, of=of)
    check(where, logits.to(dtype), target[:1].expand(4), alpha[:1].expand(4), points=points, of=of)
    soft = unusual_views(probabilities(4, 6))[view]
    check_gradients(where, logits.to(dtype), soft, alpha, each=False, points=points, of=of)


@matrix(dtype=DTYPES, classes=[1, 8, 16, 17])
def test_rows_that_are_and_are_not_aligned(where, dtype, classes):
    """Whole rows of 16 bytes and others, at distances that are and are not multiples of that."""
    logits, alpha = packed_logits(3, 48, seed=11)
    soft = probabilities(3, 48)
    for start in (0, 1, 16):
        cut = slice(start, start + classes)
        check_gradients(where, logits.to(dtype)[:, cut], labels(3, classes), alpha, each=False)
        check_gradients(where, logits.to(dtype)[:, cut], soft[:, cut], alpha, each=False)


@matrix(of=OFS)
def test_one_row_for_all_gathers_their_gradients(where, of):
    logits, alpha = packed_logits(4, 6)
    row = logits[:1].to(where.exact).requires_grad_()
    spread = row.detach().repeat(16, 1).requires_grad_()
    target = labels(4, 6)
    grads = []
    for leaf, packed in ((row, row.expand(16, 6)), (spread, spread)):
        loss, _, _ = where.elle_loss(packed, target, alpha, LAM, of=of)
        grads += torch.autograd.grad(loss, leaf)
    # A sum of 16 entries.
    error = 16 * unit_roundoff(where.exact) * grads[1].abs().sum(dim=0)
    assert ((grads[0][0] - grads[1].sum(dim=0)).abs() <= error).all()


# ---- What is not finite


@matrix(dtype=DTYPES, label_smoothing=[0.0])
def test_masked_classes(where, dtype, label_smoothing):
    """Logits of -inf take a class out of the softmax: as if its column were not there."""
    kept, hidden = [0, 2, 3, 6], [1, 4, 5]
    logits, alpha = packed_logits(5, 7, seed=12)
    masked = logits.to(dtype)
    masked[:, hidden] = -math.inf
    target = labels(5, 4)
    stated, _ = check(where, masked[:, kept], target, alpha)
    masked.requires_grad_()
    loss, ce, e_lin = where.elle_loss(masked, torch.tensor(kept)[target], alpha, LAM)
    assert abs(ce.item() - stated.ce) <= stated.ce_error
    assert abs(e_lin.item() - stated.e_lin) <= stated.e_lin_error
    (grad,) = torch.autograd.grad(loss, masked)
    alone = masked.detach()[:, kept].requires_grad_()
    (expected,) = torch.autograd.grad(where.elle_loss(alone, target, alpha, LAM)[0], alone)
    assert torch.equal(grad[:, hidden], torch.zeros_like(grad[:, hidden]))
    both = stated.grad_ce_error + LAM * stated.grad_e_lin_error
    size = np.abs(stated.grad_ce) + LAM * np.abs(stated.grad_e_lin)
    error = 2 * (both + 2 * unit_roundoff(dtype) * (size + both))
    within(grad[:, kept] - expected, 0, error)


@matrix(classes=[3, 5000])
def test_a_row_whose_first_classes_are_masked(where, classes):
    """The maximum is met late, in the last block even."""
    logits = torch.full((8, classes), -math.inf, dtype=where.exact)
    logits[:, -2:] = torch.tensor([1.0, 1.0], dtype=where.exact)
    _, ce, e_lin = where.elle_loss(logits, torch.tensor([classes - 1, classes - 2]), torch.tensor([0.5, 0.5]), 1.0)
    # An exponential, a sum, a logarithm, another sum.
    assert abs(ce.item() - math.log(2)) <= 4 * unit_roundoff(where.exact)
    assert e_lin.item() == 0  # halves of equal losses


@not_finite
@matrix(of=OFS, kind=["labels", "probabilities"])
def test_nan_and_infinite_logits_reach_the_result(where, of, kind):
    logits, alpha = packed_logits(2, 3)
    logits, target = logits.to(where.exact), some_target(kind, 2, 3)
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[0, 0] = bad
        loss, ce, e_lin = where.elle_loss(broken, target, alpha, 1.0, of=of)
        assert ce.isnan() or ce.isinf()
        assert not loss.isfinite()
        assert e_lin.isfinite()  # x_adv has no part in it
        broken = logits.clone().requires_grad_()
        with torch.no_grad():
            broken[-1, 0] = bad
        loss, ce, e_lin = where.elle_loss(broken, target, alpha, 1.0, of=of)
        assert ce.isfinite()
        assert not e_lin.isfinite()
        (grad,) = torch.autograd.grad(loss, broken)
        assert not grad[-1].isfinite().all()
        assert grad[0].isfinite().all()


@not_finite
@matrix(of=OFS)
def test_a_row_without_any_class_is_nan(where, of):
    logits, alpha = packed_logits(2, 3)
    logits = logits.to(where.exact)
    logits[1] = -math.inf
    _, ce, e_lin = where.elle_loss(logits, labels(2, 3), alpha, 1.0, of=of)
    assert ce.isnan()
    assert e_lin.isfinite()


@matrix(label_smoothing=[0.0, 0.1], of=OFS)
@pytest.mark.parametrize("label", [-1, -100, 3, 2**31, 2**40, -(2**61)])
def test_labels_that_are_no_class(where, label_smoothing, of, label):
    """An error on the CPU. On a GPU it would have to wait for the device: the loss is NaN, and nothing is read."""
    logits, alpha = packed_logits(2, 3)
    logits, target = logits.to(where.exact), torch.tensor([0, label])
    arguments, options = (logits, target, alpha, 1.0), {"label_smoothing": label_smoothing, "of": of}
    if where == Where("reference", "cuda"):
        pytest.skip("torch's own kernel ends in an assertion, and with it the process")
    if where.backend in ("reference", "cpp"):
        with pytest.raises(ValueError, match=rf"^target: expected class indices in \[0, 3\), got .*{label}"):
            where.elle_loss(*arguments, **options)
        if of == "loss":
            with pytest.raises(ValueError, match=r"^target: expected class indices"):
                where.local_linearity(logits[2:], target, alpha, **options)
    else:
        loss, ce, e_lin = where.elle_loss(*arguments, **options)
        assert loss.isnan()
        assert ce.isnan()
        assert e_lin.isnan() == (of == "loss")
        alone = where.local_linearity(logits[2:], target, alpha, **options)
        assert alone.isnan() == (of == "loss")


@matrix(of=OFS, points=list(BLOCKS))
def test_what_a_value_has_nothing_to_do_with_does_not_reach_its_gradient(where, of, points):
    """A logit of x_a that is not finite makes E_lin NaN; ce knows nothing of it."""
    if where.backend == "triton":
        pytest.skip("its kernels multiply the missing gradient of E_lin, 0, with NaN")
    logits, alpha = packed_logits(4, 3, points=points)
    logits = logits.to(where.exact)
    logits[5, 0] = torch.inf
    logits.requires_grad_()
    _, ce, e_lin = where.elle_loss(logits, labels(4, 3), alpha, 1.0, points=points, of=of)
    assert not e_lin.isfinite()
    (grad,) = torch.autograd.grad(ce, logits)
    assert grad[[i for i in range(len(grad)) if i != 5]].isfinite().all()


# ---- Surroundings


@matrix(of=OFS, dtype=[torch.float64, torch.float32])
def test_under_autocast(where, of, dtype):
    logits, alpha = packed_logits(4, 5)
    logits, alpha, target = logits.to(dtype).requires_grad_(), alpha.float(), labels(4, 5)
    plain = where.elle_loss(logits, target, alpha, 2.0, of=of)
    with torch.autocast(where.device, torch.bfloat16):
        cast = where.elle_loss(logits, target, alpha, 2.0, of=of)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
    assert torch.equal(*(torch.autograd.grad(values[0], logits)[0] for values in (plain, cast)))


def test_the_fixture_poisons_what_no_kernel_writes(monkeypatch):
    """Without their kernels every result is NaN, so the comparisons above see whatever is not written."""
    where = let_kernels_write_nothing(monkeypatch)
    logits, alpha = packed_logits(2, 3)
    logits = logits.float().requires_grad_()
    values = where.elle_loss(logits, labels(2, 3), alpha, 1.0)
    (grad,) = torch.autograd.grad(values[0], logits)
    assert all(t.isnan().all() for t in (*values, grad))
