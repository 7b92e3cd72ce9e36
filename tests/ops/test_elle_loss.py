"""elle_loss and local_linearity: small tables by hand, an independent formula, closed-form and numerical gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_fast.functional import elle_loss, local_linearity
from elle_fast.ops.layout import BLOCKS, FIVE_POINT_WEIGHTS
from tests.helpers import (
    BACKENDS,
    cross_entropy64,
    labels,
    log_softmax64,
    no_host_sync,
    poison_uninitialised_memory,
    probabilities,
    random,
    rng,
    soft_target64,
    unit_roundoff,
)

backends = pytest.mark.parametrize("backend", BACKENDS)
poisoned = pytest.fixture(autouse=True)(poison_uninitialised_memory)

POINTS = ["elle", "elle-2p", "five-point"]
OFS = ["loss", "logits"]
PENALTIES = ["squared", "abs", "smooth_l1"]


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


def restated(logits: Tensor, target: Tensor, alpha: Tensor, **options: Any) -> tuple[float, float]:
    """ce and e_lin in numpy float64."""
    points, triplets = options.get("points", "elle"), options.get("triplets", 1)
    smoothing = options.get("label_smoothing", 0.0)
    batch, part = target.shape[0], alpha.numel() // triplets
    weights = residual_weights(points, triplets, batch, part, alpha.double().numpy())
    samples = list(range(batch)) + list(range(part)) * (BLOCKS[points] * triplets)
    losses = cross_entropy64(logits, target[samples], smoothing)
    if options.get("of", "loss") == "loss":
        size = np.abs(weights @ losses)
    else:
        size = np.sqrt(((weights @ logits.double().numpy()) ** 2).sum(axis=1))
    penalty = options.get("penalty", "squared")
    if penalty == "squared":
        e_lin = (size**2).mean()
    elif penalty == "abs":
        e_lin = size.mean()
    else:
        e_lin = np.where(size < 1, size**2 / 2, size - 0.5).mean()
    return float(losses[:batch].mean()), float(e_lin)


# ---- By hand


@backends
def test_hand_computed_table(backend):
    """Two classes and logits (log p, log (1 - p)), so that the losses are -log p."""
    p = {"x_adv": (1 / 2, 1 / 4), "x_a": (1 / 2, 1 / 8), "x_b": (1 / 8, 1 / 2), "x_c": (1 / 4, 1 / 4)}
    rows = [[math.log(q), math.log(1 - q)] for name in ("x_adv", "x_a", "x_b", "x_c") for q in p[name]]
    logits = torch.tensor(rows, dtype=torch.float64)
    target, alpha = torch.tensor([0, 0]), torch.tensor([1 / 2, 1 / 4], dtype=torch.float64)
    loss, ce, e_lin = elle_loss(logits, target, alpha, 10.0, backend=backend)
    # In units of log 2: ce = (1 + 2) / 2; r = 2 - (1 + 3) / 2 = 0 and 2 - (3/4 * 3 + 1/4 * 1) = -1/2.
    unit = math.log(2)
    # About ten roundings of numbers near 1 on each side.
    assert ce.item() == pytest.approx(1.5 * unit, rel=2e-15)
    assert e_lin.item() == pytest.approx((0 + (unit / 2) ** 2) / 2, rel=2e-14)
    assert loss.item() == pytest.approx(1.5 * unit + 10 * unit**2 / 8, rel=1e-14)
    alone = local_linearity(logits[2:], target, alpha, backend=backend)
    assert alone.item() == e_lin.item()


@backends
@pytest.mark.parametrize(
    "penalty, expected",
    [("squared", (25.0 + 0.25) / 2), ("abs", (5.0 + 0.5) / 2), ("smooth_l1", (4.5 + 0.125) / 2)],
)
def test_hand_computed_logits(backend, penalty, expected):
    """h = logits with r = (3, 4) and (0, 1/2): norms 5 and 1/2."""
    x_adv = [[9.0, 9.0], [9.0, 9.0]]
    x_a, x_b = [[0.0, 0.0], [2.0, 4.0]], [[4.0, 8.0], [2.0, 0.0]]
    x_c = [[5.0, 8.0], [2.0, 3.5]]  # midpoints (2, 4) with alpha 1/2; (2, 3) with alpha 1/4
    logits = torch.tensor(x_adv + x_a + x_b + x_c)
    alpha = torch.tensor([0.5, 0.25])
    _, ce, e_lin = elle_loss(logits, torch.tensor([0, 1]), alpha, 0.0, of="logits", penalty=penalty, backend=backend)
    assert e_lin.item() == expected  # every number is a small dyadic one
    assert ce.item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.7, 1.0])
def test_residual_of_a_parabola(alpha):
    """h(x) = h'' x^2 / 2 in one dimension: r = -alpha (1 - alpha) (x_a - x_b)^2 h'' / 2."""
    x_a, x_b, curvature = 0.3, -0.9, 2.6
    x_c = (1 - alpha) * x_a + alpha * x_b
    logits = torch.tensor([[0.0], [x_a], [x_b], [x_c]], dtype=torch.float64).square() * curvature / 2
    e_lin = elle_loss(logits, torch.tensor([0]), torch.tensor([alpha], dtype=torch.float64), 1.0, of="logits")[2]
    r = -alpha * (1 - alpha) * (x_a - x_b) ** 2 * curvature / 2
    # r is a sum of terms below 1.1 with some ten roundings; it enters squared.
    error = 12 * unit_roundoff(torch.float64)
    assert abs(e_lin.item() - r**2) <= 2 * abs(r) * error + error**2
    # The sign shows through the gradient: dE/dh_c = 2 r.
    row = logits.clone().requires_grad_()
    e = elle_loss(row, torch.tensor([0]), torch.tensor([alpha], dtype=torch.float64), 1.0, of="logits")[2]
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

# A double-precision loss has some 50 roundings of numbers below 20; |r| is below 40 here, E_lin below 1000.
FLOAT64: dict[str, Any] = {"rel": 1e-12, "abs": 1e-13}


@backends
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("of", OFS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("triplets, part", [(1, 5), (3, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_formula(backend, points, of, penalty, triplets, part, soft, label_smoothing):
    batch, classes = 5, 6
    logits, alpha = packed_logits(batch, classes, points, triplets, part)
    target = probabilities(batch, classes) if soft else labels(batch, classes)
    options: dict[str, Any] = {"points": points, "of": of, "penalty": penalty, "triplets": triplets}
    options["label_smoothing"] = label_smoothing
    with no_host_sync():
        loss, ce, e_lin = elle_loss(logits, target, alpha, 3.0, backend=backend, **options)
    expected_ce, expected = restated(logits, target, alpha, **options)
    assert ce.item() == pytest.approx(expected_ce, **FLOAT64)
    assert e_lin.item() == pytest.approx(expected, **FLOAT64)
    assert loss.item() == pytest.approx(expected_ce + 3 * expected, **FLOAT64)
    first = 0 if points == "elle-2p" else batch
    alone = local_linearity(logits[first:], target, alpha, backend=backend, **options)
    assert alone.item() == pytest.approx(expected, **FLOAT64)


@backends
@pytest.mark.parametrize("target_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_probabilities_of_any_dtype(backend, target_dtype):
    logits, alpha = packed_logits(3, 4)
    target = probabilities(3, 4).to(target_dtype)
    _, ce, e_lin = elle_loss(logits, target, alpha, 1.0, backend=backend)
    expected_ce, expected = restated(logits, target, alpha)
    assert ce.item() == pytest.approx(expected_ce, **FLOAT64)
    assert e_lin.item() == pytest.approx(expected, **FLOAT64)


@backends
def test_lam_as_a_tensor(backend):
    logits, alpha = packed_logits(3, 4)
    target = labels(3, 4)
    for lam in (torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64)):
        with no_host_sync():
            loss, _, _ = elle_loss(logits, target, alpha, lam, backend=backend)
        assert torch.equal(loss, elle_loss(logits, target, alpha, 2.5, backend=backend)[0])
        assert (loss.dtype, loss.dim()) == (torch.float64, 0)


# ---- Gradients


def softmax64(logits: Tensor) -> Any:
    return np.exp(log_softmax64(logits.detach().numpy()))


@backends
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("triplets, part", [(1, 4), (2, 3)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_closed_form_gradient(backend, points, triplets, part, soft, label_smoothing):
    """dE/dz_row = (2/B) r_i w_row (softmax(z_row) - q_i), and (softmax - q)/B of the cross-entropy on x_adv."""
    batch, classes, lam = 4, 5, 7.0
    logits, alpha = packed_logits(batch, classes, points, triplets, part, seed=3)
    logits.requires_grad_()
    target = probabilities(batch, classes) if soft else labels(batch, classes)
    options: dict[str, Any] = {"points": points, "triplets": triplets, "label_smoothing": label_smoothing}
    loss, ce, e_lin = elle_loss(logits, target, alpha, lam, backend=backend, **options)

    samples = list(range(batch)) + list(range(part)) * (BLOCKS[points] * triplets)
    weights = residual_weights(points, triplets, batch, part, alpha.numpy())
    r = weights @ cross_entropy64(logits, target[samples], label_smoothing)
    row_gradient = softmax64(logits) - soft_target64(target, classes, label_smoothing)[samples]
    expected_e = (2 / r.size * r @ weights)[:, None] * row_gradient
    expected_ce = np.where(np.arange(len(samples))[:, None] < batch, row_gradient / batch, 0)

    for value, expected in ((e_lin, expected_e), (ce, expected_ce), (loss, expected_ce + lam * expected_e)):
        (grad,) = torch.autograd.grad(value, logits, retain_graph=True)
        # Entries below 100 with some 100 roundings.
        np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-12, atol=1e-12)


@backends
@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("of", OFS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("triplets, part", [(1, 2), (2, 1)])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradcheck(backend, points, of, penalty, triplets, part, soft, label_smoothing):
    # Random logits: no residual is near the kink of |r| at 0.
    logits, alpha = packed_logits(2, 3, points, triplets, part, seed=5)
    target = probabilities(2, 3) if soft else labels(2, 3)
    options: dict[str, Any] = {"points": points, "triplets": triplets, "of": of, "penalty": penalty}
    options |= {"label_smoothing": label_smoothing, "backend": backend}
    lam = torch.tensor(2.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: elle_loss(z, target, alpha, lam, **options), logits.requires_grad_())
    first = 0 if points == "elle-2p" else 2
    alone = logits.detach()[first:].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: local_linearity(z, target, alpha, **options), alone)


@pytest.mark.parametrize("of", OFS)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_gradient_is_finite_where_the_residual_is_zero(of, penalty):
    logits = torch.zeros(8, 3, requires_grad=True)
    _, _, e_lin = elle_loss(logits, labels(2, 3), torch.tensor([0.5, 0.5]), 1.0, of=of, penalty=penalty)
    (grad,) = torch.autograd.grad(e_lin, logits)
    assert e_lin.item() == 0
    assert torch.equal(grad, torch.zeros_like(grad))


# ---- Precision


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("of", OFS)
def test_low_precision_logits_are_taken_in_float32(backend, dtype, classes, of):
    logits, alpha = packed_logits(6, classes, scale=3.0)
    logits, alpha = logits.to(dtype), alpha.float()
    target = labels(6, classes)
    loss, ce, e_lin = elle_loss(logits, target, alpha, 2.0, of=of, backend=backend)
    assert loss.dtype == ce.dtype == e_lin.dtype == torch.float32
    expected_ce, expected = restated(logits, target, alpha, of=of)
    # The same rounded logits in float64 are the truth. A loss in float32: z - max, exp, a sum of C positive numbers,
    # log, difference: (C + 8) roundings at worst of a number below max|z| * 2 + log C.
    reach = 2 * logits.abs().max().item() + math.log(classes)
    error = (classes + 8) * unit_roundoff(torch.float32) * reach
    assert abs(ce.item() - expected_ce) <= error
    if of == "logits":
        # r of each class: 5 roundings of 4 max|z|; the norm adds those of C squares.
        bound = expected * (classes + 8) * unit_roundoff(torch.float32)
        assert abs(e_lin.item() - expected) <= bound + 20 * reach * math.sqrt(classes * expected) * 2**-24
    else:
        # r has the errors of three losses (weights 1, 1 - alpha, alpha), and enters squared.
        assert abs(e_lin.item() - expected) <= 4 * error * (math.sqrt(expected) + 2 * error)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_confident_logits(backend, dtype, scale):
    logits, alpha = packed_logits(16, 10, scale=scale / 3)
    logits, alpha = logits.clamp(-scale, scale).to(dtype), alpha.to(dtype)
    logits[0, 0], logits[1, 1] = scale, -scale
    logits.requires_grad_()
    target = labels(16, 10)
    loss, ce, e_lin = elle_loss(logits, target, alpha, 1.0, backend=backend)
    expected_ce, expected = restated(logits.detach(), target, alpha)
    # (C + 8) roundings of losses below 2 scale + log C, as above; float64's oracle rounds as often.
    error = 2 * 18 * unit_roundoff(dtype) * (2 * scale + 3)
    assert abs(ce.item() - expected_ce) <= error
    assert abs(e_lin.item() - expected) <= 4 * error * (math.sqrt(expected) + 2 * error)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.isfinite().all()
    assert loss.isfinite()


@backends
@pytest.mark.parametrize("shift", [1.0, 1e3, -1e4])
def test_a_shift_of_a_row_changes_nothing(backend, shift):
    logits, alpha = packed_logits(4, 7)
    shifts = shift * torch.randn(logits.shape[0], 1, generator=rng(1), dtype=torch.float64)
    target = labels(4, 7)
    plain = elle_loss(logits, target, alpha, 1.0, backend=backend)
    moved = elle_loss(logits + shifts, target, alpha, 1.0, backend=backend)
    # The shifted logits are rounded once, at 4 |shift|; losses move by twice that, and E_lin by 2 |r| * 4 of those.
    error = 2 * 4 * abs(shift) * unit_roundoff(torch.float64) + 1e-13
    for one, other in zip(plain, moved, strict=True):
        assert abs(one.item() - other.item()) <= 8 * error * (math.sqrt(plain[2].item()) + 1)


@backends
@pytest.mark.parametrize("classes", [1, 2, 10, 20_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_equal_logits(backend, classes, dtype):
    logits = torch.full((4 * 3, classes), 3.0, dtype=dtype)
    alpha = torch.tensor([0.1, 0.5, 1.0])
    for target in (labels(3, classes), torch.full((3, classes), 1 / classes, dtype=dtype)):
        _, ce, e_lin = elle_loss(logits, target, alpha, 1.0, backend=backend)
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


@backends
def test_a_large_vocabulary(backend):
    logits, alpha = packed_logits(2, 100_000, seed=9)
    target = torch.tensor([0, 99_999])
    _, ce, e_lin = elle_loss(logits, target, alpha, 1.0, backend=backend)
    expected_ce, expected = restated(logits, target, alpha)
    assert ce.item() == pytest.approx(expected_ce, rel=1e-11)  # 1e5 roundings of 1.1e-16
    assert e_lin.item() == pytest.approx(expected, rel=1e-9)


@backends
@pytest.mark.parametrize("points", POINTS)
def test_a_linear_model_is_linear(backend, points):
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
    logits = torch.cat(inputs[points]) @ weight
    e_lin = elle_loss(logits, labels(3, 4), alpha, 1.0, of="logits", points=points, backend=backend)[2]
    # Each entry of r: some 40 roundings of values below 12 with weights that sum to 6 in magnitude; C = 4 of them.
    assert e_lin.item() <= 4 * (40 * 6 * 12 * unit_roundoff(torch.float64)) ** 2
    curved = elle_loss(logits.square(), labels(3, 4), alpha, 1.0, of="logits", points=points, backend=backend)[2]
    assert curved.item() > 1e-6


@backends
@pytest.mark.parametrize("of", OFS)
def test_same_inputs_same_bits(backend, of):
    logits, alpha = packed_logits(64, 100)
    logits, alpha, target = logits.float().requires_grad_(), alpha.float(), labels(64, 100)
    runs = []
    for _ in range(3):
        values = elle_loss(logits, target, alpha, 5.0, of=of, backend=backend)
        runs.append([v.detach() for v in values] + list(torch.autograd.grad(values[0], logits)))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@backends
@pytest.mark.parametrize("points", POINTS)
def test_views(backend, points):
    logits, alpha = packed_logits(4, 6, points)
    target = labels(4, 6)
    expected = elle_loss(logits, target, alpha, 2.0, points=points, backend=backend)
    wide = torch.stack((logits, logits + 1), dim=-1)
    unaligned = torch.empty(logits.numel() + 1, dtype=logits.dtype)
    unaligned[1:] = logits.flatten()
    spread = torch.stack((target, target), dim=1)[:, 0]
    for view in (wide[..., 0], logits.T.contiguous().T, unaligned[1:].view_as(logits)):
        values = elle_loss(view, spread, torch.stack((alpha, alpha), 1)[:, 0], 2.0, points=points, backend=backend)
        for one, other in zip(values, expected, strict=True):
            assert one.item() == pytest.approx(other.item(), **FLOAT64)
    same = logits[:1].expand_as(logits)
    assert elle_loss(same, target, alpha, 2.0, points=points, backend=backend)[1].item() == pytest.approx(
        restated(same, target, alpha, points=points)[0], **FLOAT64
    )


@backends
def test_nan_and_infinite_logits_reach_the_result(backend):
    logits, alpha = packed_logits(2, 3)
    for bad in (math.nan, math.inf):
        broken = logits.clone()
        broken[0, 0] = bad
        loss, ce, e_lin = elle_loss(broken, labels(2, 3), alpha, 1.0, backend=backend)
        assert ce.isnan() or ce.isinf()
        assert not loss.isfinite()
        assert e_lin.isfinite()  # x_adv has no part in it
        broken = logits.clone()
        broken[-1, 0] = bad
        _, ce, e_lin = elle_loss(broken, labels(2, 3), alpha, 1.0, backend=backend)
        assert ce.isfinite()
        assert not e_lin.isfinite()


@backends
def test_under_autocast(backend):
    logits, alpha = packed_logits(4, 5)
    logits, alpha, target = logits.float(), alpha.float(), labels(4, 5)
    plain = elle_loss(logits, target, alpha, 2.0, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = elle_loss(logits, target, alpha, 2.0, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
