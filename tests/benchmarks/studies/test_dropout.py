"""benchmarks/studies/dropout.py, on MNIST-shaped noise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from benchmarks.studies import dropout
from elle_fast import LocalLinearity
from tests.helpers import labels, random


def test_smoke(tmp_path, capsys):
    draw = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 80), ("test", 20)):
        arrays[f"x_{split}"] = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"y_{split}"] = draw.permutation(np.arange(n, dtype=np.uint8) % 10)
    np.savez(tmp_path / "noise.npz", **arrays)
    out = tmp_path / "out.json"
    sizes = ["--limit=64", "--test-limit=20", "--epochs=1", "--seeds=1"]
    assert dropout.main([f"--root={tmp_path / 'noise.npz'}", f"--out={out}", *sizes]) == 0
    content = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "settings"} <= content.keys()
    assert str(tmp_path) not in out.read_text()
    assert [(run["method"], run["masks"]) for run in content["runs"]] == [
        ("fgsm", "common"), ("elle-a", "common"), ("elle-a", "apart")
    ]  # fmt: skip
    none, *_, common, apart = (row["e_lin"] for row in content["at_initialisation"])
    assert apart > 10 * max(none, common)
    assert "| elle-a | apart | 0.1 |" in capsys.readouterr().out


def test_masks_are_apart_inside_only():
    model, x, y = torch.nn.Dropout(0.5), random(4, 3, seed=1), labels(4, 3)
    found = []
    for apart in (False, True, False):
        with dropout.masks_apart() if apart else torch.enable_grad():
            found.append(LocalLinearity(0.0)(model, x, y).item())
    assert found[0] < 1e-10 < found[1]
    assert found[2] < 1e-10
