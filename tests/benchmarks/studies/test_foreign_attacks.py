"""benchmarks/studies/foreign_attacks.py, at tiny size."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.studies import foreign_attacks
from tests.evaluation.cases import Linear, around, batched, needs_autoattack, needs_foolbox


@needs_foolbox
@needs_autoattack
def test_smoke(tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = ["--data=digits", "--limit=128", "--samples=4", "--epochs=1", "--width=2", "--rounds=1"]
    assert foreign_attacks.main([f"--out={out}", "--attacks=pgd-20", *sizes]) == 0
    content = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "settings", "clock"} <= content.keys()
    row = content["attacks"]["pgd-20"]
    assert row["samples"] == 4
    assert row["ratio"] == pytest.approx(row["seconds"]["elle_fast"][0] / row["seconds"]["foolbox"][0], rel=1e-2)
    assert "| pgd-20 | foolbox | 4 |" in capsys.readouterr().out


@needs_foolbox
def test_foolbox_finds_what_an_exact_formula_says():
    model = Linear(3, 25)
    x, y = around(model, n=40, size=5)
    model.eval()
    expected = model.radius(x, y) > foreign_attacks.EPS
    clear = ((model.radius(x, y) - foreign_attacks.EPS).abs() > 0.01) & (x - 0.5).abs().flatten(1).amax(1).lt(0.3)
    for attack in ("pgd-20", "pgd-20-2"):
        for side in (foreign_attacks.ours, foreign_attacks.by_foolbox):
            assert torch.equal(side(model, batched(x, y, 16), attack)[clear], expected[clear])


@needs_autoattack
def test_a_direct_call_of_autoattack_gives_which_samples_withstand(monkeypatch):
    import pyautoattack

    model = Linear(10, 25)
    x, y = around(model, n=20, size=5)

    def run(self, images, labels, batch_size):
        return torch.where(labels.view(-1, 1, 1, 1) % 2 == 0, images, 1 - images), None

    monkeypatch.setattr(pyautoattack.AutoAttack, "run_standard_evaluation", run)
    with torch.no_grad():
        points = torch.where(y.view(-1, 1, 1, 1) % 2 == 0, x, 1 - x)
        expected = model(points).argmax(1) == y
    assert torch.equal(foreign_attacks.by_pyautoattack(model, batched(x, y, 7), "autoattack"), expected)


def test_the_sides_are_compared_after_a_warm_up():
    calls = []

    def side(name, robust):
        calls.append(name)
        return torch.tensor(robust)

    sides = {"a": lambda: side("a", [True, True, False, True]), "b": lambda: side("b", [True, False, False, True])}
    found = foreign_attacks.compare(sides, 2, "cpu")
    assert calls == ["a", "b"] * 3
    assert found["accuracy"] == {"a": 0.75, "b": 0.5}
    assert found["differing_samples"] == 1
    assert found["sampling_noise"] == pytest.approx(1.96 * ((0.1875 + 0.25) / 4) ** 0.5)
    assert [len(each) for each in found["seconds"].values()] == [2, 2]
