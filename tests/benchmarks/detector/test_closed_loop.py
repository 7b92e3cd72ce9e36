"""benchmarks/detector/closed_loop.py with tiny runs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch

from benchmarks.detector import alarms
from benchmarks.detector import closed_loop as loop
from benchmarks.harness.rows import alone_in
from benchmarks.paper import cells
from elle_fast import data
from elle_fast.evaluation import evaluate
from elle_fast.presets import FAST
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.evaluate import evaluate_checkpoint
from elle_fast.recipes.train import InterruptedRunError, train

TINY = replace(loop.CONFIG, data="digits", limit=336, validation=16, test_limit=48, width=2, batch_size=32, epochs=4)
TINY = replace(TINY, eval_attacks="clean,pgd-2", augment=False, learning_rate=0.05, precision="fp32")
VARIANTS = {
    "n-fgsm": {"method": "n-fgsm"},
    # A lam of its own, above whose hundredth few steps are; the rule is the paper's.
    "n-fgsm+paper": {"method": "n-fgsm+elle-a", "lam": 3.1, **FAST, "skip_below": 0.9, "clamp": "attack"},
    "fgsm+constant": {"method": "elle", "lam": 7.0},
}
JOBS = [(name, 16, seed) for seed in (2, 1) for name in VARIANTS]


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CONFIG", TINY)
    monkeypatch.setattr(loop, "VARIANTS", VARIANTS)
    monkeypatch.setattr(loop, "STRONG", cells.Strong("pgd-4-2,pgd-3", 40, masking=False))
    monkeypatch.setattr(loop, "jobs", lambda: JOBS)
    monkeypatch.setattr(TrainConfig, "read_data", lambda config: data.load("digits", limit=336, test_limit=48))
    return [f"--root={tmp_path / 'unused'}", f"--work={tmp_path / 'runs'}", f"--out={tmp_path / 'out.json'}"]


def read(arguments):
    return json.loads(Path(arguments[-1].partition("=")[2]).read_text())["rows"]


def folder(arguments, name):
    return Path(arguments[1].partition("=")[2]) / name


def algorithm_1(e_lin, lam_max):
    """lam in each step, and the steps with a detection, from all values before (paper, Algorithm 1, lines 9 to 11)."""
    lam, lams, found = 0.0, [], []
    for step, value in enumerate(e_lin):
        seen = np.array(e_lin[:step])
        detected = step >= 3 and value > seen.mean() + 2 * seen.std()
        lam = lam_max if detected else 0.99 * lam
        lams.append(lam)
        found += [step + 1] if detected else []
    return lams, found


def test_a_row_against_numbers_found_in_another_way(arguments, monkeypatch, capsys):
    monkeypatch.setattr(alarms, "APART", 16)
    assert loop.main([*arguments, "--only=n-fgsm+paper-eps16-seed2,n-fgsm-eps16-seed2"]) == 0
    rows = read(arguments)
    assert list(rows) == ["n-fgsm-eps16-seed2", "n-fgsm+paper-eps16-seed2"]
    alone, row = rows.values()
    saved = checkpoint.load(folder(arguments, "n-fgsm+paper-eps16-seed2") / "checkpoint.pt")
    steps = saved["history"]["steps"]
    assert [each["step"] for each in steps] == list(range(1, 41))
    lams, detections = algorithm_1([each["e_lin"] for each in steps], 3.1)
    first, second, third = detections
    assert second - first > 16 >= third - second  # so the third is of the second alarm
    assert (row["alarms"], row["detections"]) == ([first, second], 3)
    assert row["mean_lam"] == pytest.approx(np.mean(lams), rel=1e-6)
    # A step is light if lam was at most 0.9 * lam_max before it.
    full = np.mean([lam > 0.9 * 3.1 for lam in [0.0, *lams[:-1]]])
    assert 0 < full < 1
    assert row["full_share"] == full
    # By hand: 2 for the attack, 3 for the step at x_adv, and 3 points of an eighth of the batch, at 3 each or at 1.
    assert row["units"] == pytest.approx(5 + full * 9 / 8 + (1 - full) * 3 / 8)
    assert (alone["units"], alone["full_share"], alone["mean_lam"]) == (5, None, None)
    assert "alarms" not in alone
    model, _, _ = checkpoint.load_model(folder(arguments, "n-fgsm+paper-eps16-seed2") / "checkpoint.pt")
    test = data.load("digits", limit=336, test_limit=48).test
    weak = evaluate(model, data.in_order(test), "clean,pgd-2", eps=16 / 255)
    strong = evaluate(model, data.in_order(test.subset(40)), "pgd-4-2,pgd-3", eps=16 / 255)
    assert row["accuracy"] == {name: each["accuracy"] for name, each in {**weak, **strong}.items()}
    about = [row[name] for name in ("variant", "base", "rule", "eps", "seed")]
    assert about == ["n-fgsm+paper", "n-fgsm", "paper", 16, 2]
    assert row["val_pgd"] == pytest.approx([each["val_pgd"] for each in saved["history"]["epochs"]], abs=5e-5)
    assert not saved["history"]["epochs"][-1]["collapsed"]
    assert row["ended"] == "stands"
    said = capsys.readouterr().out
    assert "| 16/255 | n-fgsm+paper | 2 |" in said
    assert "| false alarms of a healthy N-FGSM training | 2 | - | at most 1 | not measured |" in said


def test_elle_with_a_constant_lam_has_a_lam_and_no_alarms(arguments):
    assert loop.main([*arguments, "--only=fgsm+constant-eps16-seed1"]) == 0
    (row,) = read(arguments).values()
    assert (row["mean_lam"], row["full_share"], row["units"]) == (7, None, 14)
    assert "alarms" not in row


def test_what_is_done_is_not_run_again_and_a_pattern_chooses(arguments, capsys):
    chosen = [*arguments, "--only=n-fgsm*-seed1"]
    assert loop.main(chosen) == 0
    first = Path(arguments[-1].partition("=")[2]).read_bytes()
    begun = [line for line in capsys.readouterr().err.splitlines() if line.endswith("seed1") and ":" not in line]
    assert begun == ["n-fgsm-eps16-seed1", "n-fgsm+paper-eps16-seed1"]
    # On another machine there are no folders.
    runs = folder(arguments, "")
    runs.rename(runs.with_name("elsewhere"))
    assert loop.main(chosen) == 0
    assert not runs.exists()
    assert Path(arguments[-1].partition("=")[2]).read_bytes() == first
    with pytest.raises(SystemExit, match="2"):
        loop.main([*arguments, "--only=n-fgsm"])
    assert "only: expected names of cells or patterns that fit some, got 'n-fgsm'" in capsys.readouterr().err


def test_a_row_of_another_setting_is_refused(arguments, monkeypatch):
    chosen = [*arguments, "--only=n-fgsm-eps16-seed2"]
    assert loop.main(chosen) == 0
    monkeypatch.setattr(loop, "CONFIG", replace(TINY, epochs=5))
    with pytest.raises(ValueError, match=r"epochs = 4 \(now: 5\)"):
        loop.main(chosen)


def test_a_run_that_is_stopped_anywhere_goes_on_and_ends_with_the_same_row(arguments, monkeypatch, capsys):
    chosen = "--only=n-fgsm+paper-eps16-seed2"
    assert loop.main([*arguments, chosen]) == 0
    (whole,) = read(arguments).values()
    again = [each.replace("runs", "again").replace("out.json", "again.json") for each in arguments]

    def stopping(config, folder, **options):
        calls = iter(range(100))

        def measure(*_):
            if next(calls) == 1:
                raise InterruptedRunError("stopped after step 20 of 40")
            return {}

        return train(config, folder, **{**options, "measure": measure})

    monkeypatch.setattr(cells, "train", stopping)
    assert loop.main([*again, chosen]) == 130
    assert "stopped after step 20" in capsys.readouterr().err
    assert not Path(again[-1].partition("=")[2]).exists()
    monkeypatch.setattr(cells, "train", train)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.paper.cells.evaluate_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        loop.main([*again, chosen])
    (half,) = read(again).values()
    assert list(half["accuracy"]) == ["clean", "pgd-2"]
    monkeypatch.setattr("benchmarks.paper.cells.evaluate_checkpoint", evaluate_checkpoint)
    monkeypatch.setattr(cells, "train", stopped)  # is not called
    assert loop.main([*again, chosen]) == 0
    (found,) = read(again).values()
    assert {**found, "seconds": 0} == {**whole, "seconds": 0}


def test_a_run_that_ends_in_nan_is_a_row_and_not_run_again(arguments, monkeypatch, capsys):
    monkeypatch.setattr(loop, "VARIANTS", {**VARIANTS, "n-fgsm": {"method": "n-fgsm", "learning_rate": 1e20}})
    chosen = [*arguments, "--only=n-fgsm-eps16-seed2"]
    assert loop.main(chosen) == 0
    (row,) = read(arguments).values()
    assert row["ended"] == "nan"
    assert row["error"].startswith("loss: expected finite numbers")
    assert "root" not in row["config"]
    capsys.readouterr()
    assert loop.main(chosen) == 0
    said = capsys.readouterr()
    assert "n-fgsm-eps16" not in said.err
    assert "| 16/255 | n-fgsm | 2 | - |" in said.out


def test_a_cell_that_another_process_is_at_is_left_to_it(arguments, capsys):
    chosen = [*arguments, "--only=n-fgsm-eps16-seed*"]
    busy = folder(arguments, "n-fgsm-eps16-seed2")
    busy.mkdir(parents=True)
    with alone_in(busy):
        assert loop.main(chosen) == 0
        assert "n-fgsm-eps16-seed2: another process is at it" in capsys.readouterr().err
        assert list(read(arguments)) == ["n-fgsm-eps16-seed1"]
        assert list(busy.iterdir()) == []
    assert loop.main(chosen) == 0
    assert list(read(arguments)) == ["n-fgsm-eps16-seed1", "n-fgsm-eps16-seed2"]


def test_processes_share_the_cells_between_them(arguments, monkeypatch):
    trained, both = [], Barrier(2)

    def fast(cell, dataset):
        trained.append(cell.folder.name)
        if len(trained) <= 2:
            both.wait(30)  # each is at a cell while the other one is at another
        return False

    monkeypatch.setattr(cells.Cell, "train", fast)
    monkeypatch.setattr(cells.Cell, "failure", lambda cell: None)
    row = {"ended": "nan", "rule": None, "versions": {"elle_fast": "0.1.0"}}

    def row_of(cell):
        about = {"variant": cell.name, "base": cell.name, "seed": cell.config.seed, "eps": 16}
        return {**row, **about, "config": {"eps": cell.config.eps}}

    monkeypatch.setattr(loop, "row_of", row_of)
    monkeypatch.setattr(cells.Cell, "kept", lambda cell, row: True)
    # The locks are of open files, and tell threads apart as they do processes.
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(loop.main, [arguments] * 2)] == [0, 0]
    assert sorted(trained) == sorted(f"{name}-eps16-seed{seed}" for name, _, seed in JOBS)
    assert read(arguments).keys() == set(trained)
    assert torch.get_num_threads() == 1


def test_alarms_are_detections_not_within_twenty_steps_of_the_last_alarm():
    lam = np.zeros(100)
    lam[[0, 20, 40, 61, 99]] = 4_000.0
    assert loop.alarms(lam.tolist(), 4_000.0) == (5, [1, 41, 62, 100])
    # lam is a float32; and a decay ends in a number that 0.99 no longer makes smaller, which is no detection.
    highest = np.float32(0.3)
    decayed = [highest]
    for _ in range(11_000):
        decayed.append(np.float32(0.99) * decayed[-1])
    assert decayed[-1] == decayed[-2] > 0
    assert loop.alarms([float(each) for each in decayed], 0.3) == (1, [1])
    assert loop.alarms([], 1.0) == (0, [])


@pytest.mark.parametrize(
    "verdict,ended",
    [({"collapsed": True}, "collapsed"), ({"never_robust": True}, "never robust"), ({}, "stands")],
    ids=["collapsed", "never", "stands"],
)
def test_a_training_ends_as_the_command_line_says(verdict, ended, arguments, monkeypatch):
    name = "n-fgsm-eps16-seed1"
    assert loop.main([*arguments, f"--only={name}"]) == 0
    cell = loop.cell_of(*JOBS[3], folder(arguments, ""), None)
    found = {**cell.read(), "collapsed": False, "never_robust": False, **verdict}
    monkeypatch.setattr(cells.Cell, "read", lambda _: found)
    assert loop.row_of(cell)["ended"] == ended


def test_the_order_of_worth():
    jobs = loop.jobs()
    assert len(set(jobs)) == len(jobs)
    names = ["n-fgsm", "n-fgsm+relative", "fgsm+relative", "fgsm+paper", "n-fgsm+paper"]
    assert jobs[:15] == [(name, 16, seed) for seed in (0, 1, 2) for name in names]
    bases, rules = ("fgsm", "n-fgsm", "rs-fgsm"), ("", "+paper", "+relative")
    every = {f"{base}{rule}" for base in bases for rule in rules} | {"fgsm+constant"}
    for seed in (0, 1):
        for eps in (8, 16, 26):
            assert {name for name, *of in jobs if of == [eps, seed]} == every
    assert all(name.startswith("rs-fgsm") is (i >= len(jobs) - 18) for i, (name, *_) in enumerate(jobs))


def test_the_cells_are_runs_of_the_command_line():
    for job in loop.jobs():
        cell = loop.cell_of(*job, Path("work"), None)
        config = cell.config.resolved()
        assert cell.folder == Path("work") / f"{job[0]}-eps{job[1]}-seed{job[2]}"
        assert (config.epochs, config.limit, config.augment, config.validation) == (30, None, True, 1_024)
        assert (config.model, config.width, config.test_limit, config.log_every) == ("preact", 16, 1_000, 1)
        base, _, rule = job[0].partition("+")
        fast = (config.skip_below, config.triplet_fraction) == (0.01, 0.125)
        assert fast is (rule in loop.RULES)
        if fast:
            assert (config.rule, config.lam) == (rule, 4_000)
        # The points trained on are those of the base.
        alone = replace(loop.CONFIG, method=base).resolved().clamp
        assert config.clamp == ("attack" if alone == "all" and rule else alone)
