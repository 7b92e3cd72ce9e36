"""One row at a time: the order, what is done and not done again, and what is refused. No process is started here."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import yaml

from benchmarks.evidence import job
from benchmarks.evidence.queue import NOTHING_LEFT, SOME_FAILED
from benchmarks.paper import cells
from elle_fast import data
from elle_fast.recipes import checkpoint
from elle_fast.recipes import result as ending
from elle_fast.recipes import train as training
from elle_fast.recipes.evaluate import evaluate_checkpoint

DEFAULTS: dict[str, Any] = {"width": 2, "epochs": 1, "limit": 80, "validation": 16, "test_limit": 16, "batch_size": 32}
DEFAULTS |= {"device": "cpu", "eval_attacks": "clean"}
ONE: dict[str, Any] = {
    "name": "one",
    "result": "one.json",
    "note": "a note",
    "variants": {"fgsm": {"method": "fgsm"}, "wild": {"method": "fgsm", "learning_rate": 1e30}},
    "eps": [0.1],
    "seeds": [0],
}
TWO = {**ONE, "name": "two", "result": "two.json", "variants": {"light": {"method": "elle-a", "skip_below": 1.0}}}
TWO |= {"seeds": [0, 1], "attacks": "noise-2", "samples": 8}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Nine tenths of the time of such a run."""
    monkeypatch.setattr(ending, "plot_curves", lambda *args, **options: None)


def run(folder, *more, entries=(ONE, TWO), defaults=DEFAULTS):
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump({"defaults": defaults, "entries": list(entries)}, sort_keys=False))
    return job.main([f"--queue={path}", f"--work={folder / 'work'}", f"--results={folder / 'results'}", *more])


def rows(folder, name):
    path = folder / "results" / f"{name}.json"
    return [(row["variant"], row["seed"]) for row in json.loads(path.read_text())["runs"]] if path.exists() else None


def test_rows_one_by_one_in_the_order_of_the_list(tmp_path, capsys):
    seen = []
    while (status := run(tmp_path)) == 0:
        seen.append((rows(tmp_path, "one"), rows(tmp_path, "two")))
    one = [("fgsm", 0)]
    # The second row of the first entry fails.
    assert seen == [(one, None), (one, None), (one, [("light", 0)]), (one, [("light", 0), ("light", 1)])]
    assert status == SOME_FAILED
    assert "3 of 4 rows are done, 1 failed" in capsys.readouterr().out
    first, second = (json.loads((tmp_path / "results" / f"{name}.json").read_text()) for name in ("one", "two"))
    (failed,) = first["failed"]
    assert (failed["variant"], failed["eps"], failed["seed"]) == ("wild", 0.1, 0)
    assert failed["error"].startswith("loss: expected finite numbers and weights, got")
    assert (first["missing"], second["missing"], second["missing_strong"]) == (1, 0, 0)
    assert (first["entry"], first["note"], first["eps"]) == ("one", "a note", [0.1])
    assert first["command"] == 'make evidence ARGS="--root DATA --only one"'
    for row in second["runs"]:
        assert row["strong"]["worst_case"]["samples"] == 8
        assert list(row["strong"]["accuracy"]) == ["noise-2"]
        assert row["config"]["epochs"] == len(row["epochs"]) == 1
        assert {"machine", "versions", "commit", "commits", "accuracy", "training_seconds"} <= row.keys()
    assert str(tmp_path) not in json.dumps([first, second])
    assert run(tmp_path, "--only=fgsm,two") == NOTHING_LEFT


def test_what_is_done_begun_and_missing_is_listed(tmp_path, capsys):
    assert [run(tmp_path) for _ in range(3)] == [0, 0, 0]
    shutil.rmtree(tmp_path / "work" / "one" / "fgsm-eps25.5-seed0")  # its row is in the file
    (tmp_path / "work" / "two" / "light-eps25.5-seed0" / "strong.json").unlink()
    capsys.readouterr()
    assert run(tmp_path, "--list", f"--root={tmp_path / 'none'}") == 0
    assert capsys.readouterr().out == (
        "one (one.json): 1 of 2 rows are done\n  done: fgsm-eps25.5-seed0\n  failed: wild-eps25.5-seed0\n\n"
        "two (two.json): 0 of 2 rows are done\n  trained, not attacked: light-eps25.5-seed0\n"
        "  missing: light-eps25.5-seed1\n"
    )
    assert run(tmp_path, "--list", "--only=fgsm") == 0
    assert capsys.readouterr().out == "one (one.json): 1 of 1 rows are done\n  done: fgsm-eps25.5-seed0\n"


