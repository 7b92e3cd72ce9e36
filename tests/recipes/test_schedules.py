import math

import pytest

from elle_fast.recipes.schedules import SCHEDULES, learning_rate


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


def test_long_cos_is_half_a_cosine():
    found = rates("long-cos", peak=0.1)
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(0.1, rel=1e-4)
    assert found[500] == pytest.approx(0.05, rel=1e-2)
    assert 0 < found[-1] < 1e-6


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


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule: expected one of 'short'"):
        learning_rate("cyclic", 0.1, 0, 10)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"schedule": 5}, "schedule: expected one of"),
        ({"peak": "a"}, "peak: expected a finite number in"),
        ({"peak": -0.1}, "peak: expected a finite number in"),
        ({"steps": 0}, "steps: expected an integer >= 1 and <= 9223372036854775807, got 0"),
        ({"steps": 10**400}, "steps: expected an integer >= 1 and <= 9223372036854775807"),
        ({"step": 10}, "step: expected an integer >= 0 and <= 9, got 10"),
        ({"step": -1}, "step: expected an integer >= 0 and <= 9, got -1"),
        ({"step": None}, "step: expected an integer >= 0 and <= 9, got None"),
    ],
)
def test_arguments_out_of_range(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        learning_rate(**{"schedule": "short", "peak": 0.1, "step": 0, "steps": 10, **change})
