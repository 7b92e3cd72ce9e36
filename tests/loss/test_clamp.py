"""Which points are clamped, and options that may be set from step to step: eps, label smoothing."""

from typing import Any

import pytest
import torch

from elle_fast import ELLELoss
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, random, rng
from tests.loss.cases import EPS, bent, ce_rows, close, data, fgsm_by_hand

BOUNDS = (0.25, 0.75)


def at_the_ends():
    x, y = data()
    return x.clamp(*BOUNDS), y


def points_of(criterion, model, x, y):
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    loss = criterion(model, x, y)
    hook.remove()
    return loss, seen[-1].split(len(x))


@pytest.mark.parametrize("forward", ["packed", "checkpoint"])
@pytest.mark.parametrize("clamp", ["all", "attack", "triplets", "none"])
@pytest.mark.parametrize("attack", ["fgsm", "rs-fgsm"])
def test_clamp_says_which_points_stay_in_the_bounds(clamp, attack, forward):
    """x_adv is that of the bounds or that without; x_a and x_b those of the one or the other, to the bit."""
    model, (x, y) = bent(), at_the_ends()

    def made(**options: Any) -> tuple[torch.Tensor, ...]:
        criterion = ELLELoss(EPS, attack=attack, generator=rng(3), **options)
        points: tuple[torch.Tensor, ...] = points_of(criterion, model, x, y)[1]
        return points

    within, free = made(bounds=BOUNDS), made()
    x_adv, x_a, x_b, x_c = made(bounds=BOUNDS, clamp=clamp)
    assert not any(torch.equal(one, other) for one, other in zip(within, free, strict=True))
    assert torch.equal(x_adv, (within if clamp in ("all", "attack") else free)[0])
    for place, point in enumerate((x_a, x_b, x_c), 1):
        assert torch.equal(point, (within if clamp in ("all", "triplets") else free)[place])
    if forward == "checkpoint":
        one, other = (
            ELLELoss(EPS, attack=attack, generator=rng(3), bounds=BOUNDS, clamp=clamp, forward=how)(model, x, y)
            for how in ("packed", forward)
        )
        close(one, other)


def test_x_has_to_be_in_the_bounds_of_whatever_is_clamped():
    model, (x, y) = bent(), data()
    for clamp in ("all", "attack", "triplets"):
        with pytest.raises(ValueError, match=r"^x: expected values within bounds"):
            ELLELoss(EPS, bounds=BOUNDS, clamp=clamp)(model, 9 * x, y)
    assert ELLELoss(EPS, bounds=BOUNDS, clamp="none")(model, 9 * x, y).isfinite()
    with pytest.raises(ValueError, match=r"^clamp: expected one of 'all', 'attack', 'triplets', 'none', got 'both'"):
        ELLELoss(EPS, clamp="both")


@pytest.mark.parametrize("options", [{}, {"attack": "n-fgsm"}, {"attack": "rs-fgsm", "bounds": (0.0, 1.0)}])
def test_eps_may_be_set_from_step_to_step(options):
    model, (x, y) = bent(), data()
    x = x.clamp(0, 1)
    criterion = ELLELoss(0.5, generator=rng(3), **options)
    criterion.eps = EPS
    loss, _ = points_of(criterion, model, x, y)
    assert torch.equal(loss, ELLELoss(EPS, generator=rng(3), **options)(model, x, y))
    assert criterion.eps == criterion.linearity.eps == EPS
    criterion.eps = 0.0
    _, points = points_of(criterion, model, x, y)
    assert all(torch.equal(point, x) for point in points)
    with pytest.raises(ValueError, match=r"^eps: expected a finite number"):
        criterion.eps = -1.0


def test_a_step_size_that_was_given_stays():
    model, (x, y) = bent(), data()
    criterion = ELLELoss(0.5, step_size=0.02)
    criterion.eps = 0.1
    _, points = points_of(criterion, model, x, y)
    torch.testing.assert_close((points[0] - x).abs(), torch.full_like(x, 0.02))


@pytest.mark.parametrize("soft", [False, True])
def test_label_smoothing_is_that_of_the_cross_entropy_alone(soft):
    """The attack is the one without it: at 0.9 the smoothed loss would lead elsewhere."""
    model, (x, y) = bent(), data()
    criterion = ELLELoss(EPS, lam=0.0)
    criterion.label_smoothing = 0.9
    if soft:  # that do not sum to 1
        y = 1.3 * random(len(x), int(y.max()) + 1, seed=2, dtype=x.dtype)
    loss, points = points_of(criterion, model, x, y)
    plain, smoothed = (fgsm_by_hand(model, x, y, EPS, label_smoothing=s) for s in (0.0, 0.9))
    close(points[0], plain)
    assert not torch.equal(plain, smoothed)
    close(loss, torch.nn.functional.cross_entropy(model(plain), y, label_smoothing=0.9))
    if not soft:
        close(loss, ce_rows(model, plain, y, 0.9).mean())
    close(criterion.stats["ce"], loss)


def test_what_label_smoothing_cannot_be():
    with pytest.raises(AttributeError, match=r"^ELLELoss.label_smoothing: .* build another one, got 0.2"):
        ELLELoss(EPS, smoothed="all").label_smoothing = 0.2
    with pytest.raises(ValueError, match=r"^smoothed: expected one of 'cross-entropy', 'all', got 'ce'"):
        ELLELoss(EPS, smoothed="ce")
    with pytest.raises(ValueError, match=r"^label_smoothing: "):
        ELLELoss(EPS).label_smoothing = 1.5


def test_no_step_with_smoothing_or_an_attack_clamped_apart_waits_for_the_device():
    model, (x, y) = convnet(), data((4, 3, 8, 8), dtype=torch.float32)
    criterion = ELLELoss(EPS, label_smoothing=0.1, bounds=(0.0, 1.0), clamp="attack")
    with no_host_sync():
        criterion(model, x.clamp(0, 1), y).backward()
