"""The ELLE paper's propositions and its example, as statements about the code, in float64.

Each residual is compared with the second order directional derivative that its proposition names: exactly, of a
quadratic function, and within the bound of Taylor's theorem, of one whose derivatives never end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from elle_fast import ELLELoss, LocalLinearity, functional
from elle_fast.regularizers import LLR
from tests.helpers import labels, random, rng
from tests.regularizers.cases import EPS, FEATURES, MATRIX, ROUNDING, SLOPE, X_ADV, ZEROS, LossOf, X, linear, quadratic

Function = Callable[[Tensor], Tensor]

EACH_NORM = pytest.mark.parametrize("norm", ["linf", "l2"])
OUTPUTS = 3
# Hessians of three outputs, symmetric and of either sign.
HESSIANS = random(OUTPUTS, FEATURES, FEATURES, seed=11, dtype=torch.float64) - 0.5
HESSIANS = HESSIANS + HESSIANS.transpose(1, 2)
SLOPES = random(FEATURES, OUTPUTS, seed=12, dtype=torch.float64) - 0.5


def directional(v: Tensor, hessian: Tensor) -> Tensor:
    """``v^T H v`` of each row of v (Definition 2); of several H, a column for each."""
    return torch.einsum("ni,...ij,nj->n...", v.flatten(1), hessian, v.flatten(1))


class Drawn(NamedTuple):
    """What a regulariser with the generator ``rng(3)`` draws around X, sample by sample: each ``[B, FEATURES]``."""

    points: tuple[Tensor, ...]
    alpha: Tensor


def drawn(eps: float = EPS, **options: Any) -> Drawn:
    seed = functional.draw_seed(X.device, rng(3))
    points, alpha = functional.pack_points(X, None, eps, seed=seed, **options)
    return Drawn(points.flatten(1).split(len(X)), alpha)


def e_lin(model: Function, target: Tensor = ZEROS, eps: float = EPS, **options: Any) -> Tensor:
    value: Tensor = LocalLinearity(eps, generator=rng(3), **options)(model, X, target)
    return value


# ---- Proposition 1: E_lin


@EACH_NORM
@pytest.mark.parametrize("alpha", ["uniform", "half"])
def test_proposition_1_of_a_quadratic_loss(alpha, norm):
    (x_a, x_b, _), weight = drawn(alpha=alpha, norm=norm)
    residual = -weight * (1 - weight) / 2 * directional(x_a - x_b, MATRIX)
    for penalty, expected in {"abs": residual.abs(), "squared": residual.square()}.items():
        value = e_lin(quadratic, alpha=alpha, norm=norm, penalty=penalty)
        torch.testing.assert_close(value, expected.mean(), rtol=0, atol=ROUNDING)
        assert value > 1e3 * ROUNDING


def vector(x: Tensor) -> Tensor:
    """A quadratic function with three outputs."""
    x = x.flatten(1)
    return x @ SLOPES + torch.einsum("ni,kij,nj->nk", x, HESSIANS, x) / 2


@EACH_NORM
def test_proposition_1_of_quadratic_logits(norm):
    (x_a, x_b, _), alpha = drawn(norm=norm)
    residual = -(alpha * (1 - alpha) / 2)[:, None] * directional(x_a - x_b, HESSIANS)
    for penalty, expected in {"abs": residual.norm(dim=1), "squared": residual.square().sum(dim=1)}.items():
        value = e_lin(vector, labels(len(X), OUTPUTS), of="logits", norm=norm, penalty=penalty)
        torch.testing.assert_close(value, expected.mean(), rtol=0, atol=ROUNDING)
        assert value > 1e3 * ROUNDING


def test_proposition_1_of_a_cubic_loss_has_the_third_derivative_as_its_next_term():
    """The term of the paper's Eq. 10, which has an equals sign before it in place of a plus."""
    cubic = LossOf(lambda x: 8 + x @ SLOPE + (x @ SLOPE) ** 3)
    (x_a, x_b, x_c), alpha = drawn()
    along = (x_a - x_b) @ SLOPE
    second, third = 6 * (x_c @ SLOPE) * along**2, 6 * along**3
    residual = -alpha * (1 - alpha) / 2 * second + alpha * (1 - alpha) * (1 - 2 * alpha) / 6 * third
    torch.testing.assert_close(e_lin(cubic, penalty="abs"), residual.abs().mean(), rtol=0, atol=ROUNDING)


# A function all of whose directional derivatives are known: D^n along v is (SLOPE . v)^n exp(SLOPE . x).
exponential = LossOf(lambda x: torch.exp(x @ SLOPE))


