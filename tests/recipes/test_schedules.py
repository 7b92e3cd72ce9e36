import math

import pytest
import torch

from elle_fast.recipes.schedules import SCHEDULES, Schedule, find, learning_rate


def rates(schedule, steps=1000, peak=0.2):
    return [learning_rate(schedule, peak, step, steps) for step in range(steps)]


def test_short_rises_to_the_peak_and_falls_to_zero():
    found = rates("short")
    assert found[:500] == sorted(found[:500])
    assert found[500:] == sorted(found[500:], reverse=True)
    assert max(found) == pytest.approx(0.2, rel=2e-3)
    assert 0 < min(found) < 0.2 * 2e-3
    assert math.fsum(found) / 1000 == pytest.approx(0.1)


def test_long_divides_by_ten_at_half_and_at_three_quarters():
    found = rates("long", peak=0.1)
    assert [found[i] for i in (0, 499, 500, 749, 750, 999)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize("steps", [3, 39, 41, 200, 1000])
def test_long_cos_is_torchs_one_cycle(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.025)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < steps:
            cycle.step()
    # At 40 steps, torch 2.13 divides by zero.
    assert rates("long-cos", steps=40)[0] == 0.2
    assert rates("long-cos", steps=steps, peak=0.1) == pytest.approx(expected, rel=1e-9)


def test_short_on_svhn_peaks_at_two_fifths():
    found = [learning_rate("short", 0.2, step, 1000, "svhn") for step in range(1000)]
    assert max(found) == pytest.approx(0.2, rel=2e-3)
    assert found[399:401] == pytest.approx([0.2, 0.2], rel=2e-3)
    assert found[200] == pytest.approx(0.1, rel=1e-2)
    assert found[700] == pytest.approx(0.1, rel=1e-2)


def test_constant():
    assert set(rates("constant")) == {0.2}


def test_the_papers_schedules():
    assert (SCHEDULES["short"].epochs, SCHEDULES["short"].learning_rate, SCHEDULES["short"].batch_size) == (
        30,
        0.2,
        128,
    )
    assert (SCHEDULES["long"].epochs, SCHEDULES["long"].learning_rate) == (200, 0.1)
    assert (SCHEDULES["long-cos"].epochs, SCHEDULES["long-cos"].batch_size) == (200, 256)
    assert find("short", "svhn") == Schedule(epochs=15, learning_rate=0.2, batch_size=128, peak=0.4)
    assert find("long", "svhn") == Schedule(epochs=200, learning_rate=0.01, batch_size=128)
    assert find("long-cos", "svhn") == SCHEDULES["long-cos"]


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule: expected one of 'short'"):
        learning_rate("cyclic", 0.1, 0, 10)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": 5}, "schedule: expected one of"),
        ({"highest": "a"}, "highest: expected a finite number in"),
        ({"highest": -0.1}, "highest: expected a finite number in"),
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"steps": 10**400}, "steps: expected an integer >= 1"),
        ({"step": 10}, "step: expected an integer >= 0 and <= 9, got 10"),
        ({"step": -1}, "step: expected an integer >= 0 and <= 9, got -1"),
        ({"step": None}, "step: expected an integer >= 0 and <= 9, got None"),
    ],
)
def test_arguments_out_of_range(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        learning_rate(**{"schedule": "short", "highest": 0.1, "step": 0, "steps": 10, **change})
