"""ConvergeSmooth against its formula over several epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elle_fast import methods
from elle_fast.methods.converge_smooth import Convergence, PriorGuidedSmooth, RandomStartSmooth
from tests.methods.formulas import (
    BATCH,
    CLOSE,
    EPS,
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

GAMMA, LAM, BOX = 0.15, 2.0, (0.0, 1.0)
EPOCH_STEPS = SAMPLES // BATCH


@pytest.mark.parametrize("name", ["rs-cs", "mep-cs"])
def test_a_loss_far_from_the_last_epochs_mean_is_held_back(name):
    (x, target), model, kept = training_set(), smooth(), Kept(BOX)
    made: dict[str, Any] = {"epoch_steps": EPOCH_STEPS, "bounds": BOX, "gamma": GAMMA}
    if name == "rs-cs":
        criterion: Any = RandomStartSmooth(EPS, LAM, **made)
    else:
        criterion = PriorGuidedSmooth(EPS, LAM, SAMPLES, **made)
    momenta, before, kinds = torch.zeros_like(x), 0.0, []
    for number, epoch in enumerate(epochs(6)):
        seen = []
        for index in epoch:
            x_b, y_b = x[index], target[index]
            if name == "rs-cs":
                loss, (start, x_adv) = step(criterion, model, x_b, y_b)
                assert ((start - x_b).abs() <= EPS).all()
                assert ((start - x_b).abs() < 0.9 * EPS).any()
                reached = (start + EPS * gradient(model, start, y_b).sign()).clamp(0, 1)
                judged = mean_loss(model, start, y_b)
            else:
                loss, (start, x_adv, clean) = step(criterion, model, x_b, y_b, samples=index)
                delta, begun = kept.start(index, x_b, start)
                torch.testing.assert_close(start, begun, **CLOSE)
                grad = gradient(model, start, y_b)
                momenta[index] = grad / grad.abs().sum() + 0.3 * momenta[index]
                reached = kept.reach(x_b, delta, grad)
                kept.keep(index, kept.reach(x_b, delta, momenta[index]) - x_b)
                assert torch.equal(clean, x_b)
                judged = mean_loss(model, clean, y_b)
            torch.testing.assert_close(x_adv, reached, **CLOSE)
            expected, change = mean_loss(model, x_adv, y_b), judged.item() - before
            if number > 1 and abs(change) > GAMMA:
                expected = expected + LAM * (judged - before).abs()
            check(criterion, loss, expected, model)
            seen.append(judged.item())
            if number > 1:
                kinds.append((change > 0, abs(change) > GAMMA))
            train(model, mean_loss(model, x_adv, y_b))
        before = sum(seen) / len(seen)
    assert {(True, True), (False, True), (False, False)} <= set(kinds)


def test_it_rests_at_the_beginning_at_drops_and_at_the_end():
    # The authors' run: 110 epochs, with drops of the rate at 100 and 105, and a stride of 1.
    rule = Convergence(7, 7 * 110, 0.03, (100, 105))
    active = [epoch for epoch in range(110) if rule.constrains(epoch)]
    assert active == [*range(2, 99), 102, 103, 107, 108]
    assert [epoch for epoch in range(9) if Convergence(7, None, 0.03, ()).constrains(epoch)] == [2, 3, 4, 5, 6, 7, 8]


def test_a_loss_that_is_not_finite_does_not_count():
    rule = Convergence(2, None, 0.0, ())
    values = [1.0, float("nan"), 3.0, float("inf"), 5.0, 7.0, 8.0]
    found: list[Tensor] = []
    for done, value in enumerate(values):
        for _ in range(2):
            rule.begin(done)
        found.append(rule.penalty(torch.tensor(value), 4, done, True))
    # Means by epoch: 1, 3, 6; the first epoch that is judged is the third.
    assert [value.item() for value in found[4:]] == [5 - 3, 7 - 3, 8 - 6]
    assert [value.item() for value in (found[0], found[2])] == [0, 0]


def test_unequal_batches_count_by_their_size():
    rule = Convergence(2, None, 0.0, ())
    for done, (value, size) in enumerate([(0.0, 4), (0.0, 4), (1.0, 6), (5.0, 2), (3.0, 4)]):
        rule.begin(done)
        found = rule.penalty(torch.tensor(value), size, done, True)
    assert found.item() == pytest.approx(3 - (1 * 6 + 5 * 2) / 8)


def test_what_it_needs_and_refuses():
    for name in ("rs-cs", "mep-cs"):
        with pytest.raises(TypeError, match=r"^epoch_steps: expected an integer >= 1, got None"):
            methods.build(name, eps=EPS, samples=SAMPLES)
    with pytest.raises(ValueError, match=r"^stages: expected an integer >= 1, got 0"):
        RandomStartSmooth(EPS, 1.0, 3, stages=(0,))
    with pytest.raises(ValueError, match=r"^gamma: expected a finite number in \[0, "):
        RandomStartSmooth(EPS, 1.0, 3, gamma=-1)
    with pytest.raises(ValueError, match=r"^criterion: expected ConvergeSmooth's 3 numbers, got "):
        RandomStartSmooth(EPS, 1.0, 3).convergence.set_extra_state(torch.zeros(2))
