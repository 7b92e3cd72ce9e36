"""When a run counts as collapsed, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from elle_fast.recipes.progress import turning_point, verdict


def epochs(*accuracies: tuple[float, float], samples: int = 1_000) -> list[dict[str, Any]]:
    """Rows with these accuracies under the training attack and under PGD-10, of ten classes."""
    rows: list[dict[str, Any]] = []
    for train_adv, val_pgd in accuracies:
        row = {"epoch": len(rows) + 1, "train_adv": train_adv, "val_pgd": val_pgd}
        rows.append(row | verdict(row, rows, samples, 10))
    return rows


def verdicts(*accuracies: tuple[float, float], samples: int = 1_000) -> list[str]:
    return [
        "".join(name[0] for name in ("robust", "collapsed", "never_robust") if row[name])
        for row in epochs(*accuracies, samples=samples)
    ]


def said(rows: list[dict[str, Any]]) -> list[str | None]:
    return [turning_point(row, rows[:place]) for place, row in enumerate(rows)]


def test_a_collapse_is_measured_by_what_was_withstood_before():
    assert verdicts((0.4, 0.3), (0.5, 0.4), (0.6, 0.21), (0.9, 0.19), (0.99, 0.01)) == ["r", "r", "r", "rc", "c"]
    # Without memory the first would be a collapse too: the training attack's accuracy is high, PGD's is nothing.
    assert verdicts((0.518, 0.012), (0.999, 0.006)) == ["n", "n"]
    # At large radii a collapse leaves the training at chance too.
    assert verdicts((0.25, 0.2), (0.1, 0.0)) == ["r", "c"]


def test_no_collapse():
    assert verdicts((0.5, 0.5), (0.8, 0.35)) == ["r", "r"]  # robust overfitting
    assert verdicts((0.12, 0.0), (0.1, 0.1)) == ["", ""]  # has learnt nothing yet
    assert verdicts((0.222, 0.14), (0.2, 0.06)) == ["", ""]  # never above 1.5 times chance, and not deceived
    assert verdicts((0.6, 0.5), (0.6, 0.2), samples=16) == ["r", "r"]  # three deviations of 16 samples
    assert verdicts((0.6, 0.5), (0.6, 0.2)) == ["r", "rc"]


def test_a_recovered_run_is_measured_by_its_best_again():
    assert verdicts((0.6, 0.5), (0.6, 0.0), (0.6, 0.3), (0.6, 0.2)) == ["r", "c", "r", "rc"]


def test_rows_of_epochs_that_were_not_watched_are_left_out():
    row = {"epoch": 2, "train_adv": 0.9, "val_pgd": 0.0}
    assert verdict(row, [{"epoch": 1, "train_adv": 0.9}], 100, 10)["never_robust"]


def test_each_turn_is_said_once():
    lines = said(epochs((0.6, 0.5), (0.7, 0.01), (0.7, 0.0), (0.7, 0.4), (0.7, 0.4)))
    assert lines[0] is lines[2] is lines[4] is None
    assert lines[1] == (
        "COLLAPSE in epoch 2: 1.0% of the validation images withstand PGD-10, after 50.0% in epoch 1, while 70.0% of "
        "the training attack's points are classified right (catastrophic overfitting)."
    )
    assert lines[3] == "recovered in epoch 4: 40.0% of the validation images withstand PGD-10"


def test_a_run_that_was_never_robust_is_no_collapse():
    first, *others = said(epochs((0.6, 0.01), (0.5, 0.14), (0.7, 0.0), (0.7, 0.3)))
    assert first is not None
    assert first.startswith("NOT ROBUST in epoch 1: 60.0% of the training attack's points are classified right, but")
    assert others == [None, None, "robust in epoch 4: 30.0% of the validation images withstand PGD-10"]


def test_who_loses_all_without_being_deceived_is_not_overfitted():
    _, line = said(epochs((0.25, 0.2), (0.1, 0.05)))
    assert line == "COLLAPSE in epoch 2: 5.0% of the validation images withstand PGD-10, after 20.0% in epoch 1."


@pytest.mark.parametrize("old", [{"collapsed": True, "robust": False}, {"collapsed": False}])
def test_rows_of_earlier_versions_are_read(old):
    rows = [{"epoch": 1, "train_adv": 0.9, "val_pgd": 0.5, **old}]
    row = {"epoch": 2, "train_adv": 0.9, "val_pgd": 0.0}
    row |= verdict(row, rows, 1_000, 10)
    assert row["collapsed"]
    assert (turning_point(row, rows) is None) == old["collapsed"]
