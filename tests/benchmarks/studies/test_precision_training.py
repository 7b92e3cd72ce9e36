"""benchmarks/studies/precision_training.py with tiny runs."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness import rows as rows_of
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


def row_of(name, seed, robust, ended="stands"):
    row = {"precision": name, "seed": seed, "ended": ended}
    if ended == "nan":
        return row
    accuracy = {model: {study.ATTACK: robust, "clean": 0.3} for model in ("last", "averaged")}
    return {**row, "accuracy": accuracy, "e_lin": 1e-6, "exact_e_lin": 1e-6, "lam": 1.0, "seconds": 1.0}


def test_the_table_says_which_runs_ended_in_nan_and_compares_seeds_that_both_have():
    rows = [row_of("fp32", seed, robust) for seed, robust in enumerate([0.2, 0.21, 0.25])]
    rows += [row_of("bf16", 0, 0.19), row_of("bf16", 1, 0.0, "nan"), row_of("bf16", 2, 0.0, "nan")]
    rows += [row_of("bf16, triplets fp32", 2, 0.24), row_of("bf16, triplets fp32", 1, 0.21, "collapsed")]
    *lines, fallen, mixed, low = study.table({str(i): row for i, row in enumerate(rows)}).splitlines()
    cells = {each[0]: each[1] for line in lines[2:] if (each := [cell.strip() for cell in line.strip("|").split("|")])}
    assert cells == {
        "fp32": "22.0 (20.0, 21.0, 25.0)",
        "bf16, triplets fp32": "22.5 (-, 21.0, 24.0)",
        "bf16": "19.0 (19.0, nan, nan)",
    }
    assert fallen == "bf16: 2 of 3 runs ended in NaN"
    # By hand: (0 - 1) / 2 over two seeds, where the difference of the means is +0.5; -1 over one, where it is -3.
    assert mixed == "bf16, triplets fp32: mean PGD-20 -0.5 against fp32 over seeds 1, 2; the 3 of fp32 spread over 5.0"
    assert low == "bf16: mean PGD-20 -1.0 against fp32 over seeds 0; the 3 of fp32 spread over 5.0"


def test_the_table_where_all_runs_of_a_precision_ended_in_nan():
    text = study.table({"a": row_of("fp32", 0, 0.2), "b": row_of("bf16", 0, 0.0, "nan")})
    assert "bf16: 1 of 1 runs ended in NaN" in text
    assert "against" not in text


def test_processes_with_seeds_of_their_own_share_the_file(tmp_path, monkeypatch):
    read = rows_of.read_rows

    def slowly(path):
        found = read(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(study, "run", lambda *args: {"ended": "nan"})
    monkeypatch.setattr(TrainConfig, "read_data", lambda config: None)
    # Between reading and writing the file the other one has time to do the same.
    monkeypatch.setattr(rows_of, "read_rows", slowly)
    arguments = ["--root=unused", f"--work={tmp_path}", f"--out={tmp_path / 'results' / 'out.json'}"]
    # The lock is one of files, and tells threads apart as it does processes.
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(study.main, [[*arguments, f"--seeds={seed}"] for seed in (0, 1)])] == [0, 0]
    rows = json.loads((tmp_path / "results" / "out.json").read_text())["rows"]
    assert {(row["precision"], row["seed"]) for row in rows.values()} == {
        (name, seed) for name in study.PRECISIONS for seed in (0, 1)
    }
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out.json"]
