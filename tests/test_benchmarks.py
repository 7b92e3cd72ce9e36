import json
from dataclasses import replace

import pytest

from benchmarks import paper
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig

TINY = paper.Setting(
    config=TrainConfig(width=2, eps=0.1, epochs=1, limit=64, test_limit=16, watch=16, batch_size=32),
    variants={"fgsm": {"method": "fgsm"}, "light": {"method": "elle-a", "skip_below": 1.0}},
    seeds=(0,),
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


def test_a_seed_and_an_eps_are_gone_through_before_the_next():
    cells = replace(TINY, seeds=(0, 1), eps=(0.1, 0.2)).cells("root")
    assert [(name, config.method, config.eps, config.seed) for name, config in cells[:5]] == [
        ("fgsm", "fgsm", 0.1, 0),
        ("light", "elle-a", 0.1, 0),
        ("fgsm", "fgsm", 0.2, 0),
        ("light", "elle-a", 0.2, 0),
        ("fgsm", "fgsm", 0.1, 1),
    ]
    assert len(cells) == 8
    assert {config.root for _, config in cells} == {"root"}


def test_shards_share_the_cells_and_each_writes_what_is_there(tmp_path, capsys, monkeypatch):
    out = run(tmp_path, "--shard", "0/2")
    assert "1 of 2 cells are still to be done" in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 1
    assert [cell["variant"] for cell in summary["runs"]] == ["fgsm"]

    # While this shard reads its cells, the other one does its own, and writes the file.
    read, others = paper._read, [["--shard", "1/2"]]

    def slow(folder):
        if others:
            run(tmp_path, *others.pop())
            assert json.loads(out.read_text())["missing"] == 0
        return read(folder)

    monkeypatch.setattr(paper, "_read", slow)
    run(tmp_path, "--shard", "0/2")
    assert not others
    assert "still to be done" not in capsys.readouterr().out
    summary = json.loads(out.read_text())
    assert summary["missing"] == 0
    assert [(cell["variant"], cell["method"], cell["seed"], cell["full_share"]) for cell in summary["runs"]] == [
        ("fgsm", "fgsm", 0, None),
        ("light", "elle-a", 0, 0.0),
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
    run(tmp_path, "--shard", "0/2")
    (tmp_path / "work" / "digits" / "fgsm-eps25.5-seed0" / "result.json").unlink()
    run(tmp_path, "--shard", "0/2")
    assert asked == [False, True]


def test_an_eps_of_its_own_and_its_picture(tmp_path, monkeypatch):
    fgsm = {"fgsm": TINY.variants["fgsm"]}
    monkeypatch.setitem(paper.SETTINGS, "digits", replace(TINY, eps=(8 / 255, 16 / 255), variants=fgsm))
    summary = json.loads(run(tmp_path).read_text())
    assert [round(255 * cell["config"]["eps"]) for cell in summary["runs"]] == [8, 16]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["out-eps16.png", "out-eps8.png"]


def test_the_table_has_mean_and_range_over_the_seeds():
    def cell(variant, seed, pgd, collapsed, seconds, share=None):
        accuracy = {"clean": {"accuracy": 0.5}, "pgd-20": {"accuracy": pgd}}
        numbers = {"train_adv": 0.25, "collapsed": collapsed, "training_seconds": seconds, "full_share": share}
        return {"variant": variant, "seed": seed, "accuracy": accuracy, "config": {"eps": 8 / 255}, **numbers}

    runs = [cell("fgsm", 0, 0.01, True, 10.0), cell("fgsm", 1, 0.03, False, 20.0), cell("x", 0, 0.2, False, 25.0, 0.4)]
    lines = paper.table({"setting": "digits", "runs": runs}).splitlines()
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
    # No time without a run of the setting's first variant at the same eps and with the same seed.
    runs = [cell("x", 0, 0.2, False, 25.0), cell("light", 1, 0.2, False, 50.0), cell("fgsm", 1, 0.01, True, 20.0)]
    lines = paper.table({"setting": "digits", "runs": runs}).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["-", "2.50x", "1.00x"]


def test_variants_chosen_by_name(tmp_path, capsys):
    summary = json.loads(run(tmp_path, "--variants", "light").read_text())
    assert [cell["variant"] for cell in summary["runs"]] == ["light"]
    assert summary["missing"] == 1
    with pytest.raises(ValueError, match=r"variants: expected one of 'fgsm', 'light', got 'dark'"):
        run(tmp_path, "--variants", "light,dark")
