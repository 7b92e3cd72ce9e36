"""The Guard callback in a real Trainer: against the plain loop with a guard, resumed, in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elle_fast.guard import CollapsedError
from elle_fast.integrations.lightning import ELLEModule, Guard
from tests.integrations import cases
from tests.integrations.cases import ALARM, CALM, EPS, MEAN, STD, B, criterion, loader, net, same, sgd, state
from tests.integrations.test_lightning import QUIET, Own, _Epochs, fitted, pytestmark, trainer

__all__ = ["pytestmark"]


def guarded(module: Any = None, batches: int = 8, guard: Guard | None = None, **options: Any) -> tuple[Any, ...]:
    """The module, its guard, and the criterion's losses."""
    guard = guard or Guard(**ALARM)
    callbacks = [guard, *options.pop("callbacks", [])]
    module, run, losses = fitted(criterion(), batches, module=module, callbacks=callbacks, **options)
    return module, guard, losses, run


@pytest.mark.parametrize("parts", [1, 2])
def test_without_an_alarm_the_losses_are_those_without_a_guard(parts):
    module, guard, losses, _ = guarded(
        guard=Guard(held_out=cases.held_out(), **CALM), batches=12, accumulate_grad_batches=parts
    )
    alone, _, expected = fitted(criterion(), 12, accumulate_grad_batches=parts)
    assert guard.alarms == []
    assert guard.state_dict()["step"] == 12 // parts
    assert same(losses, expected)
    assert same(state(module), state(alone))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("parts", [1, 2])
def test_after_an_alarm_it_is_the_plain_loop_with_a_guard(parts):
    module, guard, losses, _ = guarded(batches=8 * parts, accumulate_grad_batches=parts)
    model, loss = net(), criterion()
    torch.manual_seed(1)
    expected, plain = cases.guarded(model, loss, loader(8 * parts), parts=parts)
    (alarm,) = guard.alarms
    assert (alarm.step, alarm.signal, alarm.back_to) == (4, "linearity", 1)
    assert guard.alarms == plain.alarms
    assert same(losses, expected)
    assert same(state(module.model), state(model))
    assert same(state(module.criterion), state(loss))
    assert all(value.isfinite() for value in losses)
    unguarded = fitted(criterion(), 8 * parts, accumulate_grad_batches=parts)[2]
    assert same(losses[: 4 * parts], unguarded[: 4 * parts])
    assert not any(map(torch.equal, losses[4 * parts :], unguarded[4 * parts :]))


def test_an_alarm_brings_weights_moments_averages_and_lam_back():
    first = fitted(criterion(), 1)[0]
    module, guard, _, run = guarded(batches=4)
    (kept,) = guard.state_dict()["snapshots"]["kept"]
    assert same(state(module.model), state(first.model))
    assert same(state(module.criterion), state(first.criterion))
    assert int(module.criterion.controller.count) == 1
    (optimizer,) = run.optimizers
    for weight, moments in zip(module.parameters(), kept["optimizer"], strict=True):
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], moments["momentum_buffer"])
    assert len(kept["also"]) == 1
    average = EMAWeightAveraging(decay=0.5, use_buffers=False)
    guard = guarded(batches=4, callbacks=[average])[1]
    (kept,) = guard.state_dict()["snapshots"]["kept"]
    # That of step 1 had not begun, so Lightning's update after the alarm is the average's first.
    assert int(kept["also"][1]["n_averaged"]) == 0
    assert int(average._average_model.n_averaged) == 1


def test_a_resume_goes_on_to_the_bit(tmp_path):
    """From the step of the alarm, whose E_lin is added in the steps that follow."""
    path = tmp_path / "run.ckpt"

    def run(seed: int, ckpt: Path | None, guard: Guard) -> Any:
        module = ELLEModule(net(seed), criterion(), sgd)
        fit = trainer(max_epochs=2, callbacks=[_Epochs(path), guard])
        fit.fit(module, loader(4), ckpt_path=ckpt, weights_only=True)
        return module

    whole, again = Guard(**ALARM), Guard(**ALARM)
    one = run(0, None, whole)
    kept = path.read_bytes()
    other = run(9, path, again)
    assert len(whole.alarms) == 1
    assert whole.alarms == again.alarms
    assert same(state(one), state(other))
    assert again.state_dict()["step"] == 8
    assert torch.equal(whole.state_dict()["generator"], again.state_dict()["generator"])
    # From a checkpoint without a guard it begins anew.
    path.write_bytes(kept)
    without = torch.load(path, weights_only=True)
    del without["callbacks"][next(name for name in without["callbacks"] if name.startswith("Guard"))]
    torch.save(without, path)
    anew = Guard(**ALARM)
    run(9, path, anew)
    assert anew.state_dict()["step"] == 4


class Hand(Own):
    """A user's own module, whose step returns a dictionary, or nothing, and whose batches are dictionaries."""

    def parts(self, batch: Any) -> Any:
        return batch["x"], batch["y"]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            return None
        return {"loss": nn.functional.cross_entropy(self.net(batch["x"]), batch["y"]), "other": 3}


