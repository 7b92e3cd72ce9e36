"""benchmarks/studies/auto_lam.py: what its forms are, that a study goes on where it was, and its table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from benchmarks.studies import auto_lam
from benchmarks.studies.auto_lam_forms import FORMS, Form, measuring
from elle_fast import AdaptiveLambda, AutoLambda
from elle_fast.ops.elle_loss.validation import Linearity
from elle_fast.weighted_sum import weighted_loss
from tests.helpers import cross_entropy64, labels, random

B, C, RHO = 6, 4, 7.0


def batch(step):
    logits = random(4 * B, C, seed=step, dtype=torch.float64) * (0.1 if step < 5 else 3.0)
    alpha = torch.rand(B, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return logits, labels(B, C, seed=step), alpha


def by_hand(step):
    """ce, E_lin and the 2-norms of their gradients: the closed forms of the paper's section 3, in numpy."""
    logits, target, alpha = batch(step)
    z, y, a = logits.numpy(), np.eye(C)[target.numpy()], alpha.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    size = ((p - np.tile(y, (4, 1))) ** 2).sum(1)
    losses = cross_entropy64(logits, target.repeat(4)).reshape(4, B)
    r = losses[3] - (1 - a) * losses[1] - a * losses[2]
    d = size[3 * B :] + (1 - a) ** 2 * size[B : 2 * B] + a**2 * size[2 * B : 3 * B]
    g_ce, g_e = math.sqrt(size[:B].sum()) / B, 2 / B * math.sqrt((r**2 * d).sum())
    return losses[0].mean(), (r**2).mean(), g_ce, g_e


@pytest.mark.parametrize("name", [name for name in FORMS if name != "slope"])
def test_a_form_is_what_the_docstring_says(name):
    controller, expected = FORMS[name](RHO), 0.0
    history: list[float] = []
    logs: list[float] = []
    assert isinstance(controller, Form)
    for step in range(9):
        ce, e_lin, g_ce, g_e = by_hand(step)
        threshold = np.mean(history) + 2 * np.std(history) if history else 0.0
        detected = step >= 3 and e_lin > threshold
        if not detected:
            logs.append(math.log(g_ce / g_e if name == "gradient" else ce / e_lin))
        if name in ("gradient", "penalty"):
            ratio = math.exp(np.mean(logs))  # of fewer than 100 steps, all count alike
        else:
            gradients = name == "gradient-threshold"
            of_e_lin = (g_ce / g_e * math.sqrt(e_lin)) if gradients else ce
            ratio = 0.0 if not threshold else of_e_lin / (math.sqrt(threshold) if gradients else threshold)
        expected = RHO * ratio if detected else 0.99 * expected
        history.append(e_lin)
        logits, target, alpha = batch(step)
        loss, _, _ = measuring(logits, target, alpha, controller, Linearity(), "auto", then=weighted_loss)
        # lam is kept in float32, and so are the means of the forms.
        assert controller.lam.item() == pytest.approx(expected, rel=1e-5)
        assert loss.item() == pytest.approx(ce + expected * e_lin, rel=1e-5)
    assert expected > 0


def test_other_weights_are_not_looked_at(monkeypatch):
    logits, target, alpha = batch(0)
    for lam in (0.0, AdaptiveLambda(1.0), AutoLambda()):
        assert measuring(logits, target, alpha, lam, Linearity(), "auto", then=lambda *given: given[3]) is lam


def test_a_study_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    options = ["--smoke", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    assert auto_lam.main([*options, "--limit", "2", "--strong"]) == 0
    before = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(before) == ["tabular, fgsm, seed 0", "tabular, tuned, seed 0"]
    assert all(0 <= row["pgd-50-10"] <= row["clean"] for row in before.values())
    assert all(row.keys() >= {"machine", "commit", "seconds"} for row in before.values())
    assert auto_lam.main([*options, "--only", "tabular"]) == 0
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["smoke"]
    assert {"machine", "versions", "commit", "command", "about"} <= content.keys()
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()
    assert content["rows"].items() >= before.items()
    assert len(content["rows"]) == len(auto_lam.VARIANTS) + len(auto_lam.OTHERS)
    lams = {row["variant"]: row["lam"][1] for row in content["rows"].values()}
    assert lams.pop("fgsm") == 0
    assert all(lam > 0 for lam in lams.values())
    assert lams["tuned"] == 4_000
    assert len(set(lams.values())) == len(lams)
    capsys.readouterr()


def test_nothing_is_measured_twice_and_every_cell_is_there():
    names = [(cell.name, variant, seed) for cell, variant, seed in auto_lam.jobs(auto_lam.CELLS)]
    assert len(set(names)) == len(names)
    for cell in auto_lam.CELLS:
        assert {(cell.name, each, seed) for each in auto_lam.VARIANTS for seed in cell.seeds} <= set(names)
        assert {(cell.name, each, cell.seeds[0]) for each in auto_lam.OTHERS} <= set(names)


def test_the_table_counts_a_nan_as_0():
    def row(seed, **numbers):
        return {"cell": "digits", "variant": "tuned", "seed": seed, "lam": [100.0, 300.0 + seed], **numbers}

    rows = {
        "a": row(0, ended="stands", clean=0.9, fgsm=0.6, **{"pgd-20": 0.4, "pgd-50-10": 0.3}),
        "b": row(1, ended="nan"),
    }
    line = auto_lam.table(rows).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["digits", "tuned", "2", "1"]
    assert cells[4:8] == ["45.0 (0.0 to 90.0)", "30.0 (0.0 to 60.0)", "20.0 (0.0 to 40.0)", "30.0"]
    assert cells[8:] == ["100", "300"]
