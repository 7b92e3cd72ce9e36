"""Confident, shifted and equal logits, large vocabularies, every dtype."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import one_hot

from tests.helpers import (
    labels,
    matrix,
    probabilities,
    random,
    rng,
    unit_roundoff,
)
from tests.ops.elle_loss.cases import DTYPES, OFS, POINTS, check_gradients, packed_logits, restated, some_target


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


@matrix(of=OFS, dtype=[torch.float64, torch.float32])
def test_under_autocast(where, of, dtype):
    logits, alpha = packed_logits(4, 5)
    logits, alpha, target = logits.to(dtype).requires_grad_(), alpha.float(), labels(4, 5)
    plain = where.elle_loss(logits, target, alpha, 2.0, of=of)
    with torch.autocast(where.device, torch.bfloat16):
        cast = where.elle_loss(logits, target, alpha, 2.0, of=of)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))
    assert torch.equal(*(torch.autograd.grad(values[0], logits)[0] for values in (plain, cast)))
