"""``--lam auto`` on the command line, in a file, and in a run that is stopped and resumed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

import pytest

from elle_fast import AutoLambda
from elle_fast.recipes import checkpoint, cli
from elle_fast.recipes import train as training
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.train import CHECKPOINT
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet, rows


def test_the_command_line_and_a_file_take_it(tmp_path):
    run = cli.read_options("train", ["--lam", "auto"]).run
    assert run == TrainConfig(lam="auto")
    assert run.resolved().lam == "auto"
    file = tmp_path / "run.yaml"
    file.write_text(run.to_yaml())
    assert TrainConfig.from_yaml(file) == run
    assert cli.read_options("train", ["--config", str(file), "--lam", "3"]).run.lam == 3.0


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^lam: expected a number >= 0 or 'auto', got 'Auto'$"):
        TrainConfig(lam="Auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lam"):
        cli.read_options("train", ["--lam", "Auto"])
    with pytest.raises(ValueError, match=r"^lam: method 'elle' .*'elle-a' takes it$"):
        TrainConfig(method="elle", lam="auto").resolved()


def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(monkeypatch, tmp_path):
    config, original, taken, stop = replace(CONFIG, lam="auto", eps=0.3, seed=3), training._Loop._step, 0, 0

    def step(loop: Any, *args: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        assert isinstance(loop.run.criterion.controller, AutoLambda)
        return original(loop, *args)

    monkeypatch.setattr(training._Loop, "_step", step)
    training.train(config, tmp_path / "whole", dataset=dataset(), console=quiet())
    lams = [float(row["lam"]) for row in rows(tmp_path / "whole" / "steps.csv")]
    # It is stopped before a detection, whose weight then follows from the history that the checkpoint had.
    assert (max(lams[:7]), max(lams) > 0) == (0, True)
    taken, stop = 0, 7
    with pytest.raises(training.InterruptedRunError):
        training.train(config, tmp_path / "resumed", dataset=dataset(), console=quiet())
    assert checkpoint.load(tmp_path / "resumed" / CHECKPOINT)["step"] == 7
    stop = 0
    training.train(config, tmp_path / "resumed", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")


def test_the_history_begins_anew_when_eps_is_full(monkeypatch, tmp_path):
    """E_lin of a small eps would ask for a weight that is far too large."""
    config, original = replace(CONFIG, lam="auto", eps=0.3, eps_warmup=1.0, epochs=3), training._Loop._step
    counts, radii = [], []

    def step(loop: Any, *args: Any) -> Any:
        numbers = original(loop, *args)
        counts.append(int(loop.run.criterion.controller.count))
        radii.append(loop.run.criterion.eps)
        return numbers

    monkeypatch.setattr(training._Loop, "_step", step)
    training.train(config, tmp_path, dataset=dataset(), console=quiet())
    warm, steps = sum(eps < 0.3 for eps in radii), len(radii)
    assert 0 < warm < steps
    assert counts == [*range(1, warm + 1), *range(1, steps - warm + 1)]