def largest(*points: Tensor) -> Tensor:
    """The largest value of :data:`exponential` between some points, which is at one of them."""
    return torch.stack([torch.exp(point @ SLOPE) for point in points]).amax(dim=0)


@pytest.mark.parametrize("eps", [EPS, EPS / 4, EPS / 16])
def test_proposition_1_holds_to_the_third_order(eps):
    (x_a, x_b, x_c), alpha = drawn(eps)
    along = (x_a - x_b) @ SLOPE
    main = alpha * (1 - alpha) / 2 * along**2 * torch.exp(x_c @ SLOPE)
    # Lagrange's remainders of the two expansions around x_c, at the distances alpha v and (1 - alpha) v.
    weights = ((1 - alpha) * alpha**3 + alpha * (1 - alpha) ** 3) / 6
    remainder = weights * along.abs() ** 3 * largest(x_a, x_b)
    value = e_lin(exponential, eps=eps, penalty="abs")
    assert (value - main.mean()).abs() <= remainder.mean() + ROUNDING
    # Half of the coefficient, or twice as much, would not pass.
    assert remainder.mean() + ROUNDING < main.mean() / 2


# ---- Proposition 2: the five-point error. The paper's proof has 1/25, for points at distances of 2/5 and 1/5 of
# x_a - x_b from the middle; those of its Definition 3, which are the code's, are at 1/2 and 1/4, and have 1/16.


@EACH_NORM
def test_proposition_2_of_a_quadratic_loss(norm):
    (x_a, *_, x_b), _ = drawn(points="five-point", norm=norm)
    residual = directional(x_a - x_b, MATRIX) / 16
    for penalty, expected in {"abs": residual.abs(), "squared": residual.square()}.items():
        value = e_lin(quadratic, points="five-point", norm=norm, penalty=penalty)
        torch.testing.assert_close(value, expected.mean(), rtol=0, atol=ROUNDING)
        assert value > 1e3 * ROUNDING


