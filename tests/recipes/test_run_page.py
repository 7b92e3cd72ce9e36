"""The page of runs: whole, escaped, with every number, the collapses, the alarms and what differs."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from elle_fast.recipes.run_charts import CHARTS, COLOURS, charts, dashes
from elle_fast.recipes.run_page import differences, run_page, verdict
from tests.html_tree import Tree
from tests.recipes.records import COLLAPSING, NASTY, record

ALARM = {"step": 25, "signal": "linearity", "value": 0.4, "limit": 0.2, "back_to": 11}


def drawn(records):
    """The charts by their title, as XML."""
    figures = [ElementTree.fromstring(figure) for figure in charts(records)]
    return {str(figure.findtext("figcaption")): figure for figure in figures}


def table(text):
    """The cells of the table of runs as texts, by row."""
    body = re.findall("<tbody>(.*?)</tbody>", text, re.DOTALL)[0]
    rows = re.findall("<tr.*?</tr>", body, re.DOTALL)
    return [[Tree(cell).text.rstrip("|") for cell in re.findall("<t[hd].*?</t[hd]>", row, re.DOTALL)] for row in rows]


def test_the_page_is_whole_and_runs_its_own_script_alone():
    text = run_page([record("one"), record("two", seed=1)])
    tree = Tree(text)
    assert tree.of("h1") == [{}]
    assert not re.search(r"https?:|//|url\(|@import", text.replace("<!DOCTYPE", ""))
    assert {name for name, _ in tree.elements}.isdisjoint({"link", "iframe", "object", "img"})
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    policy = next(each["content"] for each in tree.of("meta") if "http-equiv" in each)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_table_has_every_number():
    rows = table(run_page([record("one"), record("two", method="fgsm", eps=0.1, seed=3, pgd=COLLAPSING)]))
    collapsing = ["90.00%", "40.00%", "80.00%", "50.00%", "6.0"]
    assert rows == [
        ["one", "no collapse", "elle-a", "8/255", "0", "90.00%", "60.00%", "80.00%", "60.00%", "6.0"],
        ["two", "collapsed in epoch 2 (step 20); recovered", "fgsm", "0.1", "3", *collapsing],
    ]


def test_accuracies_that_a_run_lacks_are_left_open():
    averaged = record("averaged")
    models = {**averaged.models, "best averaged": averaged.models["best"]}
    text = run_page([replace(averaged, models=models), record("running", models={}), record("plain")])
    rows = {row[0]: row for row in table(text)}
    assert rows["averaged"][-3:-1] == ["80.00%", "60.00%"]
    assert rows["plain"][-3:-1] == ["–", "–"]
    assert rows["running"][5:-1] == ["–"] * 6
    assert rows["running"][1] == "unfinished: epoch 4 of 4, step 40; no collapse"
    assert [each["data-shows"] for each in Tree(text).of("input")][:3] == [".of-last", ".of-best", ".of-best-averaged"]


@pytest.mark.parametrize(
    "made, expected",
    [
        (record("a"), ("no collapse", "good")),
        (record("a", pgd=COLLAPSING), ("collapsed in epoch 2 (step 20); recovered", "")),
        (record("a", pgd=(*COLLAPSING, 0.0)), ("collapsed in epoch 2 (step 20), 2 times in all", "bad")),
        (
            record("a", pgd=COLLAPSING[:2], models={}),
            ("unfinished: epoch 2 of 4, step 20; collapsed in epoch 2 (step 20)", "bad"),
        ),
        (record("a", pgd=(), models={}), ("unfinished: epoch 0 of 4, step 0", "")),
        (replace(record("a"), alarms=[ALARM]), ("no collapse; 1 alarm, first in step 25", "good")),
        (replace(record("a"), alarms=[ALARM, ALARM]), ("no collapse; 2 alarms, first in step 25", "good")),
    ],
)
def test_the_verdict(made, expected):
    assert verdict(made) == expected


def test_the_verdict_without_validation_and_of_a_run_that_was_never_robust():
    unwatched = record("a")
    for row in unwatched.epochs:
        del row["collapsed"], row["never_robust"], row["val_pgd"]
    assert verdict(unwatched) == ("not watched", "")
    never = record("a")
    never.epochs[-1]["never_robust"] = True
    assert verdict(never) == ("never robust", "bad")


def test_a_curve_for_each_run_that_has_the_numbers():
    runs = [record("one"), record("two")]
    for row in runs[1].epochs:
        del row["lam"], row["e_lin"]
        row["loss"] = float("nan")
    found = drawn(runs)
    assert [*found] == [chart.title for chart in CHARTS]
    counts = {title: len([*figure.iter("polyline")]) for title, figure in found.items()}
    assert [counts[chart.title] for chart in CHARTS] == [2, 2, 2, 1, 1, 2, 1]
    line = found["Accuracy under PGD-10, validation images (%)"].find(".//g[@class='run run-0']/polyline")
    assert line is not None
    places = [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]
    # Four epochs at equal distances, and accuracies that rise by equal amounts.
    steps = [(round(after[0] - before[0], 1), round(before[1] - after[1], 1)) for before, after in pairwise(places)]
    assert max(step[0] for step in steps) - min(step[0] for step in steps) < 0.2
    assert max(step[1] for step in steps) - min(step[1] for step in steps) < 0.2
    assert steps[0][1] == pytest.approx(21.2, abs=0.2)  # 0.1 of the height of 212


def test_collapses_and_alarms_are_marked_where_they_are():
    runs = [record("fine"), replace(record("bad", pgd=COLLAPSING), alarms=[ALARM])]
    for figure in drawn(runs).values():
        (cross,) = figure.findall(".//path[@class='collapse']")
        assert cross.findtext("title") == "bad collapses in epoch 2, step 20"
        (spot,) = [
            each
            for each in figure.findall(".//g[@class='run run-1']/circle")
            if "epoch 2:" in str(each.findtext("title"))
        ]
        x, y = map(float, re.findall(r"^M([\d.]+),([\d.]+)l", cross.attrib["d"])[0])
        assert (x + 5, y + 5) == pytest.approx((float(spot.attrib["cx"]), float(spot.attrib["cy"])))
        (triangle,) = figure.findall(".//path[@class='alarm']")
        assert "alarm of the guard in step 25, linearity" in str(triangle.findtext("title"))
        at = [float(each.attrib["cx"]) for each in figure.findall(".//g[@class='run run-1']/circle")]
        assert float(triangle.attrib["d"][1:].split(",")[0]) == pytest.approx((at[1] + at[2]) / 2, abs=0.2)
    text = run_page(runs)
    assert "a collapse, ▲ an alarm of the guard" in Tree(text).text.replace("✕| ", "").replace("|", "")
    assert "▲ an alarm" not in run_page(runs[:1])


def test_steps_become_epochs_by_where_these_ended():
    made = record("a")
    made.epochs[1]["step"], made.epochs[2]["step"], made.epochs[3]["step"] = 30.0, 40.0, 50.0  # phases
    assert [made.epoch_of(step) for step in (0, 5, 10, 20, 30, 45, 60)] == [0, 0.5, 1, 1.5, 2, 3.5, 4]


def test_many_epochs_have_lines_without_spots_within_the_frame():
    long = record("long", pgd=tuple(0.3 + 0.001 * n for n in range(300)))
    for figure in drawn([long, record("short")]).values():
        assert len(figure.findall(".//g[@class='run run-0']/circle")) == 0
        assert len(figure.findall(".//g[@class='run run-1']/circle")) == 4
        for line in figure.iter("polyline"):
            for pair in line.attrib["points"].split():
                x, y = map(float, pair.split(","))
                assert 0 <= x <= 440
                assert 0 <= y <= 270


def test_runs_beyond_the_colours_are_dashed():
    assert [dashes(n) for n in (0, COLOURS - 1)] == ["none", "none"]
    assert len({(n % COLOURS, dashes(n)) for n in range(4 * COLOURS)}) == 4 * COLOURS


def test_what_differs_and_what_is_the_same():
    runs = [record("one", seed=1, lam=5.0), record("two", method="n-fgsm+elle-a"), record("three", models={})]
    runs[1].origin["torch"] = "2.4.0"
    differing, same = differences(runs)
    assert dict(differing) == {
        "method": ["elle-a", "n-fgsm+elle-a", "elle-a"],
        "lam": ["5.0", "none", "none"],
        "seed": ["1", "0", "0"],
        "torch": ["2.9.0", "2.4.0", "–"],
    }
    listed = dict(same)
    # Nothing is known of where the third one runs.
    assert (listed["commit"], listed["eps"]) == ("0123456789ab", "8/255")
    assert not {*listed} & {*dict(differing)}
    # Of an option that another version lacks.
    del runs[0].config["schedule"]
    assert dict(differences(runs)[0])["schedule"] == ["–", "short", "short"]


def test_a_page_of_one_run_has_all_of_its_options_and_no_comparison():
    tree = Tree(run_page([record("only", lam=5.0)]))
    assert [each["data-shows"] for each in tree.of("input")] == [".of-last", ".of-best"]
    assert "In what the runs differ" not in tree.text
    assert "Options and origin" in tree.text
    assert "lam|5.0" in tree.text
    assert "0123456789ab" in tree.text
    assert "The runs have the same options" in run_page([record("one"), record("two")])


def test_runs_whose_accuracies_do_not_compare_are_remarked():
    text = run_page([record("one"), record("two", data="cifar10", root="x", norm="l2")])
    assert "different data (cifar10, digits)" in text
    assert "different norm (l2, linf)" in text
    fewer = record("fewer")
    fewer.models["last"]["accuracy"]["clean"] = {"accuracy": 0.5, "samples": 4}
    assert "different numbers of test images" in run_page([record("one"), fewer])
    assert 'class="warning"' not in run_page([record("one"), record("two")])


def test_texts_are_escaped():
    odd = record(NASTY, models={})
    odd.config.update({"method": NASTY, "root": NASTY})
    odd = replace(odd, alarms=[{**ALARM, "signal": NASTY}])
    accuracy = {NASTY: {"accuracy": 0.5, "samples": 40}}
    other = replace(record("other"), models={NASTY: {"accuracy": accuracy}})
    text = run_page([odd, other])
    tree = Tree(text)
    assert len(tree.of("script")) == 1
    assert tree.of("b") == []
    assert NASTY in tree.text
    assert all(re.fullmatch(r"[\w. -]*", each["data-shows"]) for each in tree.of("input"))


def test_a_run_in_its_first_epoch_has_no_curves():
    text = run_page([record("new", pgd=(), models={})])
    assert "No epoch has ended yet" in text
    assert "<figure" not in text
