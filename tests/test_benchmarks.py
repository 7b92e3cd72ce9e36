import json
from dataclasses import replace

import pytest

from benchmarks import paper, precision
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig

TINY = paper.Setting(
    config=TrainConfig(width=2, eps=0.1, epochs=1, limit=64, test_limit=16, watch=16, batch_size=32),
    variants={"fgsm": {"method": "fgsm"}, "light": {"method": "elle-a", "skip_below": 1.0}},
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


def test_shards_share_the_cells_and_each_writes_what_is_there(tmp_path, capsys, monkeypatch):
    out = run(tmp_path, "--shard", "0/2")
    assert "2 of 4 cells are still to be done" in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 2
    assert [(cell["variant"], cell["seed"]) for cell in summary["runs"]] == [("fgsm", 0), ("fgsm", 1)]
    run(tmp_path, "--shard", "1/2")
    assert "still to be done" not in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 0
    assert [(cell["variant"], cell["method"], cell["seed"], cell["full_share"]) for cell in summary["runs"]] == [
        ("fgsm", "fgsm", 0, None),
        ("light", "elle-a", 0, 0.0),
        ("fgsm", "fgsm", 1, None),
        ("light", "elle-a", 1, 0.0),
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
    (tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json").unlink()
    run(tmp_path, "--shard", "0/4")
    assert asked == [False, True]


def test_an_eps_of_its_own_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(paper.SETTINGS, "digits", replace(TINY, eps=(8 / 255, 16 / 255), seeds=(0,)))
    out = run(tmp_path)
    summary = json.loads(out.read_text())
    assert [(cell["variant"], round(255 * cell["config"]["eps"])) for cell in summary["runs"]] == [
        ("fgsm", 8),
        ("light", 8),
        ("fgsm", 16),
        ("light", 16),
    ]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-eps16.png", "out-eps8.png"]


def test_the_table_has_mean_and_range_over_the_seeds():
    def cell(variant, seed, pgd, collapsed, seconds, share=None):
        accuracy = {"clean": {"accuracy": 0.5}, "pgd-20": {"accuracy": pgd}}
        numbers = {"train_adv": 0.25, "collapsed": collapsed, "training_seconds": seconds, "full_share": share}
        return {"variant": variant, "seed": seed, "accuracy": accuracy, "config": {"eps": 8 / 255}, **numbers}

    runs = [cell("fgsm", 0, 0.01, True, 10.0), cell("fgsm", 1, 0.03, False, 20.0), cell("x", 0, 0.2, False, 25.0, 0.4)]
    lines = paper.table({"runs": runs}).splitlines()
    assert lines[0] == (
        "| eps | variant | train, own attack | test clean | test pgd-20 | collapsed | full steps | time |"
    )
    assert lines[2] == (
        "| 8/255 | fgsm | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 2.0 (1.0 to 3.0) | 1 of 2 | - | 1.00x |"
    )
    assert lines[3] == (
        "| 8/255 | x | 25.0 (25.0 to 25.0) | 50.0 (50.0 to 50.0) | 20.0 (20.0 to 20.0) | 0 of 1 | 40 % | 2.50x |"
    )
    assert len(lines) == 4


def test_precision_of_a_trained_model(tmp_path, capsys):
    folder = tmp_path / "run"
    training.train(replace(TINY.config, method="elle-a", epochs=2), folder)
    out = tmp_path / "precision.json"
    assert precision.main(["--run", str(folder), "--out", str(out), "--batch", "8", "--batches", "2"]) == 0
    rows = {row["precision"]: row for row in json.loads(out.read_text())["rows"]}
    assert next(iter(rows)) == "float32"
    assert len({row["e_lin"] for row in rows.values()}) == 1
    # The noise grows with the rounding error of the numbers, 2^-24, 2^-11 and 2^-8, squared.
    floors = [rows[name]["floor"] for name in ("float32", "float16 autocast", "bfloat16 autocast")]
    assert 0 < 1e3 * floors[0] < floors[1] < floors[2] / 4
    assert rows["float32"]["measured"] == pytest.approx(rows["float32"]["e_lin"], rel=0.01)
    assert "bfloat16 autocast" in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()