def dictionaries(batches: int) -> DataLoader[Any]:
    rows = [{"x": x, "y": y} for x, y in zip(*cases.data(batches).tensors, strict=True)]
    return DataLoader(rows, B)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_module_of_ones_own():
    guard, module = Guard(eps=0.02, lam=5.0, **ALARM), Hand()
    run = trainer(callbacks=[guard])
    run.fit(module, dictionaries(9))
    assert guard.state_dict()["step"] == 8  # of nine batches one was left out
    assert [alarm.step for alarm in guard.alarms] == [4]
    assert guard.state_dict()["eps"] == 0.02
    module, guard = Own(), Guard(**ALARM)  # whose criterion has an eps
    trainer(callbacks=[guard]).fit(module, loader(2))
    assert guard.state_dict()["eps"] == EPS


def test_a_normalized_loader():
    """The guard sees pixels, and the model what the loader hands out."""
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    x, y = cases.data(4).tensors
    batches = DataLoader(TensorDataset((x - mean) / std, y), B, generator=torch.Generator())
    given = {"mean": MEAN, "std": STD, "bounds": (0.0, 1.0)}
    module = ELLEModule(net(), criterion(**given), sgd, normalized=True)
    guard = Guard(held_out=cases.held_out(), probe_every=1, **ALARM)
    seen: list[Tensor] = []
    module.model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    trainer(callbacks=[guard]).fit(module, batches)
    assert len(guard.alarms) == 1
    assert min(points.min() for points in seen) >= -MEAN[0] / STD[0] - 1e-5
    assert max(points.max() for points in seen) <= (1 - MEAN[0]) / STD[0] + 1e-5
    assert seen[-1].min() < -0.5  # the held-out samples too: as pixels they would not be below 0


def test_the_guard_stops_a_training_and_leaves_the_module_as_it_was():
    module = ELLEModule(net(), criterion(), sgd)
    guard = Guard(action="stop", **ALARM)
    with pytest.raises(CollapsedError, match=r"^the training collapsed"):
        guarded(module, guard=guard)
    assert "training_step" not in vars(module)
    assert same(state(module.model), state(fitted(criterion(), 1)[0].model))


class ByHand(Own):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def test_an_optimisation_by_hand_cannot_be_guarded():
    with pytest.raises(ValueError, match=r"^automatic_optimization: expected True with a Guard, got False"):
        trainer(callbacks=[Guard(**ALARM)]).fit(ByHand(), loader(2))
    with pytest.raises(TypeError, match=r"^parts: expected None or a callable, got 3"):
        Guard(parts=3, **ALARM)  # type: ignore[arg-type]


def test_weights_that_are_sharded_cannot_be_guarded():
    run = trainer()
    run._accelerator_connector.strategy = lightning.pytorch.strategies.ModelParallelStrategy()
    with pytest.raises(ValueError, match=r"^strategy: expected one device or ddp.* got ModelParallelStrategy"):
        Guard(**ALARM).setup(run, Own(), "fit")
    Guard(**ALARM).setup(run, Own(), "validate")  # nothing is trained


def test_several_optimisers_cannot_be_guarded():
    run, module = trainer(), Own()
    run.strategy.optimizers = [sgd(module.net[1:3].parameters()), sgd(module.net[3:].parameters())]
    with pytest.raises(ValueError, match=r"^configure_optimizers: expected one optimiser with a Guard, got 2"):
        Guard(**ALARM).on_train_start(run, module)


RANKS = r"""
import sys
from pathlib import Path
import torch
from tests.optional import import_torchvision
import_torchvision()
from tests.integrations import test_lightning_guard as here
torch.set_num_threads(1)
here.rank_run(Path(sys.argv[1]))
"""


class Kept(lightning.Callback):  # type: ignore[misc]
    """What each process has seen and made, in a file."""

    def __init__(self, guard: Guard, folder: Path) -> None:
        self.guard, self.folder = guard, folder

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        found = [[repr(alarm) for alarm in self.guard.alarms], state(pl_module.model)]
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def rank_run(folder: Path) -> None:
    """A training in two processes whose guard raises an alarm and adds E_lin; the wrapper looks for unused weights."""
    guard = Guard(held_out=cases.held_out(), **ALARM)
    torch.manual_seed(1)
    options = {**QUIET, "devices": 2, "strategy": "ddp_fork_find_unused_parameters_true", "max_steps": 8}
    run = lightning.Trainer(**options, callbacks=[guard, Kept(guard, folder)])
    run.fit(ELLEModule(net(), criterion(), sgd), loader(16))


def test_two_processes_decide_alike(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (alarms, weights), (others, other_weights) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert alarms == others
    assert len(alarms) == 1
    assert "back_to=1" in alarms[0]
    named = dict(zip(net().state_dict(), zip(weights, other_weights, strict=True), strict=True))
    trained = [pair for name, pair in named.items() if "running" not in name]  # batch norm's are each rank's own
    assert all(torch.equal(*pair) for pair in trained)
