"""What the guard's numbers say: means, the best probe, and what is left out."""

from __future__ import annotations

import math

import pytest

from elle_fast.guard.judge import Finding, Judge


def judge(**options):
    return Judge(**{"horizon": 4, "threshold": 0.2, "falls": 0.05, **options})


def test_a_mean_is_of_the_numbers_so_far_and_then_exponential():
    numbers, found = [0.1, 0.3, 0.0, 0.1, 0.5, 0.2], judge(threshold=1.0)
    own: list[float] = []
    for count, number in enumerate(numbers, start=1):
        assert found.take_in("linearity", number * 7, 7) is None
        own.append(sum(numbers[:count]) / count if count <= 4 else own[-1] + (number - own[-1]) / 4)
        mean, seen = found.state_dict()["means"]["linearity"]
        assert (mean, seen) == (pytest.approx(own[-1]), count)


def test_a_mean_above_its_limit_is_a_finding_from_the_third_number_on():
    one = judge()
    found = [one.take_in("linearity", 0.9, 1.0) for _ in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[2][::2] == ("linearity", 0.2)
    assert found[2].value == pytest.approx(0.9)
    falls = judge()
    found = [falls.take_in("falls", count, 100) for count in (5, 5, 5, 10)]
    assert found[:3] == [None] * 3
    assert found[3] is not None
    assert found[3][::2] == ("falls", 0.05)
    assert found[3].value == pytest.approx(0.0625)
    assert judge(horizon=1).take_in("linearity", 0.3, 1.0) is not None  # asked for


def test_three_numbers_in_a_row_that_are_not_finite_are_a_finding():
    one = judge()
    for _ in range(3):
        one.take_in("linearity", 0.01, 1.0)
    assert one.calm(["linearity"])
    assert one.take_in("linearity", math.nan, 1.0) is None
    assert not one.calm(["linearity"])
    assert one.take_in("linearity", 0.01, 1.0) is None  # a single one is forgiven
    assert one.calm(["linearity"])
    found = [one.take_in("linearity", math.inf, 1.0) for _ in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert found[2].signal == "linearity"
    one.forget()
    assert one.take_in("linearity", math.nan, 1.0) is None


def test_numbers_of_another_signal_do_not_hide_those_that_are_not_finite():
    """A model of NaN has falls and a probe that are finite: no comparison with NaN is true."""
    one = judge()
    for _ in range(3):
        one.take_in("linearity", 0.01, 1.0)
    for _ in range(2):
        assert one.take_in("linearity", math.nan, 1.0) is None
        assert one.take_in("falls", 0, 100) is None
        assert not one.calm(["linearity"])
    found = one.take_in("linearity", math.nan, 1.0)
    assert found is not None
    assert found.signal == "linearity"


def test_going_back_brings_the_best_probe_of_that_step_back():
    one = judge()
    for step, right in ((10, 20), (20, 40), (30, 30), (40, 60)):
        one.take_in("probe", right, 64, 10, step=step)
    assert one.best == 60 / 64
    one.forget(30)
    assert one.best == 40 / 64
    other = judge()
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each.forget(10)
        assert each.take_in("probe", 11, 64, 10) is None  # less than half of 40, not of 20
        assert each.best == 20 / 64
        each.forget(9)
        assert each.best == 0.0
        assert each.take_in("probe", 0, 64, 10) is None


def test_another_radius_forgets_what_was_withstood():
    one = judge()
    one.take_in("probe", 60, 64, 10)
    one.forget_best()
    assert one.take_in("probe", 5, 64, 10) is None


@pytest.mark.parametrize("part, whole", [(0, 0), (2, 1), (-1, 1)])
def test_what_is_no_share_is_left_out(part, whole):
    one = judge()
    assert one.take_in("linearity", part, whole) is None
    assert one.state_dict() == judge().state_dict()


def test_a_probe_is_judged_by_what_the_model_withstood_before():
    one = judge()
    # Of 64 samples and 10 classes. The limit is half of the best, or three standard deviations below it.
    assert [one.take_in("probe", right, 64, 10) for right in (12, 30, 20, 32)] == [None] * 4
    assert one.take_in("probe", 20, 64, 10) is None  # 0.3125 is above half of the best
    assert 0.5 - 3 * math.sqrt(0.25 / 64) > 0.25
    assert one.take_in("probe", 15, 64, 10) == Finding("probe", 15 / 64, 0.25)
    few = judge()
    few.take_in("probe", 4, 8, 10)
    assert few.take_in("probe", 1, 8, 10) is None  # of eight samples three fewer are within the spread
    never = judge()
    never.take_in("probe", 9, 64, 10)
    assert never.take_in("probe", 0, 64, 10) is None  # it never was robust


def test_calm_is_below_half_of_every_limit_and_known():
    one = judge()
    assert one.calm([])
    assert not one.calm(["linearity"])
    for _ in range(3):
        one.take_in("linearity", 0.09, 1.0)
    assert one.calm(["linearity"])
    one.take_in("falls", 0.03, 1.0)
    assert not one.calm(["linearity"])
    one.forget()
    assert one.calm([])
    assert not one.calm(["linearity"])


def test_a_judge_goes_on_from_its_state():
    one, other = judge(), judge()
    for number in (0.1, 0.15, 0.3):
        one.take_in("linearity", number, 1.0)
        one.take_in("probe", number, 1.0, 10)
    other.load_state_dict(one.state_dict())
    for each in (one, other):  # what is not finite is in the state, too
        each.take_in("falls", math.nan, 1.0)
    other.load_state_dict(one.state_dict())
    assert not other.calm([])
    for number in (0.3, 0.4):
        assert one.take_in("linearity", number, 1.0) == other.take_in("linearity", number, 1.0)
    assert one.state_dict() == other.state_dict()
