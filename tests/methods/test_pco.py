"""FGSM-PCO against its formula over several epochs, from the points that its forward passes see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from elle_fast import methods
from tests.helpers import probabilities
from tests.methods.formulas import (
    CLASSES,
    CLOSE,
    EPS,
    LAM,
    SAMPLES,
    Kept,
    check,
    epochs,
    gradient,
    mean_loss,
    smooth,
    step,
    train,
    training_set,
)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
def test_it_trains_on_a_mixture_of_the_last_point_and_this_one(bounds, soft):
    (x, target), model, kept = training_set(), smooth(), Kept(bounds)
    if soft:
        target = probabilities(SAMPLES, CLASSES)
    criterion = methods.build("pco", eps=EPS, lam=LAM, bounds=bounds, samples=SAMPLES)
    signs = set()
    for epoch in epochs(4):
        for index in epoch:
            loss, (start, mixed, x_fgsm) = step(criterion, model, x[index], target[index], samples=index)
            delta, expected = kept.start(index, x[index], start)
            torch.testing.assert_close(start, expected, **CLOSE)
            reached = kept.reach(x[index], delta, gradient(model, start, target[index]))
            torch.testing.assert_close(x_fgsm, reached, **CLOSE)
            kept.keep(index, x_fgsm - x[index])
            chances = model(start).softmax(dim=1)
            weights = target[index] if soft else F.one_hot(target[index], CLASSES)
            p = (chances * weights).sum(dim=1, keepdim=True)
            further = x[index] + 1.5 * (x_fgsm - x[index])
            # The gradient of p is part of the loss' gradient.
            x_new = kept.within(start * (1 - p) + further * p)
            torch.testing.assert_close(mixed, x_new.detach(), **CLOSE)
            f_start, f_new, f_fgsm = model(start), model(x_new), model(x_fgsm)
            difference = (f_fgsm - f_start).square().mean() - (f_fgsm - f_new).square().mean()
            signs.add(bool(difference > 0))
            check(criterion, loss, F.cross_entropy(f_new, target[index]) + LAM * difference.abs(), model)
            train(model, mean_loss(model, x_fgsm, target[index]), rate=0.1)
    assert signs == {True, False}
