"""AAER against its formula, row by row."""

import pytest
import torch

from elle_fast import attacks, methods
from elle_fast.methods.aaer import AAER
from tests.helpers import Smooth, grads_of, labels, random
from tests.methods.cases import CLOSE, check, gradient, losses, step

BATCH, FEATURES, CLASSES, EPS, LAM = 12, 5, 4, 1.0, 30.0


def batch():
    return random(BATCH, FEATURES, seed=1, dtype=torch.float64), labels(BATCH, CLASSES)


def model():
    """So far from linear that a step of 1 lowers the loss of some samples."""
    return Smooth(FEATURES, CLASSES, gain=8.0).double()


def rows(net, points, target):
    """Of each sample the loss at the start, the logits there, and both at the attack's point, as numbers."""
    start, x_adv = points
    return zip(losses(net, start, target), net(start), losses(net, x_adv, target), net(x_adv), strict=True)


@pytest.mark.parametrize("ce_weight", [0.0, 2.5])
@pytest.mark.parametrize("name", ["rs-fgsm", "n-fgsm"])
def test_aaer_is_its_formula(name, ce_weight):
    (x, target), net = batch(), model()
    criterion = AAER(attacks.SINGLE_STEP[name], EPS, LAM, ce_weight=ce_weight)
    torch.manual_seed(15)  # in which abnormal samples change more
    loss, points = step(criterion, net, x, target)
    start, x_adv = points
    radius, size = (1, 1.25) if name == "rs-fgsm" else (2, 1)
    assert 0 < (start - x).abs().max() <= radius * EPS
    ascended = start + size * EPS * gradient(net, start, target).sign()
    expected = ascended if name == "n-fgsm" else torch.minimum(torch.maximum(ascended, x - EPS), x + EPS)
    torch.testing.assert_close(x_adv, expected, **CLOSE)

    total, fall = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    changes: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for before, logits, after, logits_adv in rows(net, points, target):
        total = total + after
        change = (logits_adv - logits.detach()).square().sum()
        abnormal = bool(before > after)
        changes[abnormal].append(change if abnormal else change.detach())
        if abnormal:
            fall = fall + before.detach() - after
    count = len(changes[True])
    assert 0 < count < BATCH
    excess = torch.stack(changes[True]).mean() - torch.stack(changes[False]).mean()
    penalty = count / BATCH * excess.clamp(min=0)
    assert penalty > 0
    torch.testing.assert_close(criterion.stats["penalty"], penalty.detach(), **CLOSE)
    torch.testing.assert_close(criterion.stats["ce"], total.detach() / BATCH, **CLOSE)
    check(criterion, loss, total / BATCH + ce_weight * fall / BATCH + LAM * penalty, net)


def test_the_gradients_are_those_of_the_authors_code_whatever_their_lamda2_is():
    """There that term is a number without a graph."""
    (x, target), net = batch(), model()
    torch.manual_seed(15)  # in which abnormal samples change more
    loss, (start, x_adv) = step(AAER(attacks.n_fgsm, EPS, 1.5), net, x, target)
    before, after = losses(net, start, target).detach(), losses(net, x_adv, target)
    chosen = before > after.detach()
    change = (net(start).detach() - net(x_adv)).square().sum(dim=1)
    variation = (change[chosen].mean() - change[~chosen].mean().item()).clamp(min=0)
    constant = 8.5 * (before - after.detach())[chosen].mean()
    theirs = after.mean() + chosen.double().mean() * (constant + 1.5 * variation)
    for one, other in zip(grads_of(loss, net), grads_of(theirs, net), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_batch_of_one_kind_has_the_cross_entropy_alone(sign):
    """In a small step no sample is abnormal; of an attack that goes down each is."""

    def attack(model, x, target, eps, bounds):
        return x + sign * 0.01 * attacks.input_gradient(model, x, target).sign()

    (x, target), net = batch(), model()
    criterion = AAER(attack, EPS, LAM, ce_weight=2.0)  # type: ignore[arg-type]
    loss, (start, x_adv) = step(criterion, net, x, target)
    assert ((losses(net, x_adv, target) - losses(net, start, target)) * sign > 0).all()
    check(criterion, loss, losses(net, x_adv, target).mean(), net)
    assert criterion.stats["penalty"] == 0


def test_normal_samples_that_change_more_cost_nothing():
    (x, target), net = batch(), model()
    for seed in range(50):
        torch.manual_seed(seed)
        criterion = AAER(attacks.n_fgsm, 0.5, LAM)
        loss, points = step(criterion, net, x, target)
        found = [(b > a, (z - z_0).square().sum()) for b, z_0, a, z in rows(net, points, target)]
        changes = [
            torch.stack([change for kind, change in found if kind == which] or [x.sum() * 0]) for which in (1, 0)
        ]
        if any(kind for kind, _ in found) and changes[0].mean() < changes[1].mean():
            check(criterion, loss, losses(net, points[1], target).mean(), net)
            return
    raise AssertionError("no such batch among 50")


def test_weights():
    assert methods.build("rs-aaer", eps=16 / 255).lam == 3.25
    assert methods.build("n-aaer", eps=0.3).lam == 0.75
    for value in (-1.0, float("nan"), "much"):
        with pytest.raises((TypeError, ValueError), match=r"^ce_weight: expected a finite number"):
            AAER(attacks.n_fgsm, EPS, LAM, ce_weight=value)  # type: ignore[arg-type]
