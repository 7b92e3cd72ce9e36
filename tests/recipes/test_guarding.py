"""A run with a guard: the one without until an alarm; alarms in its log, its result and its checkpoint."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from elle_fast import data, presets
from elle_fast._core.seeds import derived_seed
from elle_fast.guard import guard as guarding
from elle_fast.recipes import checkpoint
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.guarding import guard_of
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
    assert "; back to step 1, and E_lin in the loss for a while" in said
    assert json.loads((tmp_path / "whole" / RESULT).read_text())["alarms"] == result["alarms"]
    alone, _, _ = run(replace(config, guard=False), tmp_path / "alone")
    assert not same(whole, alone)
    with monkeypatch.context() as patch:
        patch.setattr(guarding.CollapseGuard, "penalty", lambda *given: 0.0)
        unhelped, again, _ = run(config, tmp_path / "unhelped")
    assert again["alarms"][0] == first
    assert not same(unhelped, whole)
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


def test_the_guard_looks_at_what_the_run_trains(tmp_path, monkeypatch):
    given: list[Any] = []

    class Recorded(guarding.CollapseGuard):
        def __init__(self, *args, **options):
            given.append((args, options))
            super().__init__(*args, **options)

    monkeypatch.setattr("elle_fast.recipes.guarding.CollapseGuard", Recorded)
    config = replace(RUN, method="elle-a", precision="bf16", norm="l2", eps_warmup=2.0).resolved()
    own = Run(config, dataset(), tmp_path / CHECKPOINT, Ranks(1.0))
    (((model, optimizer), options),) = given
    assert model is own.model
    assert optimizer is own.optimizer
    lam = presets.weight("elle-a", config.data, eps=config.eps, model=config.model, image_size=config.image_size)
    x, y = options.pop("held_out")
    assert own.validation is not None
    ((images, labels),) = data.in_order(own.validation, len(own.validation))
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    del options["on_alarm"]
    assert options == {
        "eps": 0.1, "bounds": (0.0, 1.0), "norm": "l2", "also": [own.average, own.criterion], "lam": lam, "seed": 1,
    }  # fmt: skip
    assert own.guard is not None
    assert own.guard._elin.triplet_precision == "fp32"
    own.take_step(*next(own.upcoming(1)))
    assert own.guard.eps == own.course.eps(0) < config.eps
    # Several processes draw noise of their own.
    ranks: Any = SimpleNamespace(count=2, rank=1)
    guard_of(config, model, optimizer, None, None, own.criterion, ranks, [])
    assert given[-1][1]["seed"] == derived_seed(1, 2, 1)
    assert given[-1][1]["held_out"] is None


def poisoned(monkeypatch, steps):
    """Runs whose weights are NaN after some steps, and whose guard notices within five."""

    class Quick(guarding.CollapseGuard):
        def __init__(self, *given, **options):
            super().__init__(*given, **{**options, "margin": 2, "snapshot_every": 4, "every": 1, "threshold": 1.0})

    original = Run.take_step

    def take_step(self, x, y):
        original(self, x, y)
        if self.step in steps:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    monkeypatch.setattr("elle_fast.recipes.guarding.CollapseGuard", Quick)
    monkeypatch.setattr(Run, "take_step", take_step)


@pytest.mark.parametrize("at, ruined", [(5, True), (9, False)], ids=["over the end of an epoch", "within one"])
def test_weights_that_are_not_finite_are_left_to_the_guard(at, ruined, tmp_path, monkeypatch):
    poisoned(monkeypatch, [at])
    saved, result, _ = run(RUN, tmp_path / "run")  # a checkpoint of other than finite weights would be refused
    (alarm,) = result["alarms"]
    assert math.isnan(alarm["value"])
    assert at < alarm["step"] <= at + 5
    assert alarm["back_to"] is not None
    assert saved["step"] == 24
    epochs = saved["history"]["epochs"]
    assert [math.isnan(each["val_pgd"]) for each in epochs] == [ruined, False, False]
    assert [math.isnan(each["loss"]) for each in epochs] == [ruined, True, False]
    assert not any(math.isnan(found["accuracy"]) for found in result["models"]["best"]["accuracy"].values())


def test_a_run_that_stays_other_than_finite_ends(tmp_path, monkeypatch):
    poisoned(monkeypatch, range(5, 25))
    with pytest.raises(RuntimeError, match=r"^loss: expected finite numbers and weights, got .* at or before step 16;"):
        run(RUN, tmp_path / "run")


def test_a_captured_step_is_refused(tmp_path):
    message = r"^capture: expected a run whose steps can be captured, got one where the guard may add E_lin to the loss"
    with pytest.raises(ValueError, match=message):
        run(replace(RUN, capture=True), tmp_path / "run")
