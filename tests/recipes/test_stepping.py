"""Captured steps in a run: the same bits, whose options they refuse, and what is said where they are left out."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elle_fast.recipes import checkpoint, optimizers, stepping
from elle_fast.recipes import train as training
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import CHECKPOINT, train
from elle_fast.step.capture import CapturedStep
from tests.recipes.test_train import CONFIG, assert_same_run, dataset, quiet

SHORT = replace(CONFIG, epochs=2, validation=8, eval_attacks="clean")


@pytest.fixture
def calls(monkeypatch):
    """What a captured step was called with, by the number of rows."""
    found, original = [], CapturedStep.__call__

    def call(step, x, target):
        found.append(len(x))
        return original(step, x, target)

    monkeypatch.setattr(CapturedStep, "__call__", call)
    return found


@pytest.mark.parametrize("capture", [False, True])
def test_cudnn_chooses_its_algorithms_for_steps_alone(capture, monkeypatch, tmp_path):
    seen, forward = set(), torch.nn.Conv2d.forward

    def called(layer, x):
        seen.add((layer.training, torch.backends.cudnn.benchmark))
        return forward(layer, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", called)
    train(replace(SHORT, epochs=1, capture=capture), tmp_path, dataset=dataset(), console=quiet())
    assert seen == {(True, True), (False, False)}
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(
    "options, eager",
    [
        ({"triplet_fraction": 0.25, "skip_below": 0.01, "precision": "bf16"}, 1),
        ({"eps_warmup": 0.75, "optimizer": "adamw", "average": 0.9, "drop_last": False, "batch_size": 20}, 6),
        ({"method": "n-fgsm", "precision": "fp16"}, 1),
    ],
)
def test_captured_steps_have_the_same_bits(options, eager, calls, monkeypatch, tmp_path):
    """On the CPU, where they are the same steps; one in the first epoch is interrupted, and resumed without."""
    config, step = replace(SHORT, **options), training._Loop._step
    train(config, tmp_path / "eager", dataset=dataset(), console=quiet())
    assert not calls

    def interrupted(loop, x, y):
        if loop.run.step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, x, y)

    monkeypatch.setattr(training._Loop, "_step", interrupted)
    with pytest.raises(training.InterruptedRunError):
        train(replace(config, capture=True), tmp_path / "captured", dataset=dataset(), console=quiet())
    assert len(calls) == 12 - eager
    monkeypatch.setattr(training._Loop, "_step", step)
    rates = [group["lr"] for group in checkpoint.load(tmp_path / "captured" / CHECKPOINT)["optimizer"]["param_groups"]]
    assert all(type(rate) is float for rate in rates)
    train(config, tmp_path / "captured", resume=True, dataset=dataset(), console=quiet())
    assert_same_run(tmp_path / "eager", tmp_path / "captured")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"steps_per_batch": 2}, "steps_per_batch 2 takes further optimizer steps"),
        ({"momentum_cycle": 0.1}, "momentum_cycle 0.1 changes the momentum"),
        ({"clean_forward": True}, "clean_forward adds a forward pass"),
        ({"method": "pgi"}, ""),
        ({"method": "nuat"}, "counts its steps on the host"),
        ({"method": "n-fgsm+awp"}, "AWP"),
    ],
)
def test_what_cannot_be_captured_is_refused_if_asked_for_and_else_said_once(options, reason, monkeypatch, tmp_path):
    config = replace(SHORT, epochs=1, **options)
    with pytest.raises(ValueError, match=rf"^capture: expected a run whose steps can be captured, got .*{reason}"):
        train(replace(config, capture=True), tmp_path / "asked", dataset=dataset(), console=quiet())
    assert not (tmp_path / "asked").exists()
    run = Run(config.resolved(), dataset(), Path(), Ranks(timeout=1.0))
    assert run.remarks() == []
    found = stepping.in_the_way(config, run.criterion, 1)
    assert found is not None
    assert reason in found
    for capture, remark in ((None, f"steps are not captured as CUDA graphs: {found}"), (False, None)):
        asked, on = replace(config, capture=capture), torch.device("cuda")
        step = stepping.Step(asked, run.criterion, run.model, run.optimizer, run.meter, on, 1)
        assert step.remark == remark


def test_several_processes_are_in_the_way():
    run = Run(SHORT.resolved(), dataset(), Path(), Ranks(timeout=1.0))
    assert stepping.in_the_way(SHORT, run.criterion, 1) is None
    assert stepping.in_the_way(SHORT, run.criterion, 2) == "2 processes train one model"


def test_a_step_that_cannot_be_captured_after_all_goes_on_as_it_is(monkeypatch, tmp_path):
    def fails(*args, **options):
        raise RuntimeError("capture: expected a step without a wait for the device, got one")

    monkeypatch.setattr(stepping, "capture", fails)
    train(SHORT, tmp_path / "eager", dataset=dataset(), console=quiet())
    original = stepping.Step.__init__

    def on_cuda(step, *args):
        original(step, *args)
        step._to_capture = True

    monkeypatch.setattr(stepping.Step, "__init__", on_cuda)
    console = quiet()
    train(SHORT, tmp_path / "left", dataset=dataset(), console=console)
    said = "warning: steps are not captured as CUDA graphs: capture: expected a step without a wait for the device, got"
    assert console.file.getvalue().count(said) == 1
    assert_same_run(tmp_path / "eager", tmp_path / "left")
    with pytest.raises(RuntimeError, match="capture: expected a step without a wait"):
        train(replace(SHORT, capture=True), tmp_path / "asked", dataset=dataset(), console=quiet())


def test_rates_that_are_tensors_are_saved_as_numbers():
    model = torch.nn.Linear(2, 2)
    optimizer = optimizers.build("sgd", model, momentum=0.9, weight_decay=0.0, decay="all")
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    assert optimizers.saved(optimizer)["param_groups"][0]["lr"] == 0.25
    assert type(optimizers.saved(optimizer)["param_groups"][0]["lr"]) is float
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)
