"""benchmarks/studies/precision.py on a tiny model."""

from __future__ import annotations

import json

import pytest

from benchmarks.studies import precision
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig

CONFIG = TrainConfig(method="elle-a", width=2, eps=0.1, epochs=2, limit=80, validation=16, test_limit=16, batch_size=32)


def test_precision_of_a_trained_model(tmp_path, capsys):
    folder = tmp_path / "run"
    training.train(CONFIG, folder)
    out = tmp_path / "precision.json"
    arguments = ["--run", str(folder), "--out", str(out)]
    assert precision.main([*arguments, "--batch", "8", "--batches", "2"]) == 0
    content = json.loads(out.read_text())
    rows = {row["precision"]: row for row in content["rows"]}
    assert next(iter(rows)) == "float32"
    assert len({row["e_lin"] for row in rows.values()}) == 1
    # The noise grows with the rounding error of the numbers, 2^-24, 2^-11 and 2^-8, squared.
    floors = [rows[name]["floor"] for name in ("float32", "float16 autocast", "bfloat16 autocast")]
    assert 0 < 1e3 * floors[0] < floors[1] < floors[2] / 4
    assert rows["float32"]["measured"] == pytest.approx(rows["float32"]["e_lin"], rel=0.01)
    # What the rule sees varies with the batch by far more than rounding to float32 does.
    assert all(row["unseen_below"] > 0 < row["floor_unseen_below"] for row in rows.values())
    assert rows["float32"]["unseen_below"] > 1e3 * rows["float32"]["floor_unseen_below"]
    assert {row["batches"] for row in rows.values()} == {2}
    assert "bfloat16 autocast" in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()
    assert content["command"] == (
        "python -m benchmarks.studies.precision --run=run --out=precision.json --batches=2 --batch=8"
    )

    with pytest.raises(ValueError, match=r"batch: expected at most half of the 16 test images, .* got 9"):
        precision.main([*arguments, "--batch", "9"])


@pytest.mark.parametrize("option", [("--batches", "1"), ("--batch", "0")])
def test_bad_options(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--run", str(tmp_path), "--out", str(tmp_path / "x.json"), *option])
    assert "expected --batches >= 2 and --batch >= 1, got" in capsys.readouterr().err