def test_proposition_2_of_quadratic_logits():
    (x_a, *_, x_b), _ = drawn(points="five-point")
    residual = directional(x_a - x_b, HESSIANS) / 16
    value = e_lin(vector, labels(len(X), OUTPUTS), points="five-point", of="logits", penalty="abs")
    torch.testing.assert_close(value, residual.norm(dim=1).mean(), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("power", [3, 4, 5])
def test_proposition_2_has_no_error_below_the_sixth_order(power):
    """Three points are exact up to the second power only; five up to the fifth."""
    polynomial = LossOf(lambda x: 8 + (x @ SLOPE) ** power)
    (x_a, _, x_d, _, x_b), _ = drawn(points="five-point")
    second = power * (power - 1) * (x_d @ SLOPE) ** (power - 2) * ((x_a - x_b) @ SLOPE) ** 2
    value = e_lin(polynomial, points="five-point", penalty="abs")
    torch.testing.assert_close(value, (second / 16).abs().mean(), rtol=0, atol=ROUNDING)
    assert value > 1e3 * ROUNDING


@pytest.mark.parametrize("eps", [EPS, EPS / 4])
def test_proposition_2_holds_to_the_sixth_order(eps):
    (x_a, _, x_d, _, x_b), _ = drawn(eps, points="five-point")
    along = (x_a - x_b) @ SLOPE
    main = along**2 * torch.exp(x_d @ SLOPE) / 16
    # Lagrange's remainders of the four expansions around x_d.
    weight = 2 * (1 / 12 * (1 / 2) ** 6 + 4 / 3 * (1 / 4) ** 6) / 720
    remainder = weight * along**6 * largest(x_a, x_b)
    value = e_lin(exponential, eps=eps, points="five-point", penalty="abs")
    assert (value - main.mean()).abs() <= remainder.mean() + ROUNDING
    assert remainder.mean() + ROUNDING < 1e-3 * main.mean()


# ---- Proposition 3: LLR


def test_proposition_3_of_a_quadratic_loss():
    error = directional(X_ADV - X, MATRIX) / 2
    torch.testing.assert_close(
        LLR(EPS)(quadratic, X, ZEROS, X_ADV),
        error.square().mean(),
        rtol=0,
        atol=ROUNDING * 2 * error.abs().max().item(),
    )


@pytest.mark.parametrize("scale", [1, 1 / 4, 1 / 16])
def test_proposition_3_holds_to_the_third_order(scale):
    delta = scale * (X_ADV - X)
    x, along = X.flatten(1), delta.flatten(1) @ SLOPE
    main = along**2 * torch.exp(x @ SLOPE) / 2
    remainder = along.abs() ** 3 / 6 * largest(x, x + delta.flatten(1)) + ROUNDING
    # LLR is the mean square of what the proposition is about.
    bound = (remainder * (2 * main + remainder)).mean()
    value = LLR(EPS)(exponential, X, ZEROS, X + delta)
    assert (value - main.square().mean()).abs() <= bound
    assert bound < main.square().mean() / 2


# ---- Linear functions: every error is 0

VARIANTS: list[dict[str, Any]] = [
    {},
    {"triplets": 3},
    {"alpha": "half"},
    {"alpha": "argmax"},
    {"penalty": "abs"},
    {"penalty": "smooth_l1"},
    {"norm": "l2"},
    {"points": "five-point"},
    {"points": "five-point", "penalty": "abs", "triplets": 2},
    {"triplet_fraction": 0.5, "penalty": "abs"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_linear_loss_has_no_error(options):
    # What is squared is the rounding, too.
    bound = ROUNDING if options.get("penalty") == "abs" else ROUNDING**2
    assert e_lin(linear, **options).abs() <= bound
    assert e_lin(quadratic, **options) > 1e3 * ROUNDING


@pytest.mark.parametrize("penalty,bound", [("squared", ROUNDING**2), ("abs", ROUNDING)])
def test_a_linear_loss_has_no_error_at_the_points_of_elle_2p(penalty, bound):
    error = LocalLinearity(EPS, points="elle-2p", penalty=penalty, generator=rng(3))
    assert error(linear, X, ZEROS, X_ADV).abs() <= bound
    assert error(quadratic, X, ZEROS, X_ADV) > 1e3 * ROUNDING


def test_linear_logits_have_no_error_though_their_loss_has():
    model = nn.Linear(FEATURES, OUTPUTS).double()
    x, y = X.flatten(1), labels(len(X), OUTPUTS)
    of_logits, of_loss = (LocalLinearity(EPS, of=of, penalty="abs", generator=rng(3)) for of in ("logits", "loss"))
    assert of_logits(model, x, y) <= OUTPUTS * ROUNDING
    assert of_loss(model, x, y) > 1e3 * ROUNDING


@pytest.mark.parametrize("points", ["elle", "elle-2p", "five-point"])
def test_the_fused_loss_of_linear_losses_has_no_error(points):
    options: dict[str, Any] = {"points": points, "seed": functional.draw_seed(X.device, rng(3))}
    packed, alpha = functional.pack_points(X, None, EPS, x_adv=X_ADV if points == "elle-2p" else None, **options)
    for function, none in ((linear, True), (quadratic, False)):
        value = functional.local_linearity(function(packed), ZEROS, alpha, points=points)
        assert (value <= ROUNDING**2) == none


# ---- Example 1: ELLE-2p does not see every function that is not linear


def example(x: Tensor) -> Tensor:
    """``w_1 . x`` where ``v . x >= 0``, else ``w_2 . x`` (the paper's Eq. 7)."""
    w_1, w_2, v = (torch.tensor(each, dtype=x.dtype) for each in ((-1.0, -1.0), (0.0, -1.5), (2.0, -1.0)))
    return torch.where(x @ v >= 0, x @ w_1, x @ w_2)


def test_example_1_has_no_error_for_elle_2p_and_one_for_elle():
    x, y = torch.full((64, 2), 0.5, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    seen: list[Tensor] = []

    def model(points: Tensor) -> Tensor:
        seen.append(points)
        return example(points)

    found = {}
    for points in ("elle-2p", "elle"):
        criterion = ELLELoss(
            0.5, 1.0, points=points, penalty="abs", loss_fn=lambda output, target: output, generator=rng(3)
        )
        criterion(model, x, y)
        found[points] = criterion.stats["e_lin"].item()
    x_fgsm, x_a, _ = seen[1].chunk(3)
    assert not x_fgsm.any()
    # The random points lie on both sides of the kink.
    side = x_a @ torch.tensor([2.0, -1.0], dtype=torch.float64) >= 0
    assert side.any()
    assert not side.all()
    # f(t x) = t f(x): two products and two sums of numbers below 2, rounded.
    assert found["elle-2p"] <= 8 * 2 * torch.finfo(torch.float64).eps
    assert found["elle"] > 0.01


def test_example_1_has_an_error_for_elle_2p_elsewhere():
    """The example's point is a special one: its attack ends at 0, from where every ray is straight."""
    x, y = torch.full((64, 2), 0.5, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    x_adv = x + torch.tensor([-0.5, 0.5], dtype=torch.float64)
    error = LocalLinearity(
        0.5, points="elle-2p", penalty="abs", loss_fn=lambda output, target: output, generator=rng(3)
    )
    assert error(example, x, y, x_adv) > 0.01
