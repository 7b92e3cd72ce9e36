"""AdvLC in its authors' setting; added to other methods it is in test_compose.py."""

import copy

import pytest
import torch

from elle_fast import methods
from tests.methods.cases import (
    BATCH,
    CLASSES,
    CLOSE,
    EPS,
    LAM,
    ball,
    batch,
    build,
    check,
    gradient,
    losses,
    smooth,
    step,
)


def penalty(model, x, x_adv):
    change = (model(x) - model(x_adv)).abs().flatten().sort(descending=True).values
    return change[: round(0.1 * BATCH * CLASSES)].sum() / BATCH


@pytest.mark.parametrize("name", ["advlc", "advlc-noise"])
def test_ten_steps_from_the_point_whose_logits_are_compared(name):
    (x, target), criterion, model = batch(), build(name), smooth()
    loss, (start, *points) = step(criterion, model, x, target)
    if name == "advlc":
        assert torch.equal(start, x)
    else:
        assert EPS / 2 < (start - x).abs().max() <= EPS
        assert start.min() >= 0
        assert start.max() <= 1
    assert len(points) == 10
    point = start
    for each in points:
        point = ball(point + EPS / 4 * gradient(model, point, target).sign(), start)
        torch.testing.assert_close(each, point, **CLOSE)
    assert (points[-1] - start).abs().max() > 0.9 * EPS
    check(criterion, loss, losses(model, point, target).mean() + LAM * penalty(model, start, point), model)


@pytest.mark.parametrize(
    "options, weights",
    [
        ({"steps": 6, "epoch_steps": 2}, [2, 2, 4, 4, 6, 6, 6]),  # of six
        ({"steps": 6}, [1, 2, 3, 4, 5, 6, 6]),
        ({"epoch_steps": 2}, [6] * 7),
    ],
)
def test_the_weight_grows_to_lam(options, weights):
    (x, target), criterion, model = batch(), build("advlc", **options), smooth()
    found = []
    for count in range(7):
        with criterion.frozen():
            criterion(model, x, target)
        loss = criterion(model, x, target)
        found.append(6 * float((loss.detach() - criterion.stats["ce"]) / criterion.stats["penalty"]) / LAM)
        if count == 3:
            resumed = build("advlc", **options)
            resumed.load_state_dict(criterion.state_dict())
            criterion = copy.deepcopy(resumed)
    assert found == pytest.approx(weights, rel=1e-9)


def test_the_authors_weight():
    assert methods.build("advlc", eps=8 / 255).lam == methods.build("advlc-noise", eps=8 / 255).lam == 0.3
