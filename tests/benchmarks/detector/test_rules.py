"""benchmarks/detector/rules.py: every score against plain code, or what it is to be by its definition."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.detector import rules
from benchmarks.detector.packed import SAMPLES, STEPS
from benchmarks.detector.rules import FAMILIES, OWN_PASS, signals
from elle_fast import AdaptiveLambda

STEPS_OF = 400


@pytest.fixture
def of():
    """Signals like a healthy training's, with a few spikes and lam between 0 and 1."""
    draws = np.random.default_rng(0)
    columns: dict[str, Any] = {name: 10.0 ** draws.normal(-6, 0.5, STEPS_OF) for name in STEPS}
    columns["own_pass"][[150, 151, 300]] *= 1e3
    columns["falls"] = draws.integers(0, 9, STEPS_OF) / 128
    columns["lam"] = 4000 * 0.97 ** (np.arange(STEPS_OF) % 200)
    return signals(columns, OWN_PASS)


def history(values, step, window=None):
    past = [value for value in values[:step] if math.isfinite(value)]
    return past if window is None else past[-window:]


def over(value, past):
    return (value - statistics.fmean(past)) / statistics.pstdev(past) if len(past) >= 3 else -math.inf


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("window", [None, 3, 50, 1000])
def test_the_papers_rule_by_its_definition(of, log, window):
    of["e_lin"][[0, 7, 390]] = math.nan, math.inf, math.nan
    values = np.log(of["e_lin"]) if log else of["e_lin"]
    expected = [
        over(value, history(values, step, window)) if math.isfinite(value) else -math.inf
        for step, value in enumerate(values)
    ]
    found = rules.paper(of, log=log, window=window)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found > 2).any()


def test_the_papers_rule_alarms_where_adaptive_lambda_does(of):
    of["e_lin"][:] = of["e_lin"].astype(np.float32)
    controller = AdaptiveLambda(1.0, gamma=0.5)
    raised = [controller.update(torch.tensor(value, dtype=torch.float32)).item() == 1 for value in of["e_lin"]]
    np.testing.assert_array_equal(rules.paper(of) > controller.sensitivity, raised)
    assert 3 < sum(raised) < STEPS_OF / 2


def test_a_history_of_unregularised_steps(of):
    found = rules.paper(of, below=0.01)
    kept = of["lam"] <= 0.01
    assert 20 < kept.sum() < STEPS_OF - 20
    for step in range(STEPS_OF):
        assert found[step] == pytest.approx(over(of["e_lin"][step], [*of["e_lin"][:step][kept[:step]]]), rel=1e-6)


def test_a_history_for_each_range_of_lam(of):
    found, place = rules.at_its_lam(of, edges=(0.1, 0.5)), 1 * (of["lam"] > 0.1) + (of["lam"] > 0.5)
    assert set(place) == {0, 1, 2}
    for step in range(STEPS_OF):
        past = of["e_lin"][:step][place[:step] == place[step]]
        assert found[step] == pytest.approx(over(of["e_lin"][step], [*past]), rel=1e-6)


def weights(count, rate):
    """Of the first values in a mean that is even over 1 / rate of them and then exponential."""
    found = np.zeros(count)
    for i in range(count):
        part = max(rate, 1 / (i + 1))
        found *= 1 - part
        found[i] = part
    return found


@pytest.mark.parametrize("log", [False, True])
def test_weighted_moments(of, log):
    values = np.log(of["e_lin"]) if log else of["e_lin"]
    found = rules.weighted(of, rate=0.02, log=log, widest=math.inf)
    assert (found[: rules.SETTLING] == -math.inf).all()
    for step in range(rules.SETTLING, STEPS_OF):
        by, past = weights(step, 0.02), values[:step]
        mean = (by * past).sum()
        std = math.sqrt((by * (past - mean) ** 2).sum())
        assert found[step] == pytest.approx((values[step] - mean) / std, rel=1e-8)


def test_a_collapse_does_not_become_its_own_measure(of):
    """E_lin a million times as large from step 350 on still is above the mean after twenty such steps."""
    of["e_lin"][350:] *= 1e6
    robust, naive = (rules.weighted(of, rate=0.02, widest=widest) for widest in (3.0, math.inf))
    assert robust[370] > 1.5 * naive[370] > 0
    assert robust[350] == pytest.approx(naive[350], rel=0.3)


def test_factor(of):
    found = rules.factor(of, rate=0.02)
    for step in range(rules.SETTLING, STEPS_OF):
        geometric = np.exp((weights(step, 0.02) * np.log(of["e_lin"][:step])).sum())
        assert found[step] == pytest.approx(of["e_lin"][step] / geometric, rel=1e-8)


def test_cusum_is_the_highest_sum_of_the_last_steps(of):
    each = rules.weighted(of, rate=0.02)
    each = np.where(np.isfinite(each), each, 0.0)
    drift = 0.4
    expected = [
        max([0.0, *(float((each[k : step + 1] - drift).sum()) for k in range(rules.SETTLING, step + 1))])
        for step in range(rules.SETTLING, STEPS_OF)
    ]
    found = rules.cusum(of, rate=0.02, drift=drift, most=math.inf)
    np.testing.assert_allclose(found[rules.SETTLING :], expected, rtol=1e-9, atol=1e-9)
    assert (found[: rules.SETTLING] == -math.inf).all()
    assert rules.cusum(of, rate=0.02, drift=-1.0, most=7.0).max() == 7


