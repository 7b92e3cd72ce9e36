"""benchmarks/studies/precision.py and precision_ways.py on a tiny model, and against numbers computed by hand."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness.program import ROOT
from benchmarks.studies import precision
from benchmarks.studies.precision_ways import LastLayerExact, ProductsOfDifferences, Way, residuals
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig

CONFIG = TrainConfig(
    method="elle-a", width=2, eps=0.1, epochs=2, limit=80, validation=16, test_limit=16, batch_size=32, augment=False
)


def test_precision_of_a_trained_model(tmp_path, capsys):
    folder = tmp_path / "run"
    training.train(CONFIG, folder)
    out = tmp_path / "precision.json"
    arguments = ["--run", str(folder), "--out", str(out)]
    assert precision.main([*arguments, "--batch", "16", "--batches", "4"]) == 0
    content = json.loads(out.read_text())
    whole = {row["precision"]: row for row in content["rows"] if row["samples"] == 16}
    part = {row["precision"]: row for row in content["rows"] if row["samples"] == 2}
    assert [*whole] == [*part]
    assert next(iter(whole)) == "fp32"
    floors = {name: row["floor"] for name, row in whole.items()}
    # The noise grows with the rounding error of the numbers, 2^-24, 2^-11 and 2^-8, squared.
    assert 0 < 1e3 * floors["fp32"] < floors["bf16, triplets fp16"] < floors["bf16"] / 4
    assert floors["bf16, last layer fp32"] < floors["bf16"]
    assert floors["bf16, products of differences"] < floors["bf16"] / 4
    # Exact triplets in a bf16 step are those of an fp32 step, bit for bit.
    assert whole["bf16, triplets fp32"] == {**whole["fp32"], "precision": "bf16, triplets fp32"}
    for rows in (whole, part):
        e_lin = rows["fp32"]["e_lin"]
        assert rows["fp32"]["measured"] == pytest.approx(e_lin, rel=1e-3)
        assert rows["fp32"]["own_threshold"] > 0
        assert {name for name, row in rows.items() if row["e_lin"] != e_lin} == {
            "bf16, twice the ball",
            "bf16, two triplets",
        }
        assert rows["bf16"]["low_alpha"]["0"] == 0 < rows["bf16"]["low_alpha"]["0.015625"]
        assert rows["fp32"]["rounding_spread"] < 1e-2 * rows["fp32"]["spread"]
    assert 0 < whole["fp32"]["seen"] < 16 * whole["fp32"]["e_lin"]
    assert whole["bf16, twice the ball"]["e_lin"] > 4 * whole["bf16"]["e_lin"]
    assert "bf16, two roundings" in whole
    assert str(tmp_path) not in out.read_text()
    command = "python -m benchmarks.studies.precision --run=run --out=precision.json --batches=4 --batch=16"
    assert {row["command"] for row in content["rows"]} == {command}
    assert {(row["batches"], row["batch"], row["folder"], row["device"]) for row in content["rows"]} == {
        (4, 16, "run", "cpu")
    }
    assert "E_lin on 2 of 16 samples a batch, 4 batches" in capsys.readouterr().out

    # What is there is not measured again.
    assert precision.main([*arguments, "--batch", "16", "--batches", "4"]) == 0
    assert json.loads(out.read_text()) == content
    out.unlink()
    with pytest.raises(ValueError, match=r"batches: expected at most 8, as there are images for, got 9"):
        precision.main([*arguments, "--batch", "10", "--batches", "9"])


def test_a_row_is_of_its_sizes_folder_and_command(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "run", tmp_path / "precision.json"
    training.train(CONFIG, folder)
    shutil.copytree(folder, tmp_path / "other")
    row = {"precision": "fp32", "threshold": 2e-6, "alarms": 0.0, "alarms_after_rise": 0.0, "samples": 4}
    row |= dict.fromkeys(precision._COLUMNS, 1e-6)
    monkeypatch.setattr(precision, "measure", lambda *args, **options: [row])
    calls = [("run", 4, 4), ("run", 4, 4), ("run", 5, 4), ("run", 4, 8), ("other", 4, 4), ("run", 5, 4)]
    for name, batches, batch in calls:
        sizes = [f"--batches={batches}", f"--batch={batch}"]
        assert precision.main([f"--run={tmp_path / name}", f"--out={out}", *sizes]) == 0
    content = json.loads(out.read_text())
    rows = content["rows"]
    assert [(row["folder"], row["batches"], row["batch"]) for row in rows] == [*dict.fromkeys(calls)]
    for row, (name, batches, batch) in zip(rows, dict.fromkeys(calls), strict=True):
        assert row["command"].endswith(f"--run={name} --out=precision.json --batches={batches} --batch={batch}")
    # No command stands for all rows, and each has a table of its own.
    assert "command" not in content
    assert content["about"].startswith("For trained models")
    assert capsys.readouterr().out.split("of 8 samples a batch")[-1].count("E_lin on 4 of 4 samples a batch") == 1


def test_the_committed_file_has_the_rows_that_the_program_would_look_for():
    content = json.loads((ROOT / "benchmarks" / "results" / "precision.json").read_text())
    for row in content["rows"]:
        assert row["batch"] == row["samples"] * (1 if row["samples"] > 16 else 8)
        assert f"--run={row['folder']} " in row["command"]
        assert ("--batches=8" in row["command"]) is (row["batches"] == 8)
        assert row["device"] == "cpu"
    assert "command" not in content
    # What is said elsewhere of the floor beside a healthy model's E_lin.
    shares = [
        row["floor"] / row["e_lin"]
        for row in content["rows"]
        if (row["precision"], row["samples"]) == ("bf16", 128) and not row["run"].startswith("fgsm")
    ]
    for name in ("docs/guides/precision.md", "elle_fast/linearity.py", "elle_fast/recipes/config.py"):
        said = f"{min(shares):.1f} to {max(shares):.0f} times a healthy model's"
        assert said in " ".join((ROOT / name).read_text().split()), name


@pytest.mark.parametrize("option", [("--batches", "1"), ("--batch", "0")])
def test_bad_options(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--run", str(tmp_path), "--out", str(tmp_path / "x.json"), *option])
    assert "expected --batches >= 2 and --batch >= 1, got" in capsys.readouterr().err


def test_rounding_by_hand():
    exact = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 0.0])]]
    measured = [[torch.tensor([1.5, 2.0])], [torch.tensor([2.0, 0.0])]]
    found = precision.rounding(measured, exact)
    # E_lin is 2.5 and 4.5, measured as 3.125 and 2; the errors' mean squares are 0.125 and 0.5.
    expected = {"e_lin": 3.5, "measured": 2.5625, "floor": 0.3125, "spread": 1.0, "rounding_spread": 1.5625}
    assert found == pytest.approx(expected)
    # The product of two passes whose errors are opposite is below the square.
    twice = [[torch.tensor([1.5, 2.0]), torch.tensor([0.5, 2.0])], [torch.tensor([3.0, 0.0])] * 2]
    assert precision.rounding(twice, exact)["floor"] == pytest.approx(-0.0625)


def test_detection_by_hand():
    at_rest = [1.0, 2.0, 3.0, 4.0, 20.0]  # mean 6, the median 3
    threshold = 6 + 2 * statistics.pstdev(at_rest)
    rises = [0.5, 10.0, 30.0]
    risen = [[each + rise for each in at_rest] for rise in rises]
    found = precision.detection(at_rest, risen, rises)
    assert found["threshold"] == pytest.approx(threshold)
    assert found["seen"] == pytest.approx(threshold - 3)
    assert (found["alarms"], found["alarms_after_rise"]) == (0.0, 0.2)
    assert precision.detection(at_rest, risen[:2], rises[:2])["seen"] is None
    # Their standard deviation is 1e7 rises of 1e-7 for each unit, and falls with the root of the number of batches.
    std = statistics.pstdev(at_rest)
    row = {"e_lin": 6.0, "measured": 6.0, "threshold": 6.0 + 2 * std}
    assert precision.steps(row, 6.0) == pytest.approx((2 * std * 1e7) ** 2)
    assert precision.steps(row, 3.0) == pytest.approx((std * 1e7) ** 2)
    # A constant that is added to all values, such as the mean of the noise, changes nothing but the threshold.
    higher = precision.detection([7 + each for each in at_rest], [[7 + each for each in row] for row in risen], rises)
    assert higher == pytest.approx({**found, "threshold": threshold + 7})


def test_residuals_by_hand():
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    y, alpha = torch.tensor([0, 3, 4]), torch.tensor([0.25, 0.5])
    losses = F.cross_entropy(logits.double(), torch.tensor([0, 3] * 6), reduction="none")
    expected = [losses[4 + i] - (1 - alpha[i]) * losses[i] - alpha[i] * losses[2 + i] for i in range(2)]
    assert residuals(logits[:6], y, alpha).tolist() == pytest.approx([each.item() for each in expected])
    both = residuals(logits, y, alpha.repeat(2), triplets=2)
    second = residuals(logits[6:], y, alpha)
    torch.testing.assert_close(both, torch.cat([residuals(logits[:6], y, alpha), second]))


def test_products_of_differences_share_their_rounding():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(72, 5))
    a, b = torch.rand(2, 4, 3, 12, 12)
    b = a + 0.05 * (b - 0.5)
    alpha = torch.rand(4)
    points = torch.cat([a, b, torch.lerp(a, b, alpha.view(-1, 1, 1, 1))])

    def off_the_line(logits):
        l_a, l_b, l_c = logits.float().chunk(3)
        return (l_c - torch.lerp(l_a, l_b, alpha.view(-1, 1))).abs().max()

    with torch.no_grad():
        exact = linear(points)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = linear(points)
        with ProductsOfDifferences(alpha):
            shared = linear(points)
    # A linear model has no residual.
    assert off_the_line(shared) < 1e-2 * off_the_line(rounded)
    # They are the model's logits, and their differences are right to the precision of bf16.
    torch.testing.assert_close(shared, exact, atol=0.02, rtol=0.02)
    assert (rounded.float() - exact).abs().max() > 1e-4
    torch.testing.assert_close(shared[4:8] - shared[:4], exact[4:8] - exact[:4], atol=1e-3, rtol=0.05)


def test_last_layer_exact():
    torch.manual_seed(0)
    x, last = torch.rand(6, 3, 6, 6), nn.Linear(64, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), last)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model[:2](x)
        with LastLayerExact():
            found = model(x)
    assert hidden.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, F.linear(hidden.float(), last.weight, last.bias))


def test_two_passes_round_differently():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).train()
    points, y = torch.rand(24, 3, 6, 6), torch.arange(8) % 5
    first, second = Way(torch.bfloat16, twice=True).residuals(model, points, y, torch.rand(8))
    assert not torch.equal(first, second)
    exact, shifted = Way(twice=True).residuals(model, points, y, torch.full((8,), 0.5))
    # Batch norm takes the shift out.
    torch.testing.assert_close(exact, shifted, atol=1e-5, rtol=1e-4)
