"""The table and the targets of benchmarks/detector/closed_loop.py, of rows made up here."""

from __future__ import annotations

from typing import Any

from benchmarks.detector.closed_loop_tables import table, targets


def row(variant, seed, clean, robust, *, eps=16, seconds=100.0, **more):
    base, _, rule = variant.partition("+")
    accuracy = {"clean": clean / 100, "pgd-20": robust / 100 + 0.01, "pgd-50-10": robust / 100}
    own: dict[str, Any] = {"mean_lam": None, "full_share": None, "units": 5.0}
    if rule:
        own = {"alarms": [], "detections": 0, "mean_lam": 0.0, "full_share": 0.0, "units": 5.375}
    about = {"variant": variant, "base": base, "rule": rule or None, "eps": eps, "seed": seed}
    return {**about, "ended": "stands", "accuracy": accuracy, **own, "seconds": seconds, **more}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def keyed(rows):
    return {f"{i}": each for i, each in enumerate(rows)}


ROWS = keyed(
    [
        row("n-fgsm", 0, 42, 22),
        row("n-fgsm", 1, 44, 23),
        row("n-fgsm", 2, 40, 21),
        row("n-fgsm", 0, 50, 30, eps=8),
        # On seeds 0 and 1: 0.1 and 0.5 under N-FGSM's clean accuracy, and 1 and 2 under its robust one.
        row("n-fgsm+relative", 0, 41.9, 21, alarms=[7], detections=4, seconds=108.0, mean_lam=20.0),
        row("n-fgsm+relative", 1, 43.5, 21, alarms=[], full_share=0.04, units=5.405, seconds=112.0),
        row("n-fgsm+paper", 1, 42, 22, alarms=list(range(18)), detections=30, full_share=0.5, units=5.75),
        row("fgsm+relative", 0, 37.5, 20.5),
        row("fgsm+paper", 0, 30, 19, eps=8, ended="collapsed", collapsed_in_epoch=29),
        row("fgsm+relative", 0, 30, 19, eps=26, collapsed_in_epoch=3),
    ]
)


def test_the_targets():
    assert cells(targets(ROWS)) == [
        ["false alarms of a healthy N-FGSM training", "18", "1 (1, 0)", "at most 1", "met"],
        ["clean, points under N-FGSM alone, base N-FGSM", "2.00", "0.30 (0.10, 0.50)", "at most 0.5", "met"],
        ["PGD-50-10, the same", "1.00", "1.50 (1.00, 2.00)", "at most 0.5", "MISSED by 1.00"],
        ["clean, points under N-FGSM alone, base FGSM", "-", "4.50", "at most 4", "MISSED by 0.50"],
        ["PGD-50-10, the same", "-", "1.50", "at most 1.5", "met"],
        ["collapsed final models, all", "1", "0", "at most 0", "met"],
        ["passes over FGSM's, base N-FGSM", "1.150", "1.078 (1.075, 1.081)", "at most 1.08", "met"],
        ["passes over FGSM's, base FGSM", "-", "1.075", "at most 1.08", "met"],
    ]


def test_alarms_where_n_fgsm_alone_collapses_are_not_false():
    fallen = {**ROWS, "0": {**ROWS["0"], "ended": "collapsed"}}
    assert cells(targets(fallen))[0][:3] == ["false alarms of a healthy N-FGSM training", "18", "0"]


def test_a_run_that_ended_in_nan_has_no_numbers_but_is_a_fallen_model():
    lost = {"variant": "fgsm+relative", "base": "fgsm", "rule": "relative", "eps": 16, "seed": 0, "ended": "nan"}
    rows = keyed([row("n-fgsm", 0, 42, 22), lost])
    found = cells(targets(rows))
    assert [each[2] for each in found] == ["-", "-", "-", "-", "-", "1", "-", "-"]
    assert found[5][4] == "MISSED by 1"
    assert cells(table(rows))[0] == ["16/255", "fgsm+relative", "0", *["-"] * 10, "nan"]


def test_nothing_is_measured_before_the_first_row():
    assert {each[4] for each in cells(targets({}))} == {"not measured"}
    assert cells(table({})) == []


def test_the_table():
    found = {(line[0], line[1]): line[2:] for line in cells(table(ROWS))}
    assert next(iter(found)) == ("8/255", "fgsm+paper")
    assert len(found) == 7
    # Accuracies, alarms, detections, mean lam, full steps, passes and seconds over the base's, by hand.
    assert found["16/255", "n-fgsm+relative"] == [
        *("0, 1", "42.7 (41.9, 43.5)", "22.0 (22.0, 22.0)", "21.0 (21.0, 21.0)", "-", "0.5 (1, 0)", "2 (4, 0)"),
        *("10 (20, 0)", "2 (0, 4)", "1.078 (1.075, 1.081)", "1.10 (1.08, 1.12)", "stands, stands"),
    ]
    assert found["16/255", "n-fgsm"][-5:] == [
        "-",
        "-",
        "1.000 (1.000, 1.000, 1.000)",
        "1.00 (1.00, 1.00, 1.00)",
        "stands, stands, stands",
    ]
    assert found["26/255", "fgsm+relative"][-2:] == ["-", "stands, collapsed in epoch 3"]
    assert found["8/255", "fgsm+paper"][-1] == "collapsed"
