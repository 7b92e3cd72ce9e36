"""GAT, NuAT and AdvLC against their formulas, hand-made values and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elle_fast.regularizers import GAT, AdvLC, NuAT
from elle_fast.testing import call_counter, no_host_sync
from tests.helpers import MustNotBeCalled, convnet, grads_of, labels, log_softmax64, random
from tests.regularizers.cases import BATCH, CLASSES, SHAPE, X_ADV, X, Y, by_parameters, smooth

each = pytest.mark.parametrize("regulariser", [GAT(), NuAT(), AdvLC(), AdvLC(0.3)], ids=repr)


def logits(scale: float = 1.0, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * (2 * random(BATCH, CLASSES, seed=seed, dtype=torch.float64) - 1)).to(dtype)


# ---- Against the formula


def outputs() -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        return smooth()(X).numpy(), smooth()(X_ADV).numpy()


def test_gat_is_its_formula():
    clean, adversarial = (np.exp(log_softmax64(each)) for each in outputs())
    distances = [sum((p - q) ** 2 for p, q in zip(*rows, strict=True)) for rows in zip(clean, adversarial, strict=True)]
    assert GAT()(smooth(), X, Y, X_ADV).item() == pytest.approx(sum(distances) / BATCH)


def test_nuat_is_its_formula():
    clean, adversarial = outputs()
    expected = np.linalg.norm(adversarial - clean, ord="nuc") / BATCH
    assert NuAT()(smooth(), X, Y, X_ADV).item() == pytest.approx(expected)


@pytest.mark.parametrize("share,entries", [(0.01, 1), (0.1, 2), (0.3, 6), (0.33, 7), (1, 20)])
def test_advlc_is_its_formula(share, entries):
    clean, adversarial = outputs()
    largest = sorted((abs(float(change)) for change in (clean - adversarial).ravel()), reverse=True)[:entries]
    assert AdvLC(share)(smooth(), X, Y, X_ADV).item() == pytest.approx(sum(largest) / BATCH)


@each
def test_parameter_gradients_by_finite_differences(regulariser):
    assert by_parameters(regulariser, smooth())


# ---- Values and gradients that are known


def test_gat_of_opposite_certainties_is_two_however_confident():
    certain = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert GAT().from_logits(certain, certain.flip(1)).item() == 2
    assert GAT().from_logits(certain, certain + 7).item() == 0


def test_nuat_sums_the_singular_values_and_its_gradient_is_the_product_of_the_bases():
    u, v = (torch.linalg.qr(each)[0] for each in (logits(seed=4), logits(seed=5)[:CLASSES]))
    # Two equal ones, whose bases are not unique: their product is.
    values = torch.tensor([3.0, 2.0, 2.0, 0.5], dtype=torch.float64)
    clean = logits().requires_grad_()
    value = NuAT().from_logits(clean, clean.detach() + u @ values.diag() @ v.T)
    torch.testing.assert_close(value.item(), 7.5 / BATCH)
    torch.testing.assert_close(torch.autograd.grad(value, clean)[0], -u @ v.T / BATCH)


def test_nuat_gradient_of_a_change_of_low_rank_is_a_subgradient():
    change = torch.outer(logits()[:, 0], logits()[0]).requires_grad_()
    value = NuAT().from_logits(torch.zeros(BATCH, CLASSES, dtype=torch.float64), change)
    torch.testing.assert_close(value, change.norm() / BATCH)
    (grad,) = torch.autograd.grad(value, change)
    # A matrix of the dual norm's unit ball whose product with the change is the value (each as far as it is rounded).
    assert torch.linalg.matrix_norm(BATCH * grad.detach(), ord=2) <= 1 + 100 * torch.finfo(torch.float64).eps
    torch.testing.assert_close((grad * change).sum(), value)


@pytest.mark.parametrize("rows", [1, 3, BATCH])
def test_nuat_of_no_change_is_zero_with_zero_gradient(rows):
    clean = logits()[:rows].requires_grad_()
    value = NuAT().from_logits(clean, clean.detach().clone())
    assert value.item() == 0
    assert not torch.autograd.grad(value, clean)[0].any()


def test_advlc_takes_the_largest_entries_of_the_whole_batch():
    clean = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    change = torch.full((5, 4), 0.1, dtype=torch.float64)
    change[2] = torch.tensor([-3.0, 0.5, 2.0, -0.3])  # 10 % of 20 entries: both are of one sample
    value = AdvLC().from_logits(clean, change)
    assert value.item() == 5 / 5
    expected = torch.zeros(5, 4, dtype=torch.float64)
    expected[2, 0], expected[2, 2] = 1 / 5, -1 / 5
    torch.testing.assert_close(torch.autograd.grad(value, clean)[0], expected)


def test_advlc_of_all_entries_is_the_mean_distance():
    torch.testing.assert_close(
        AdvLC(1).from_logits(logits(), logits(seed=4)), (logits() - logits(seed=4)).abs().sum(dim=1).mean()
    )


def test_a_linear_model_has_them_all_as_they_want_the_outputs_constant():
    """Local constancy is a case of local linearity (the ELLE paper, section 3.3), and not the other way round."""
    model = nn.Linear(math.prod(SHAPE), CLASSES, bias=False).double()
    change = (X_ADV - X).flatten(1) @ model.weight.detach().T
    x, x_adv = X.flatten(1), X_ADV.flatten(1)
    torch.testing.assert_close(NuAT()(model, x, Y, x_adv).detach(), torch.linalg.svdvals(change).sum() / BATCH)
    torch.testing.assert_close(AdvLC(1)(model, x, Y, x_adv).detach(), change.abs().sum() / BATCH)
    assert GAT()(model, x, Y, x_adv) > 1e-4


# ---- The call


@each
def test_what_the_step_has_computed_is_not_computed_again(regulariser):
    model = smooth()
    counted, rows = call_counter(model)
    value = regulariser(counted, X, Y, X_ADV)
    assert rows == [BATCH, BATCH]
    clean, adversarial = model(X), model(X_ADV)
    shared = [
        ({"logits": clean}, 1),
        ({"logits_adv": adversarial}, 1),
        ({"logits": clean, "logits_adv": adversarial}, 0),
    ]
    expected = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    for given, forwards in shared:
        rows.clear()
        again = regulariser(counted, X, Y, X_ADV, **given)
        assert len(rows) == forwards
        torch.testing.assert_close(again, value)
        found = torch.autograd.grad(again, list(model.parameters()), retain_graph=True, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    assert torch.equal(regulariser.from_logits(clean, adversarial), again)


@each
def test_it_guides_an_attack_while_the_clean_logits_are_held(regulariser):
    model = smooth()
    with torch.no_grad():
        clean = model(X)
    start = X_ADV.clone().requires_grad_()
    (grad,) = torch.autograd.grad(regulariser.from_logits(clean, model(start)), start)
    ahead = X_ADV + 1e-3 * grad / grad.norm()
    with torch.no_grad():
        assert regulariser.from_logits(clean, model(ahead)) > regulariser.from_logits(clean, model(X_ADV))


@each
def test_a_training_step_reaches_every_weight_and_leaves_no_other_gradient(regulariser):
    model = convnet().train()
    x, y = random(BATCH, 3, 8, 8, seed=5), labels(BATCH, 4)
    x_adv = x + 0.1 * random(*x.shape, seed=6)
    with no_host_sync():
        value = regulariser(model, x, y, x_adv)
        value.backward()
    assert value.dim() == 0
    assert value.dtype == torch.float32
    assert value > 0
    assert x.grad is None
    assert x_adv.grad is None
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_are_compared_in_float32(regulariser, dtype):
    clean, adversarial = logits(seed=4, dtype=dtype), logits(seed=5, dtype=dtype)
    value = regulariser.from_logits(clean, adversarial)
    assert value.dtype == torch.float32
    assert torch.equal(value, regulariser.from_logits(clean.float(), adversarial.float()))


@each
def test_a_constant_model_has_none_with_zero_gradients(regulariser):
    model = smooth()
    with torch.no_grad():
        model.last.weight.zero_()
    value = regulariser(model, X, Y, X_ADV)
    assert value.item() == 0
    assert not any(grad.any() for grad in grads_of(value, model))


@each
def test_a_value_without_gradients_needs_no_graph(regulariser):
    model = smooth()
    expected = regulariser(model, X, Y, X_ADV)
    with torch.no_grad():
        value = regulariser(model, X, Y, X_ADV, logits=model(X), logits_adv=model(X_ADV))
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


# ---- Bad input


@pytest.mark.parametrize(
    "share,error", [(0, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("10 %", TypeError)]
)
def test_a_bad_share_is_refused(share, error):
    with pytest.raises(error, match=r"share: expected a finite number in \(0, 1\]"):
        AdvLC(share)


@each
@pytest.mark.parametrize(
    "x,y,x_adv,error,words",
    [
        (X, Y, None, ValueError, "x_adv: expected the points of an attack for .*, got None"),
        (X.long(), Y, X_ADV, TypeError, "x: expected a floating-point tensor"),
        (X, Y[:-1], X_ADV, ValueError, "target: expected int64 class indices"),
        (X, Y, X_ADV[:-1], ValueError, "x_adv: expected the shape and device of x"),
        (X, Y, X_ADV.clone().requires_grad_(), ValueError, "x_adv: must not require grad"),
        (X, Y, 0.1, TypeError, "x_adv: expected a floating-point tensor"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_called(regulariser, x, y, x_adv, error, words):
    with pytest.raises(error, match=words):
        regulariser(MustNotBeCalled(), x, y, x_adv)


ROWS = r"expected a floating-point tensor of shape \[5, C\]"


@each
@pytest.mark.parametrize("name", ["logits", "logits_adv"])
@pytest.mark.parametrize(
    "value,error,words",
    [
        (
            torch.zeros(BATCH, CLASSES),
            ValueError,
            "expected a floating-point tensor .* with its graph .* which requires no grad",
        ),
        (torch.zeros(BATCH - 1, CLASSES, requires_grad=True), ValueError, ROWS),
        (torch.zeros(BATCH, requires_grad=True), ValueError, ROWS),
        (Y, TypeError, ROWS),
        ([0.0], TypeError, ROWS),
    ],
)
def test_bad_shared_logits_are_refused(regulariser, name, value, error, words):
    other = {"logits", "logits_adv"} - {name}
    with pytest.raises(error, match=f"^{name}: {words}"):
        regulariser(MustNotBeCalled(), X, Y, X_ADV, **{name: value, other.pop(): logits().requires_grad_()})


@each
@pytest.mark.parametrize(
    "clean,adversarial,error,words",
    [
        (logits()[0], logits(), ValueError, r"^logits: expected a floating-point tensor of shape \[N, C\]"),
        (logits()[:0], logits()[:0], ValueError, r"^logits: expected at least one row"),
        (logits(), logits()[:2], ValueError, f"^logits_adv: {ROWS}"),
        (logits(), logits()[:, :2], ValueError, r"^logits_adv: expected the shape and device of logits"),
        (logits(), logits().to("meta"), ValueError, r"^logits_adv: expected the shape and device of logits"),
        (None, logits(), TypeError, r"^logits: expected a floating-point tensor"),
        (logits(), Y, TypeError, r"^logits_adv: expected a floating-point tensor"),
    ],
)
def test_bad_logits_are_refused(regulariser, clean, adversarial, error, words):
    with pytest.raises(error, match=words):
        regulariser.from_logits(clean, adversarial)


@each
def test_a_model_whose_output_is_no_logits_is_an_error(regulariser):
    with pytest.raises(TypeError, match=f"model's output .*: {ROWS}"):
        regulariser(lambda x: {"logits": x}, X, Y, X_ADV)


def test_nuat_says_that_logits_are_not_finite():
    with pytest.raises(RuntimeError, match="non-finite"):
        NuAT().from_logits(logits(), torch.full_like(logits(), torch.nan))


def test_options_are_shown():
    assert [repr(each) for each in (GAT(), NuAT(), AdvLC(0.25))] == ["GAT()", "NuAT()", "AdvLC(share=0.25)"]
