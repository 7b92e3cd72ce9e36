"""The closed-form gradient against an independent formula and numerical gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from elle_fast.functional import elle_loss, local_linearity
from elle_fast.ops.layout import BLOCKS
from tests.helpers import (
    labels,
    matrix,
    probabilities,
    unit_roundoff,
)
from tests.ops.elle_loss.cases import DTYPES, LAM, OFS, PENALTIES, POINTS, check_gradients, packed_logits, some_target


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