def test_the_best_weights_are_attacked_if_they_should_be_and_the_averaged_ones_if_there_are_any(tmp_path):
    own = {**ONE, "variants": {"fgsm": {"method": "fgsm"}}, "attacks": "noise-2", "samples": 1, "models": True}
    averaged = {**own, "name": "two", "result": "two.json", "options": {"average": 0.9}}
    for _ in range(2):
        assert run(tmp_path, entries=[own, averaged]) == 0
    for name, models in (("one", ["best"]), ("two", ["best", "averaged", "best averaged"])):
        (row,) = json.loads((tmp_path / "results" / f"{name}.json").read_text())["runs"]
        assert list(row["strong"]["models"]) == models
        assert row["strong"]["models"]["best"].keys() == {"pgd-50-10"}
    assert run(tmp_path, entries=[own, averaged]) == NOTHING_LEFT


def test_only_some_of_the_list(tmp_path):
    assert run(tmp_path, "--only=light") == 0
    assert (rows(tmp_path, "one"), rows(tmp_path, "two")) == (None, [("light", 0)])
    with pytest.raises(ValueError, match=r"only: expected one of 'one', 'two', 'fgsm', 'wild', 'light', got 'dark'"):
        run(tmp_path, "--only=light,dark")


def test_a_row_is_there_before_its_attacks_which_are_made_if_they_are_missing(tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cells, "evaluate_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--only=two")
    (row,) = json.loads((tmp_path / "results" / "two.json").read_text())["runs"]
    assert row["strong"] is None
    monkeypatch.setattr(cells, "evaluate_checkpoint", evaluate_checkpoint)
    monkeypatch.setattr(cells, "train", lambda *args, **options: pytest.fail("trained again"))
    assert run(tmp_path, "--only=two") == 0
    (row,) = json.loads((tmp_path / "results" / "two.json").read_text())["runs"]
    assert row["strong"]["accuracy"].keys() == {"noise-2"}


def test_the_rows_of_the_files_count_where_their_folders_are_not_and_other_rows_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "commit", lambda: "before")
    for _ in range(2):
        run(tmp_path, "--only=two")
    path = tmp_path / "results" / "two.json"
    made = json.loads(path.read_text())
    shutil.rmtree(tmp_path / "work")
    monkeypatch.setattr(cells, "commit", lambda: "after")
    assert run(tmp_path, "--only=two") == NOTHING_LEFT
    # One of them is lost. The other stays as it is, although another commit made it.
    path.write_text(json.dumps({**made, "runs": made["runs"][1:]}))
    assert run(tmp_path, "--only=two") == 0
    new, old = json.loads(path.read_text())["runs"]
    assert old == made["runs"][1]
    assert (new["seed"], new["commits"], old["commits"]) == (0, ["after"], ["before"])
    with pytest.raises(ValueError, match=r"of another: epochs = 1 \(now: 2\); remove it"):
        run(tmp_path, entries=[TWO], defaults={**DEFAULTS, "epochs": 2})
    with pytest.raises(
        ValueError, match=r"results: expected rows of entry 'two', got .* with 'light', eps 0.1, seed 1,"
    ):
        run(tmp_path, entries=[{**TWO, "seeds": [0]}])


@pytest.mark.parametrize(
    "error", [RuntimeError("can't allocate memory"), TypeError("train() got an unexpected option")]
)
def test_an_error_that_is_not_the_trainings_stops_the_queue_and_the_row_is_tried_again(tmp_path, monkeypatch, error):
    def fails(*args, **options):
        raise error

    monkeypatch.setattr(cells, "train", fails)
    for _ in range(2):
        with pytest.raises(type(error), match=r"memory|option"):
            run(tmp_path)
    assert not list(tmp_path.rglob(cells.FAILED))
    monkeypatch.setattr(cells, "train", training.train)
    assert run(tmp_path) == 0
    assert rows(tmp_path, "one") == [("fgsm", 0)]


def test_rows_that_are_done_outlive_a_change_of_the_checkpoints(tmp_path, monkeypatch):
    logged = {**DEFAULTS, "log_every": 1}
    assert run(tmp_path, "--only=two", defaults=logged) == 0
    (before,) = json.loads((tmp_path / "results" / "two.json").read_text())["runs"]
    assert before["steps"]
    monkeypatch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
    # The second row is made by the code of then, and written beside the first.
    assert run(tmp_path, "--only=two", defaults=logged) == 0
    first, second = json.loads((tmp_path / "results" / "two.json").read_text())["runs"]
    assert (first, second["seed"]) == (before, 1)


def test_other_data_than_those_of_the_rows_that_are_there_are_refused(tmp_path, monkeypatch):
    run(tmp_path, "--only=two")
    load = data.load

    def other(*args, **options):
        dataset = load(*args, **options)
        dataset.train.images[0, 0, 0, 0] ^= 1
        return dataset

    monkeypatch.setattr(data, "load", other)
    with pytest.raises(ValueError, match=r"light-eps25.5-seed0' of another: data = '[0-9a-f]{32}' \(now: "):
        run(tmp_path, "--only=two")


def test_pictures_when_asked_for(tmp_path):
    run(tmp_path, "--only=two")
    assert not list((tmp_path / "results").glob("*.svg"))
    run(tmp_path, "--only=two", "--plot")
    assert (tmp_path / "results" / "two.svg").read_bytes().startswith(b"<?xml")
