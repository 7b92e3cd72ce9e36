"""benchmarks/studies/gradient_bound.py on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace

from benchmarks.studies import gradient_bound
from elle_fast import data
from elle_fast.recipes.config import TrainConfig

TINY = TrainConfig(method="elle", width=2, epochs=1, limit=64, test_limit=20, batch_size=32, eps=0.3)


def test_cells_are_run_once_and_end_as_they_ended(tmp_path, monkeypatch, capsys):
    run = replace(TINY, eval_attacks="clean,pgd-2")
    bound = replace(run, lam=1e4, max_ratio=0.5)
    chosen = [bound, replace(bound, max_ratio=None), replace(run, lam=1e30, learning_rate=1e20)]
    monkeypatch.setattr(gradient_bound, "cells", lambda name: iter(chosen))
    monkeypatch.setattr(gradient_bound, "_RESULT", "pgd-2")
    digits = data.load("digits", limit=64, test_limit=20)
    monkeypatch.setattr(TrainConfig, "read_data", lambda config: digits)
    out = tmp_path / "out.json"
    arguments = ["--data", "mnist", "--root", str(tmp_path / "unused"), "--out", str(out)]
    assert gradient_bound.main([*arguments, "--limit", "2"]) == 0
    rows = json.loads(out.read_text())["rows"]
    first, second = rows.values()
    assert first["ratio"][0] <= first["ratio"][1] <= first["ratio"][2]
    assert 0 < first["bound"] <= 1
    assert (second["ratio"], second["bound"]) == (None, None)
    assert all(row["seconds"] > 0 and row["machine"]["torch_threads"] == 1 and "commit" in row for row in rows.values())
    assert {first["ended"], second["ended"]} <= {"chance", "collapsed", "stands"}
    capsys.readouterr()
    assert gradient_bound.main(arguments) == 0
    content = json.loads(out.read_text())
    assert [row["ended"] for row in content["rows"].values()][2:] == ["nan"]
    assert list(content["rows"].items())[:2] == list(rows.items())
    said = capsys.readouterr().out
    assert said.count(" seed 0 {") == 1  # the others were there
    assert "('elle', 76.5, 1e+30, None): nan" in said
    assert str(tmp_path) not in out.read_text()


def test_the_studies_are_runs_of_the_command_line():
    for name, count in (("mnist", 42), ("cifar", 24)):
        cells = list(gradient_bound.cells(name))
        assert len(cells) == len(set(cells)) == count
        for cell in cells:
            cell.resolved()
