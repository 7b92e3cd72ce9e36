import json

import pytest

from benchmarks import paper
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig

TINY = paper.Setting(
    config=TrainConfig(width=2, eps=0.1, epochs=1, limit=64, test_limit=16, watch=16, batch_size=32),
    methods=("fgsm", "elle-a"),
    seeds=(0, 1),
    note="a note that belongs to every table",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(paper.SETTINGS, "digits", TINY)


def run(folder, *more):
    out = folder / "out.json"
    status = paper.main(["--setting", "digits", "--out", str(out), "--work", str(folder / "work"), *more])
    assert status == 0
    return out


def test_shards_share_the_cells_and_the_last_writes_the_file(tmp_path, capsys, monkeypatch):
    out = run(tmp_path, "--shard", "0/2")
    assert not out.exists()
    assert "2 of 4 cells are still to be done" in capsys.readouterr().out
    run(tmp_path, "--shard", "1/2")
    summary = json.loads(out.read_text())
    assert [(cell["method"], cell["seed"]) for cell in summary["runs"]] == [
        ("fgsm", 0),
        ("elle-a", 0),
        ("fgsm", 1),
        ("elle-a", 1),
    ]
    assert summary["note"] == TINY.note
    assert summary["command"] == "python benchmarks/paper.py --setting digits --out out.json"
    assert all({"machine", "versions", "commit", "accuracy", "epochs"} <= cell.keys() for cell in summary["runs"])
    assert str(tmp_path) not in out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    # What is done is not done again.
    monkeypatch.setattr(paper, "train", lambda *args, **options: pytest.fail("trained again"))
    out.unlink()
    run(tmp_path)
    assert json.loads(out.read_text()) == summary


def test_a_cell_that_was_cut_off_is_resumed(tmp_path, monkeypatch):
    asked = []
    original = training.train

    def train(config, folder, **options):
        asked.append(options["resume"])
        return original(config, folder, **options)

    monkeypatch.setattr(paper, "train", train)
    run(tmp_path, "--shard", "0/4")
    (tmp_path / "work" / "digits" / "fgsm-seed0" / "result.json").unlink()
    run(tmp_path, "--shard", "0/4")
    assert asked == [False, True]


def test_the_table_has_mean_and_range_over_the_seeds():
    def cell(method, seed, pgd, collapsed):
        accuracy = {"clean": {"accuracy": 0.5}, "pgd-20": {"accuracy": pgd}}
        numbers = {"train_adv": 0.25, "collapsed": collapsed}
        return {"method": method, "seed": seed, "accuracy": accuracy, **numbers}

    runs = [cell("fgsm", 0, 0.01, True), cell("fgsm", 1, 0.03, False), cell("elle", 0, 0.2, False)]
    lines = paper.table({"runs": runs}).splitlines()
    assert lines[0] == "| method | train, own attack | test clean | test pgd-20 | collapsed |"
    assert lines[2] == "| fgsm | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 2.0 (1.0 to 3.0) | 1 of 2 |"
    assert lines[3].startswith("| elle | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 20.0 (20.0 to 20.0) | 0 of 1 |")
    assert len(lines) == 4
