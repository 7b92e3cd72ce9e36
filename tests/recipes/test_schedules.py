"""Learning rates and momenta against torch's own schedulers, in float64."""

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from elle_fast.recipes.schedules import MILESTONES, SCHEDULES, Schedule, at, find, learning_rate


def rates(schedule, steps=1000, peak=0.2, **options):
    return [learning_rate(schedule, peak, step, steps, **options) for step in range(steps)]


def torchs(steps, highest, make):
    """Rates and momenta of a torch scheduler; ``make`` builds it around an optimiser."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=highest, momentum=0.9)
    scheduler = make(optimizer)
    found = []
    for step in range(steps):
        found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return zip(*found, strict=True)


def test_short_rises_to_the_peak_and_falls_to_zero():
    found = rates("short")
    assert found[:500] == sorted(found[:500])
    assert found[500:] == sorted(found[500:], reverse=True)
    assert max(found) == pytest.approx(0.2, rel=2e-3)
    assert 0 < min(found) < 0.2 * 2e-3
    assert math.fsum(found) / 1000 == pytest.approx(0.1)


@pytest.mark.parametrize("peak", [0.5, 0.4])
@pytest.mark.parametrize("steps", [10, 385])
def test_short_at_the_beginning_of_a_step_is_torchs_cyclic_lr(steps, peak):
    up = steps * peak
    cycle = {"base_lr": 0, "max_lr": 0.2, "step_size_up": up, "step_size_down": steps - up}
    expected, momenta = torchs(steps, 0.2, lambda optimizer: lr_scheduler.CyclicLR(optimizer, **cycle))
    found = [at("short", step, steps, peak=peak, within=0.0) for step in range(steps)]
    assert [0.2 * part for part, _ in found] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert [0.9 - 0.1 * height for _, height in found] == pytest.approx(momenta, rel=1e-9)
    # The end of a step is the beginning of the next.
    ends = [at("short", step, steps, peak=peak, within=1.0)[0] for step in range(steps)]
    assert ends == pytest.approx([*(part for part, _ in found[1:]), 0.0], rel=1e-9, abs=1e-15)


def test_long_divides_by_ten_at_half_and_at_three_quarters():
    found = rates("long", peak=0.1)
    assert [found[i] for i in (0, 499, 500, 749, 750, 999)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert found == rates("piecewise", peak=0.1, milestones=MILESTONES)


@pytest.mark.parametrize(
    "schedule, pct_start, options",
    [
        ("long-cos", 0.025, {}),
        ("onecycle", 0.3, {}),
        ("onecycle", 0.25, {"peak": 0.25}),
        ("long-cos", 0.6, {"peak": 0.6}),
    ],
)
@pytest.mark.parametrize("steps", [3, 39, 41, 200, 1000])
def test_one_cycle_is_torchs(steps, schedule, pct_start, options):
    cycle = {"max_lr": 0.1, "total_steps": steps, "pct_start": pct_start}
    expected, momenta = torchs(steps, 0.1, lambda optimizer: lr_scheduler.OneCycleLR(optimizer, **cycle))
    found = [at(schedule, step, steps, **options) for step in range(steps)]
    assert [0.1 * part for part, _ in found] == pytest.approx(expected, rel=1e-9)
    assert [0.95 - 0.1 * height for _, height in found] == pytest.approx(momenta, rel=1e-9)


def test_one_cycle_where_torch_divides_by_zero():
    assert rates("long-cos", steps=40)[0] == 0.2  # at 40 steps, torch 2.13 fails


WARM = 7


def warmed(optimizer, schedule):
    rising = lr_scheduler.LinearLR(optimizer, start_factor=1 / WARM, total_iters=WARM - 1)
    return lr_scheduler.ChainedScheduler([rising, schedule])


@pytest.mark.parametrize("steps", [20, 333])
@pytest.mark.parametrize("warmup", [0, WARM])
@pytest.mark.parametrize(
    "schedule, options, make",
    [
        ("cosine", {}, lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        ("constant", {}, lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, 1.0)),
        (
            "piecewise",
            {"milestones": [0.3, 0.5, 0.95]},
            lambda optimizer, steps: lr_scheduler.MultiStepLR(
                optimizer, [math.ceil(steps * part - 0.5) for part in (0.3, 0.5, 0.95)]
            ),
        ),
    ],
    ids=["cosine", "constant", "piecewise"],
)
def test_schedules_with_a_warm_up_are_torchs_times_linear_lr(schedule, options, make, warmup, steps):
    def both(optimizer):
        plain = make(optimizer, steps)
        return warmed(optimizer, plain) if warmup else plain

    expected, _ = torchs(steps, 0.1, both)
    # torch's cosine is a recursion, whose roundings add up; near 0 they count.
    found = rates(schedule, steps, peak=0.1, warmup=warmup, **options)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)
    assert (found[0] < 0.02) == bool(warmup)


def test_short_on_svhn_peaks_at_two_fifths():
    assert find("short", "svhn").peak == 0.4
    found = [learning_rate("short", 0.2, step, 1000, peak=0.4) for step in range(1000)]
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
    assert find("short", "svhn") == Schedule(15, learning_rate=0.2, batch_size=128, peak=0.4, eps_warmup=5.0)
    assert find("long", "svhn") == Schedule(epochs=200, learning_rate=0.01, batch_size=128)
    assert find("long-cos", "svhn") == SCHEDULES["long-cos"]
    assert all(schedule.eps_warmup == 0 for schedule in SCHEDULES.values())


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
    given: dict[str, Any] = {"schedule": "short", "highest": 0.1, "step": 0, "steps": 10, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        learning_rate(**given)
