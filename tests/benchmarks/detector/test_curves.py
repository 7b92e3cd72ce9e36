"""benchmarks/detector/{onset,curves,figures}.py: onsets and counting, on synthetic traces."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.detector import curves, figures, rules
from benchmarks.detector.alarms import counted
from benchmarks.detector.curves import FULL, case, detection, full_steps, in_time
from benchmarks.detector.onset import Onset, onset
from benchmarks.detector.packed import STEPS, Recorded, pack
from benchmarks.detector.rules import Family

EVERY = 25


def trace(name, robust, *, relative=0.02, falls=0.0, ended="stands"):
    """A trace with such probes, and E_lin of which this part is that of E_lin + rise; both may be by step."""
    steps = EVERY * len(robust)
    columns = {column: np.full(steps, 1.0) for column in STEPS}
    share = np.broadcast_to(np.asarray(relative, dtype=float), steps)
    for column in ("own_pass", *(f"first_{count}" for count in (16, 32, 64, 128))):
        columns[column] = share / (1 - share)
    columns["falls"] = np.broadcast_to(np.asarray(falls, dtype=float), steps).copy()
    columns["lam"] = np.zeros(steps)
    probes = np.array([(EVERY * i, 0.5, value) for i, value in enumerate(robust)])
    return Recorded(name, columns, probes, ended, "abc")


UP = [0.0, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3]


def test_the_onset_is_the_first_probe_of_those_below_two_thirds():
    assert onset(trace("x", UP * 3)).fate == "stands"
    assert onset(trace("x", [*UP, 0.18, *[0.02] * 20])) == Onset("lost", 200, 0.3)
    assert onset(trace("x", [*UP, 0.22, *[0.02] * 20])) == Onset("lost", 225, 0.3)
    # What comes back was not lost, a third is not half, and twelve probes have to be seen.
    assert onset(trace("x", [*UP, 0.02, 0.02, 0.3, *[0.3] * 20])).fate == "stands"
    assert onset(trace("x", [*UP, *[0.19] * 30])).fate == "stands"
    assert onset(trace("x", [*UP, *[0.02] * 11], ended="unfinished")).fate == "stands"
    assert onset(trace("x", [*UP, *[0.02] * 12], ended="unfinished")).step == 200
    assert onset(trace("x", [*UP, *[0.02] * 2])).fate == "stands"
    assert onset(trace("x", [*UP, *[0.02] * 3])).step == 200
    assert onset(trace("x", [*UP, *[0.02] * 12])).step == 200
    assert onset(trace("x", [*UP, *[0.02] * 3], ended="nan")).step == 200
    # One lucky probe is not the best.
    assert onset(trace("x", [*[0.15] * 10, 0.6, *[0.15] * 20])).fate == "stands"


def test_a_training_that_never_was_robust():
    falls = np.zeros(750)
    falls[300:] = 0.5
    assert onset(trace("x", [0.05] * 30)) == Onset("never robust", None, 0.05)
    # The mean of ten steps is 0.05 after the first one, and above it after the second.
    assert onset(trace("x", [0.05] * 30, falls=falls)) == Onset("never robust", 301, 0.05)
    falls[370:] = 0.0
    assert onset(trace("x", [0.05] * 30, falls=falls)).step is None
    # A training that is robust may have many falling losses.
    assert onset(trace("x", UP * 3, falls=0.5)).fate == "stands"


def test_healthy_steps():
    assert case(trace("x", UP * 3)).healthy == 600
    assert case(trace("x", [*UP, *[0.02] * 20])).healthy == 50
    assert case(trace("x", [0.05] * 30)).healthy == 0
    assert case(trace("cifar10-x", UP)).main
    assert not case(trace("digits-x", UP)).main


def test_an_alarm_counts_for_twenty_steps():
    alarms = np.zeros(200, dtype=bool)
    assert counted(alarms) == []
    alarms[[0, 3, 20, 21, 40, 42, 43, 199]] = True
    assert counted(alarms) == [0, 21, 42, 199]
    assert len(counted(np.ones(1000, dtype=bool))) == 48


@pytest.mark.parametrize("name,gamma", [("full", 0.99), ("full_of_0.9", 0.9)])
def test_full_steps(name, gamma):
    of_one = FULL[name]
    assert gamma ** (of_one - 1) > 0.01 > gamma**of_one
    alarms = np.zeros(1000, dtype=bool)
    assert full_steps(alarms, of_one) == 0
    for places, expected in (
        ([0], of_one),
        ([0, 30], 30 + of_one),
        ([0, 30, 990], 40 + of_one),
        ([0, 30, 40], 40 + of_one),
    ):
        alarms[:] = False
        alarms[places] = True
        assert full_steps(alarms, of_one) == expected
        # As lam itself has it.
        assert full_steps(alarms, of_one) == (figures.simulated(alarms, gamma) > 0.01).sum()


def test_detection():
    alarms = np.zeros(1000, dtype=bool)
    assert detection(alarms, 500) is None
    alarms[[100, 801]] = True
    assert detection(alarms, 500) is None
    alarms[800] = True
    assert detection(alarms, 500) == 800
    alarms[350] = True
    assert detection(alarms, 500) == 350
    assert detection(alarms, 120) == 100
    assert detection(np.ones(1000, dtype=bool), 500) == 350


@pytest.fixture
def cases():
    """A healthy training with two bursts, one that collapses at 500 and shows it at 440, and one on digits."""
    healthy = np.full(1000, 0.02)
    healthy[[200, 215, 600]] = 0.9
    lost = np.full(1000, 0.02)
    lost[100] = 0.9
    lost[440:] = 0.6
    robust = [*[0.25] * 20, *[0.01] * 20]
    traces = [
        trace("cifar10-n-fgsm-eps16-epochs30-seed0", [0.2] * 40, relative=healthy),
        trace("cifar10-fgsm-eps16-epochs15-seed0", robust, relative=lost, ended="collapsed"),
        trace("digits-fgsm-eps76.5-epochs60-seed0", [0.3] * 20, relative=0.6),
    ]
    return [case(each) for each in traces]


def test_a_row(cases):
    family = Family("relative", lambda of: rules.mean_of(of, signal="relative"), (0.5, 0.7, 0.95))
    rows = curves.curve(family, cases, 16)
    assert [*rows] == ["0.5", "0.7", "0.95"]
    # 1,000 + 350 healthy steps: two bursts (the steps 200 and 215 are one) and the alarm at 100.
    of = rows["0.5"]
    assert of["false_per_1000"] == pytest.approx(1000 * 3 / 1350, rel=5e-3)
    assert of["full"] == pytest.approx((15 + 385 + 400 + 250) / 1350, rel=5e-3)
    assert of["full_of_0.9"] == pytest.approx((15 + 3 * 44) / 1350, rel=5e-3)
    assert of["elsewhere"] == pytest.approx(1000 * 24 / 500, rel=5e-3)
    assert of["delays"] == [-60]
    assert of["e_lin"] == [1.5]
    assert of["relative"] == [0.6]
    assert of["pgd"] == [0.25]
    assert rows["0.7"]["delays"] == [None]
    assert rows["0.7"]["pgd"] == [None]
    silent = {"false_per_1000": 0, "elsewhere": 0, "full": 0, "full_of_0.9": 0, "delays": [None], "e_lin": [None]}
    assert rows["0.95"] == {**silent, "relative": [None], "pgd": [None]}


def test_the_level_of_a_trace(cases):
    of_healthy, of_lost, _ = (curves.level(each, 16) for each in cases)
    assert of_healthy["median"] == 0.02
    # A burst at 0.9 lifts the mean of eight by an eighth of it; the one 15 steps later meets what is left.
    first = 0.02 + 0.88 / 8
    assert of_healthy["max"] == pytest.approx(0.02 + 0.11 * (7 / 8) ** 15 + 0.11, rel=5e-3)
    assert of_healthy["at_onset"] is None
    assert of_healthy["alarms, paper, all history"] == 2  # at 200, which counts for 215 too, and at 600
    assert of_healthy["alarms, relative, mean of 8"] == 0
    assert of_lost["max"] == pytest.approx(first, rel=5e-3)
    assert of_lost["at_onset"] == pytest.approx(0.6, rel=5e-3)


def test_the_best_threshold():
    def of(false, full, *delays):
        return {"false_per_1000": false, "full": full, "delays": [*delays]}

    rows = {
        "1": of(5.0, 0.5, -50, -40, 9),
        "2": of(1.0, 0.4, -5, -1, 9),
        "3": of(1.0, 0.2, -3, -1, 9),
        "4": of(0.0, 0, -3, 0, -9),
    }
    assert curves.best(rows, [True, True, False]) == "3"
    assert curves.best(rows, [True, False, False]) == "4"
    assert in_time([-1, 0, None, 5, -7], [True, True, True, True, False]) == 1


def test_the_program(tmp_path, capsys, cases, monkeypatch):
    pack([each.trace for each in cases], tmp_path / "traces.npz")
    out = tmp_path / "curves.json"
    assert curves.main(["--traces", str(tmp_path / "traces.npz"), "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    assert content["command"] == "python -m benchmarks.detector.curves --traces=traces.npz --out=curves.json"
    assert content["collapses"] == ["cifar10-fgsm-eps16-epochs15-seed0"]
    about = content["traces"]["cifar10-fgsm-eps16-epochs15-seed0"]
    assert (about["fate"], about["step"], about["healthy"], about["commit"]) == ("lost", 500, 350, "abc")
    for family in rules.FAMILIES:
        of = content["curves"][family.name]
        assert [*of] == (["own 16", "16", "32", "64", "128"] if family.sampled else ["128"])
        assert all([*rows] == [f"{each:g}" for each in family.thresholds] for rows in of.values())
    assert content["curves"][rules.PRODUCT]["own 16"]["0.2"]["delays"] == [-58]
    lines = capsys.readouterr().out.splitlines()
    found = next(line for line in lines if line.startswith(f"| {rules.PRODUCT} | own 16 | 0.2 |"))
    assert found.split(" | ")[6:] == ["1 of 1", "0", "-58 |"]
    assert any(line.startswith(f"| {rules.PAPER} | 128 | 2 |") for line in lines)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {"curves.svg", "curves-collapse.svg", "curves-healthy.svg"}


def test_a_file_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        curves.main(["--traces", str(tmp_path / "none.npz")])
    assert "argument --traces: no file" in capsys.readouterr().err


def test_figures_without_a_collapse(tmp_path, cases):
    summary = {"traces": {}, "collapses": [], "curves": curves.curves(cases[:1])}
    (path,) = figures.draw(summary, {}, tmp_path / "x.json")
    assert path.stat().st_size > 10_000


def test_simulated_lam():
    lam = figures.simulated(np.array([False, True, False, False, True]), 0.99)
    assert lam.tolist() == pytest.approx([0, 1, 0.99, 0.99**2, 1])
