"""A run with a guard: the one without until an alarm; alarms in its log, its result and its checkpoint."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from elle_fast.guard import guard as guarding
from elle_fast.recipes import checkpoint
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, RESULT, InterruptedRunError, train
from tests.recipes.test_train import CONFIG, dataset

RUN = replace(CONFIG, method="fgsm", guard=True, average=0.9)


def run(config, folder, **options):
    said = io.StringIO()
    result = train(config, folder, dataset=dataset(), console=Console(file=said, width=1000), **options)
    return checkpoint.load(folder / CHECKPOINT), result, said.getvalue()


def weights(saved):
    return {**saved["model"], **{f"averaged {name}": value for name, value in saved["average"].items()}}


def same(left, right):
    one, other = weights(left), weights(right)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_without_an_alarm_the_run_is_that_without_a_guard(tmp_path):
    watched, result, said = run(RUN, tmp_path / "watched")
    alone, plain, _ = run(replace(RUN, guard=False), tmp_path / "alone")
    assert result["alarms"] == []
    assert "alarms" not in plain
    assert same(watched, alone)
    assert "guard:" not in said
    assert watched["guard"]["step"] == watched["step"]
    assert alone["guard"] == {}


def eager(monkeypatch):
    """A guard that sees a collapse in everything, soon."""

    class Eager(guarding.CollapseGuard):
        def __init__(self, *given, **options):
            super().__init__(*given, **{**options, "threshold": 0.0, "margin": 3, "snapshot_every": 4, "every": 2})

    monkeypatch.setattr("elle_fast.recipes.guarding.CollapseGuard", Eager)


def test_an_alarm_is_in_log_result_and_checkpoint_and_a_resume_goes_on(tmp_path, monkeypatch):
    eager(monkeypatch)
    config = replace(RUN, checkpoint_every=1)
    whole, result, said = run(config, tmp_path / "whole")
    (first, *_) = result["alarms"]
    assert first["signal"] == "linearity"
    assert first["back_to"] == 1
    assert f"warning: guard: linearity is {first['value']:.3g}, beyond 0, in step {first['step']}" in said
    assert "the run goes back to step 1 and adds E_lin for a while" in said
    assert json.loads((tmp_path / "whole" / RESULT).read_text())["alarms"] == result["alarms"]
    alone, _, _ = run(replace(config, guard=False), tmp_path / "alone")
    assert not same(whole, alone)
    for stop_after in (first["step"] - 1, first["step"] + 1):
        taken, original = [0], Run.take_step

        def stopping(self, x, y, *, stop_after=stop_after, taken=taken, original=original):
            if taken[0] == stop_after:
                raise InterruptedRunError
            taken[0] += 1
            original(self, x, y)

        folder = tmp_path / str(stop_after)
        with monkeypatch.context() as patch:
            patch.setattr(Run, "take_step", stopping)
            with pytest.raises(InterruptedRunError):
                run(config, folder)
        resumed, again, _ = run(config, folder, resume=True)
        assert again["alarms"] == result["alarms"]
        assert same(resumed, whole)


def test_a_captured_step_is_refused(tmp_path):
    message = r"^capture: expected a run whose steps can be captured, got one where the guard may add E_lin to the loss"
    with pytest.raises(ValueError, match=message):
        run(replace(RUN, capture=True), tmp_path / "run")
