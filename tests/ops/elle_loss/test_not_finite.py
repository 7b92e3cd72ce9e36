"""What is not finite, or no class."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from elle_fast.ops.layout import BLOCKS
from tests.helpers import (
    Where,
    labels,
    matrix,
    not_finite,
    unit_roundoff,
)
from tests.ops.elle_loss.cases import DTYPES, LAM, OFS, check, packed_logits, some_target, within


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
