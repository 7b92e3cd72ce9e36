"""GradAlign, CURE and LLR against their formulas, closed forms and finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elle_fast import attacks, functional
from elle_fast.regularizers import CURE, LLR, GradAlign, losses_and_gradient
from elle_fast.testing import no_host_sync
from tests.helpers import MustNotBeCalled, convnet, labels, random, rng
from tests.regularizers.cases import (
    BATCH,
    CLASSES,
    EPS,
    FEATURES,
    MATRIX,
    ROUNDING,
    SLOPE,
    X_ADV,
    ZEROS,
    X,
    Y,
    by_parameters,
    gradients,
    linear,
    quadratic,
    smooth,
)

each = pytest.mark.parametrize("make", [lambda **o: GradAlign(EPS, **o), lambda **o: CURE(), lambda **o: LLR(EPS, **o)])
noisy = pytest.mark.parametrize("kind", [GradAlign, LLR])


# ---- Against the formula


def test_gradalign_is_its_formula():
    model = smooth()
    _, first = gradients(model, X, Y)
    _, second = gradients(model, X_ADV, Y)
    cosines = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(GradAlign(EPS)(model, X, Y, X_ADV), 1 - torch.stack(cosines).mean())


def test_cure_is_its_formula_with_gradients_of_the_mean_loss():
    model = smooth()
    _, first = gradients(model, X, Y)
    _, second = gradients(model, X_ADV, Y)
    changes = torch.stack([(b - a).norm() / BATCH for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(CURE()(model, X, Y, X_ADV), changes.mean())
    torch.testing.assert_close(CURE(form="elle")(model, X, Y, X_ADV), changes.square().mean())


def test_the_elle_authors_cure_holds_the_gradient_at_x():
    model = smooth()
    value = CURE(form="elle")(model, X, Y, X_ADV)
    grad = attacks.input_gradient(model, X, Y)
    given = CURE(form="elle")(model, X, Y, X_ADV, grad=grad)
    torch.testing.assert_close(value, given)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(each, parameters) for each in (value, given)), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="x_adv: expected the points of FGSM with form='elle', got None"):
        CURE(form="elle")(model, X, Y)


def test_llr_around_noise():
    points: list[torch.Tensor] = []
    model = smooth()
    model.register_forward_pre_hook(lambda module, args: points.append(args[0].detach()))
    value = LLR(EPS, expand_at="noise")(model, X, Y)
    first, second = points
    assert all(0.8 * EPS < (each - X).abs().max() <= EPS for each in points)
    torch.testing.assert_close(value, LLR(EPS)(model, first, Y, second))
    losses, grad = losses_and_gradient(model, X, Y)
    with pytest.raises(ValueError, match="losses, grad: expected None with expand_at='noise', got values at x"):
        LLR(EPS, expand_at="noise")(model, X, Y, losses=losses, grad=grad)


def test_cure_without_a_point_takes_one_at_distance_h_along_the_sign():
    model, h = smooth(), 0.7
    _, first = gradients(model, X, Y)
    ahead = torch.stack([x + h * g.sign() / g.sign().norm() for x, g in zip(X, first, strict=True)]).detach()
    assert torch.allclose((ahead - X).flatten(1).norm(dim=1), torch.full((BATCH,), h, dtype=torch.float64))
    torch.testing.assert_close(CURE(h)(model, X, Y), CURE(h)(model, X, Y, ahead))


def test_llr_is_its_formula_with_gradients_of_the_samples_own_losses():
    model = smooth()
    losses, grads = gradients(model, X, Y)
    errors = []
    for i in range(BATCH):
        delta = X_ADV[i] - X[i]
        after = F.cross_entropy(model(X_ADV[i : i + 1])[0], Y[i])
        errors.append(after - losses[i] - (delta * grads[i]).sum())
    value = LLR(EPS)(model, X, Y, X_ADV)
    torch.testing.assert_close(value, torch.stack(errors).square().mean())

    # With the mean loss' gradient, as in the ELLE authors' code, it is another number altogether.
    wrong = [e + (1 - 1 / BATCH) * ((X_ADV[i] - X[i]) * grads[i]).sum() for i, e in enumerate(errors)]
    assert torch.stack(wrong).square().mean() > 2 * value


@noisy
def test_noise_is_uniform_in_the_ball_and_follows_the_generator(kind):
    model = smooth()
    value = kind(EPS, generator=rng(3))(model, X, Y)
    seed = functional.draw_seed(X.device, rng(3))
    second = functional.random_start(X, EPS, seed=seed)
    assert 0.8 * EPS < (second - X).abs().max() <= EPS
    assert torch.equal(value, kind(EPS)(model, X, Y, second))
    assert not torch.equal(value, kind(EPS, generator=rng(4))(model, X, Y))


def test_what_the_step_has_computed_is_not_computed_again():
    model = smooth()
    parameters = list(model.parameters())
    losses, grad = losses_and_gradient(model, X, Y)
    _, grad_adv = losses_and_gradient(model, X_ADV, Y)
    llr, cure = LLR(EPS)(model, X, Y, X_ADV), CURE()(model, X, Y, X_ADV)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    shared = [
        (LLR(EPS)(model, X, Y, X_ADV, losses=losses, grad=grad), llr, 1),
        (CURE()(model, X, Y, X_ADV, grad=grad), cure, 1),
        (CURE()(model, X, Y, X_ADV, grad=grad, grad_adv=grad_adv), cure, 0),
    ]
    assert len(calls) == sum(forwards for _, _, forwards in shared)
    for value, expected, _ in shared:
        torch.testing.assert_close(value, expected)
        pairs = (torch.autograd.grad(each, parameters, retain_graph=True) for each in (value, expected))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)


# ---- Gradients


@pytest.mark.parametrize("regulariser", [CURE(), LLR(EPS)])
def test_parameter_gradients_by_finite_differences(regulariser):
    assert by_parameters(regulariser, smooth())


def test_gradalign_gradients_by_finite_differences_with_the_first_one_held():
    model = smooth()
    first = attacks.input_gradient(model, X, Y)
    assert by_parameters(GradAlign(EPS), model, grad=first)
    # Without it the first gradient is computed, and detached: nothing flows through it.
    held, own = (GradAlign(EPS)(model, X, Y, X_ADV, **given) for given in ({"grad": 7 * first}, {}))
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(v, parameters, allow_unused=True) for v in (held, own)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@each
def test_a_training_step_reaches_every_weight_and_leaves_no_other_gradient(make):
    model = convnet().train()
    x, y = random(BATCH, 3, 8, 8, seed=5), labels(BATCH, 4)
    with no_host_sync():
        value = make()(model, x, y)
        value.backward()
    assert value.dim() == 0
    assert value.dtype == torch.float32
    assert value > 0
    assert x.grad is None
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


# ---- Losses whose regulariser is known


@each
@pytest.mark.parametrize("x_adv", [None, X_ADV])
def test_a_linear_loss_has_none(make, x_adv):
    value = make()(linear, X, ZEROS, x_adv).item()
    assert abs(value) < (ROUNDING**2 if make().__class__ is LLR else ROUNDING * FEATURES)
    assert make()(quadratic, X, ZEROS, x_adv).item() > 1e3 * ROUNDING


def test_a_quadratic_loss_has_the_closed_form():  # LLR's: tests/test_theory.py, Proposition 3
    x, delta = X.flatten(1), (X_ADV - X).flatten(1)
    first, second = SLOPE + x @ MATRIX, SLOPE + (x + delta) @ MATRIX
    cosine = (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))
    torch.testing.assert_close(GradAlign(EPS)(quadratic, X, ZEROS, X_ADV), (1 - cosine).mean())
    torch.testing.assert_close(CURE()(quadratic, X, ZEROS, X_ADV), (delta @ MATRIX).norm(dim=1).mean() / BATCH)


# ---- Samples without a gradient


def test_gradalign_leaves_out_samples_without_a_gradient():
    model, first = smooth(), attacks.input_gradient(smooth(), X, Y)
    first[1] = 0
    kept = [0, 2, 3, 4]
    value = GradAlign(EPS)(model, X, Y, X_ADV, grad=first)
    torch.testing.assert_close(value, GradAlign(EPS)(model, X[kept], Y[kept], X_ADV[kept], grad=first[kept]))
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.first.parameters())


def test_gradalign_of_a_dead_network_is_zero_with_zero_gradients():
    model = smooth()
    with torch.no_grad():
        model.last.weight.zero_()
    value = GradAlign(EPS)(model, X, Y)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradalign_does_not_depend_on_the_gradients_length():
    # Squares of such numbers are 0 in float32.
    model, x, x_adv = smooth().float(), X.float(), X_ADV.float()
    first = attacks.input_gradient(model, x, Y)
    expected = GradAlign(EPS)(model, x, Y, x_adv, grad=first)
    torch.testing.assert_close(GradAlign(EPS)(model, x, Y, x_adv, grad=first * 2.0**-100), expected)


def test_cure_of_equal_points_is_zero_with_finite_gradients():
    model = smooth()
    value = CURE()(model, X, Y, X)
    value.backward()
    assert value.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- Bad input


@pytest.mark.parametrize(
    "kind,options,error,words",
    [
        (GradAlign, {"eps": -0.1}, ValueError, "eps: expected a finite number"),
        (GradAlign, {"eps": "8/255"}, TypeError, "eps: expected a finite number"),
        (LLR, {"eps": float("nan")}, ValueError, "eps: expected a finite number"),
        (LLR, {"eps": EPS, "generator": 3}, TypeError, "generator: expected None or a torch.Generator, got 3"),
        (CURE, {"h": 0}, ValueError, r"h: expected a finite number in \(0, 3.40282e\+38\]"),
        (CURE, {"h": None}, TypeError, "h: expected a finite number"),
    ],
)
def test_bad_options(kind, options, error, words):
    with pytest.raises(error, match=words):
        kind(**options)


@each
@pytest.mark.parametrize(
    "x,y,x_adv,error,words",
    [
        (X.long(), Y, None, TypeError, "x: expected a floating-point tensor"),
        (X, Y[:-1], None, ValueError, "target: expected int64 class indices"),
        (X, Y.int(), None, TypeError, "target: expected int64 class indices"),
        (X, Y, X_ADV[:-1], ValueError, "x_adv: expected the shape and device of x"),
        (X, Y, 0.1, TypeError, "x_adv: expected a floating-point tensor"),
    ],
)
def test_bad_input_is_refused_before_the_model_is_called(make, x, y, x_adv, error, words):
    with pytest.raises(error, match=words):
        make()(MustNotBeCalled(), x, y, x_adv)


def test_a_bad_gradient_is_refused():
    with pytest.raises(ValueError, match="grad: expected the shape and device of x"):
        GradAlign(EPS)(MustNotBeCalled(), X, Y, X_ADV, grad=X[:-1])


@pytest.mark.parametrize(
    "regulariser,options,error,words",
    [
        (CURE(), {"grad": X}, ValueError, "grad: expected .* with its graph, .* which requires no grad"),
        (CURE(), {"grad": X[:-1].requires_grad_()}, ValueError, r"grad: expected a floating-point tensor \[5, 2, 3\]"),
        (CURE(), {"grad_adv": X}, ValueError, "grad_adv: expected None without x_adv"),
        (LLR(EPS), {"grad": X.clone().requires_grad_()}, TypeError, r"losses: expected .* \[5\] with its graph"),
        (LLR(EPS), {"losses": torch.ones(BATCH, requires_grad=True)}, TypeError, "grad: expected a floating-point"),
    ],
)
def test_shared_values_without_a_graph_or_of_another_shape_are_refused(regulariser, options, error, words):
    with pytest.raises(error, match=words):
        regulariser(MustNotBeCalled(), X, Y, **options)


@each
def test_a_model_without_a_graph_is_an_error(make):
    with pytest.raises(RuntimeError, match="model: expected an output that depends differentiably on x"):
        make()(lambda x: torch.zeros(BATCH, CLASSES), X, Y)


def test_options_are_shown():
    assert repr(GradAlign(0.5)) == "GradAlign(eps=0.5)"
    assert repr(CURE(2)) == "CURE(h=2, form='original')"
    assert repr(LLR(0.25)) == "LLR(eps=0.25, expand_at='x')"