def test_own_spread(of):
    found = rules.own_spread(of, rate=0.02)
    for step in range(rules.SETTLING, STEPS_OF):
        mean = (weights(step, 0.02) * of["e_lin"][:step]).sum()
        assert found[step] == pytest.approx((of["e_lin"][step] / mean - 1) / of["spread"][step], rel=1e-8)


def test_quantile_is_exceeded_by_what_is_left_of_it():
    draws = np.random.default_rng(1)
    found = rules.quantile({"e_lin": 10 ** draws.normal(-5, 0.3, 20_000)}, rate=0.01, level=0.9)
    # The place wanders by about sqrt(rate) of the distribution's width.
    assert (found[2000:] > 1).mean() == pytest.approx(0.1, abs=0.02)
    # By its definition a factor: of values that are twice as large, as many exceed twice the place.
    assert (rules.quantile({"e_lin": np.full(100, 3e-5)}, rate=0.01)[50:] < 1.05).all()


def test_mean_of(of):
    for signal, horizon in (("relative", 10), ("falls", 1), ("falls", 4)):
        found = rules.mean_of(of, signal=signal, horizon=horizon)
        assert (found[:3] == -math.inf).all()
        for step in (3, 5, 9, 10, 57, 399):
            expected = (weights(step + 1, 1 / horizon) * of[signal][: step + 1]).sum()
            assert found[step] == pytest.approx(expected, rel=1e-10)


def test_two_signals_together():
    of = {"e_lin": np.arange(6.0), "falls": np.array([0.3, 0.3, 0.3, 0.0, 0.2, 0.3])}
    first = partial(rules.mean_of, signal="e_lin")
    found = rules.both(of, first, partial(rules.mean_of, signal="falls"), least=0.2)
    assert found.tolist() == [*[-math.inf] * 5, 5.0]


def test_the_signals():
    names = [*STEPS]
    columns = {name: np.array([value, value]) for name, value in zip(names, range(1, 20), strict=False)}
    columns |= {"own_pass": np.array([1.0, 0.0]), "first_32": np.array([2.0, 2.0]), "first_128": np.array([4.0, 4.0])}
    columns |= {"rise": np.array([3.0, 0.0]), "r4": np.array([25.0, 25.0]), "lam": np.array([20.0, 80.0])}
    columns |= {"start": np.array([1.0, 1.0]), "adv": np.array([2.0, 0.5]), "predicted": np.array([4.0, 1.0])}
    own = signals(columns, OWN_PASS)
    assert own["e_lin"].tolist() == [1, 0]
    np.testing.assert_allclose(own["relative"], [0.25, 0], rtol=1e-12)  # 0 / 0 too
    np.testing.assert_allclose(own["spread"], 3 / math.sqrt(16) / 4)
    assert own["of_loss"].tolist() == [0.25, 0]
    assert own["bent"].tolist() == [0.75, 1.5]
    assert own["lam"].tolist() == [0.25, 1.0]
    of_32 = signals(columns, 32)
    np.testing.assert_allclose(of_32["relative"], [0.4, 1], rtol=1e-11)
    assert signals(columns | {"own_pass": np.full(2, 1e-12), "rise": np.zeros(2)}, OWN_PASS)["relative"].tolist() == [
        0.5,
        0.5,
    ]
    np.testing.assert_allclose(of_32["spread"], 3 / math.sqrt(32) / 4)
    assert signals(columns | {"lam": np.zeros(2)}, 32)["lam"].tolist() == [0, 0]


def test_a_number_of_samples_that_was_not_recorded():
    with pytest.raises(
        ValueError, match=r"^samples: expected 0 \(a pass of their own\) or one of \(16, 32, 64, 128\), got 8$"
    ):
        signals({}, 8)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_score_depends_on_the_past_alone(family, of):
    whole = family.score(of)
    assert whole.shape == (STEPS_OF,)
    for end in (1, 2, 40, 301):
        np.testing.assert_array_equal(family.score({name: value[:end] for name, value in of.items()}), whole[:end])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_what_is_not_finite_is_passed_over(family, of):
    places = [5, 6, 100, 250]
    gaps = {name: np.insert(value, places, math.nan if name != "lam" else 0.0) for name, value in of.items()}
    there = np.isin(np.arange(STEPS_OF + 4), np.array(places) + np.arange(4))
    found = family.score(gaps)
    assert (found[there] == -math.inf).all()
    np.testing.assert_array_equal(found[~there], family.score(of))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_thresholds_go_from_sensitive_to_deaf(family, of):
    assert [*family.thresholds] == sorted(set(family.thresholds))
    assert family.score(of).max() > family.thresholds[0]


def test_names_and_samples():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert {rules.PAPER, rules.PRODUCT} < {family.name for family in FAMILIES}
    assert rules.find(rules.PAPER).score is rules.paper
    assert SAMPLES == (16, 32, 64, 128)
