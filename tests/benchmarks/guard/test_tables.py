"""The table, the targets and the picture of benchmarks/guard, of rows made up here."""

from __future__ import annotations

from typing import Any

from benchmarks.guard import figure
from benchmarks.guard.judged import SAME, judged
from benchmarks.guard.tables import table, targets
from tests.benchmarks.guard.test_judged import LOST, STANDS, run


def row(method: str, seed: int, guarded: Any, alone: Any, eps: int = 16) -> dict[str, Any]:
    found = {"method": method, "eps": eps, "seed": seed, "guarded": guarded, "alone": alone}
    return {**found, "judged": judged(found)}


def keyed(*rows):
    return {f"{each['method']}-eps{each['eps']}-seed{each['seed']}": each for each in rows}


def cells(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


RESCUED = row("fgsm", 0, run(STANDS, alarms=[250, 550], at_the_end=0.23), run(LOST, at_the_end=0.01))
LATE = row("fgsm", 1, run(STANDS, alarms=[351]), run(LOST, at_the_end=0.0))
HEALTHY = row("n-fgsm", 0, run(STANDS, at_the_end=0.25), SAME)
FALSE = row("n-fgsm", 1, run(STANDS, alarms=[100]), run(STANDS))
MISSED = row("slat", 0, run(LOST, at_the_end=0.02), SAME, eps=8)
UNKNOWN = row("slat", 1, run(STANDS, alarms=[100]), None, eps=8)
ROWS = keyed(LATE, RESCUED, HEALTHY, FALSE, MISSED, UNKNOWN)


def test_the_table():
    first, second, third = cells(table(ROWS))
    assert first == [
        *("8/255", "slat", "0, 1", "1 of 1", "1 of 2", "300, -", "none, linearity 100", "missed, -", "0, -"),
        *("2.0, - / 2.0, 20.0", "50.0, - / 50.0, 50.0"),
    ]
    assert second == [
        *("16/255", "fgsm", "0, 1", "2 of 2", "0 of 2", "300, 300", "linearity 250 + linearity 550, linearity 351"),
        *("-50, +51", "0, 0", "1.0, 0.0 / 23.0, 20.0", "50.0, 50.0 / 50.0, 50.0"),
    ]
    assert third[3:9] == ["0 of 2", "0 of 2", "stands, stands", "none, linearity 100", "-, -", "0, 1"]


def test_the_targets():
    fallen, false, late = cells(targets(ROWS))
    assert fallen == ["collapsed final models with the guard", "1 of 5 (without: 3)", "0", "MISSED"]
    assert false == ["healthy trainings with an alarm", "1 of 2", "at most 1 in 20", "MISSED"]
    assert late[1:] == ["2 of 3; delays -50 to +51, median +51", "0", "MISSED"]
    met = cells(targets(keyed(RESCUED, HEALTHY)))
    assert [each[3] for each in met] == ["met"] * 3
    assert {each[3] for each in cells(targets({}))} == {"not measured"}
    assert cells(targets(keyed(HEALTHY)))[2][1:] == ["-", "0", "not measured"]


def test_what_was_missed_is_of_the_collapses():
    unseen = {**MISSED, "judged": {**MISSED["judged"], "onset": None}}
    assert cells(targets(keyed(unseen, HEALTHY)))[2][1] == "1 of 1"


def test_the_picture_is_of_the_training_that_gains_most(tmp_path):
    assert figure.chosen(ROWS) is RESCUED
    assert figure.draw(keyed(HEALTHY, FALSE, MISSED, UNKNOWN), tmp_path / "out.json") is None
    axes = figure.of_rescue(RESCUED).axes[0]
    drawn: list[Any] = [*axes.lines]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn]
    alone, guarded, shared = (line for line in lines if len(line[0]) > 2)
    assert alone[1] == [100 * each for each in LOST]
    assert guarded[1] == [100 * each for each in STANDS]
    assert max(shared[0]) == 250
    assert [line[0][0] for line in lines if len(line[0]) == 2] == [250, 550]
    assert figure.draw(ROWS, tmp_path / "out.json") == tmp_path / "out.svg"
    assert (tmp_path / "out.svg").read_bytes().startswith(b"<?xml")
