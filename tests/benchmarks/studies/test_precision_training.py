"""benchmarks/studies/precision_training.py with tiny runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.studies import precision_training as study
from elle_fast import data
from elle_fast.presets import FAST
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import InterruptedRunError, train

TINY = replace(study.BASE, data="digits", limit=80, validation=16, test_limit=16, width=2, batch_size=32, epochs=2)
TINY = replace(TINY, log_every=1, eval_attacks="clean,pgd-2", augment=False, eps=1e-3)


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "BASE", TINY)
    monkeypatch.setattr(study, "ATTACK", "pgd-2")
    monkeypatch.setattr(TrainConfig, "read_data", lambda config: data.load("digits", limit=80, test_limit=16))
    return ["--root", str(tmp_path / "unused"), "--work", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]


def read(arguments):
    return json.loads(Path(arguments[-1]).read_text())["rows"]


def test_each_run_is_made_once(arguments, monkeypatch, capsys):
    everything = dict(study.PRECISIONS)
    monkeypatch.setattr(study, "PRECISIONS", {"fp32": everything["fp32"]})
    assert study.main([*arguments, "--seeds=3"]) == 0
    first = read(arguments)
    assert [*first] == ["fp32, seed 3"]
    monkeypatch.setattr(study, "PRECISIONS", everything)
    capsys.readouterr()
    assert study.main([*arguments, "--seeds=3"]) == 0
    rows = read(arguments)
    assert [row["precision"] for row in rows.values()] == [*everything]
    assert rows["fp32, seed 3"] == first["fp32, seed 3"]
    exact, mixed, low = rows.values()
    assert exact["exact_e_lin"] > 0 < exact["e_lin"]
    assert exact["accuracy"].keys() == {"last", "best", "averaged", "best averaged"}
    # At so small an eps rounding is all that there is of E_lin; exact triplets do not round.
    assert low["e_lin"] > 10 * exact["e_lin"]
    assert mixed["e_lin"] < 2 * exact["e_lin"]
    said = capsys.readouterr()
    begun = [line for line in said.err.splitlines() if line.endswith("seed 3")]
    assert begun == ["bf16, triplets fp32, seed 3", "bf16, seed 3"]
    assert "bf16: mean PGD-20" in said.out


def test_a_stopped_run_goes_on(arguments, monkeypatch, capsys):
    monkeypatch.setattr(study, "PRECISIONS", {"fp32": {}})
    assert study.main([*arguments, "--seeds=3"]) == 0
    whole = read(arguments)["fp32, seed 3"]
    again = [each.replace("runs", "again").replace("out.json", "again.json") for each in arguments]

    def stopping(config, folder, **options):
        calls = iter(range(100))

        def measure(*_):
            if next(calls) == 0:
                raise InterruptedRunError("stopped after step 2 of 4")
            return {}

        return train(config, folder, **options, measure=measure)

    monkeypatch.setattr(study, "train", stopping)
    assert study.main([*again, "--seeds=3"]) == 130
    assert "stopped after step 2" in capsys.readouterr().err
    monkeypatch.setattr(study, "train", train)
    assert study.main([*again, "--seeds=3"]) == 0
    found = read(again)["fp32, seed 3"]
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}


def test_a_run_that_ends_in_nan_is_a_row(arguments, monkeypatch):
    monkeypatch.setattr(study, "PRECISIONS", {"fp32": {"learning_rate": 1e20}})
    assert study.main([*arguments, "--seeds=3"]) == 0
    assert read(arguments)["fp32, seed 3"]["ended"] == "nan"


def test_the_study_is_runs_of_the_command_line():
    cells = list(study.cells(study.SEEDS))
    assert [config.seed for _, config in cells] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [name for name, _ in cells[:3]] == [*study.PRECISIONS]
    for _, config in cells:
        resolved = config.resolved()
        assert (resolved.eps, resolved.epochs, resolved.limit, resolved.augment) == (16 / 255, 15, None, True)
        assert {name: getattr(resolved, name) for name in FAST} == FAST
