"""The page about FastAT Benchmark's ranking: its file is our recipe's setting, its numbers are those of the files."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace

import pytest
import yaml

from elle_fast import presets
from elle_fast.recipes import recipe
from elle_fast.recipes.config import TrainConfig
from tests.docs.pages import ROOT

FOLDER = ROOT / "docs" / "results"
PAGE = (FOLDER / "ranking.md").read_text("utf-8")


def test_the_file_for_the_benchmark_is_the_setting_of_our_recipe():
    theirs = yaml.safe_load((FOLDER / "ranking-elle.yaml").read_text("utf-8"))
    asked = TrainConfig(data="cifar10", method="elle", eps=8 / 255)
    ours = replace(asked, **recipe.options("fastat", asked)).resolved()
    assert (theirs["total_epoch"], theirs["lr"]) == (ours.epochs, ours.learning_rate)
    assert (theirs["label_smoothing"], theirs["tau"]) == (ours.label_smoothing, ours.average)
    assert (float(theirs["weight_decay"]), theirs["n_triplets"]) == (ours.weight_decay, ours.triplets)
    assert theirs["lin_reg"] == ours.lam == presets.weight("elle", "cifar10")
    # FGSM from x with a step of eps, as our method "elle" has it.
    assert (theirs["fgsm_init"], theirs["fgsm_alpha"], theirs["attack_iter"]) == ("zero", 1.0, 1)


def test_the_text_changes_what_the_file_has():
    theirs = yaml.safe_load((FOLDER / "ranking-elle.yaml").read_text("utf-8"))
    changes = re.findall(r"^- `(\w+): \S+` to `(\S+)`$", PAGE, flags=re.MULTILINE)
    assert {name: str(theirs[name]) for name, _ in changes} == dict(changes)
    assert len(changes) == 3


def test_the_numbers_of_e_lin_are_those_of_the_runs():
    runs = json.loads((ROOT / "benchmarks" / "results" / "cifar10-small.json").read_text("utf-8"))["runs"]
    epochs = [epoch for run in runs for epoch in run["epochs"]]
    assert f"the {len(epochs)} epochs of" in PAGE
    healthy, collapsed = (
        statistics.median(epoch["test_e_lin"] for epoch in epochs if epoch["collapsed"] is state)
        for state in (False, True)
    )
    for lam, row in re.findall(
        r"^\| ([\d,]+) \| (\S+ \| \S+) \|$", PAGE.split("## What lam 1 weighs")[1], re.MULTILINE
    ):
        weight = float(lam.replace(",", ""))
        for printed, exact in zip(row.split(" | "), (healthy, collapsed), strict=True):
            assert float(printed) == pytest.approx(weight * exact, rel=0.03)


def test_the_mean_of_the_ranked_seeds_is_that_of_the_table():
    rows = re.findall(r"^\| \d \| ([\d.]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", PAGE, flags=re.MULTILINE)
    clean, attacked = ([float(number) for number in column] for column in zip(*rows, strict=True))
    mean, deviation = statistics.mean(attacked), statistics.stdev(attacked)
    assert f"| {statistics.mean(clean):.2f} | | | {mean:.2f} ± {deviation:.2f} |" in PAGE
