"""AcceleratedLoss in the loop that Accelerate documents, against the plain one; accumulation, resume, two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from elle_fast.integrations.accelerate import AcceleratedLoss
from tests.integrations import cases
from tests.integrations.cases import ALARM, CALM, MEAN, STD, B, Noted, criterion, loader, net, plain, same, sgd, state


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    """An Accelerator's options are of the process."""
    yield
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


def begun(parts: int = 1, **options: Any) -> tuple[Any, ...]:
    """An accelerator, and a model, an optimiser and a criterion that it knows."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts, **options)
    model, optimizer = accelerator.prepare(*_pair())
    return accelerator, model, optimizer, AcceleratedLoss(accelerator, criterion())


def _pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    return model, sgd(model.parameters())


def run(started: tuple[Any, ...], batches: Any) -> list[Tensor]:
    accelerator, model, optimizer, loss_of = started
    noted = Noted(loss_of.criterion)
    for x, y in batches:
        with accelerator.accumulate(model), accelerator.autocast():
            accelerator.backward(loss_of(model, x, y))
            optimizer.step()
            optimizer.zero_grad()
    return noted.losses


@pytest.mark.parametrize(
    "parts, options, autocast",
    [(1, {}, None), (2, {}, None), (1, {"mixed_precision": "bf16"}, torch.bfloat16)],
    ids=["plain", "accumulated", "bf16"],
)
def test_the_losses_are_the_plain_loops(parts, options, autocast):
    started = begun(parts, **options)
    torch.manual_seed(1)
    losses = run(started, started[0].prepare(loader(4)))
    model, loss = net(), criterion()
    torch.manual_seed(1)
    assert same(losses, plain(model, loss, loader(4), parts=parts, autocast=autocast))
    assert same(state(model), state(started[1]))
    assert same(state(loss), state(started[3].criterion))


def test_a_resume_goes_on_to_the_bit(tmp_path):
    whole = begun()
    torch.manual_seed(1)
    batches = list(loader(4))
    run(whole, batches[:2])
    whole[0].save_state(str(tmp_path))
    rest = run(whole, batches[2:])
    _reset()
    resumed = begun()
    nn.init.zeros_(resumed[1][1].weight)
    resumed[0].load_state(str(tmp_path))
    assert int(resumed[3].criterion.controller.count) == 2
    assert same(run(resumed, batches[2:]), rest)
    assert same(state(resumed[1]), state(whole[1]))


def _reset() -> None:
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._reset_state()


@pytest.mark.parametrize("parts", [1, 2])
def test_without_an_alarm_the_losses_are_those_without_a_guard(parts):
    started = begun(parts)
    guard = started[3].watch(started[1], started[2], held_out=cases.held_out(), **CALM)
    torch.manual_seed(1)
    losses = run(started, started[0].prepare(loader(12)))
    model, loss = net(), criterion()
    torch.manual_seed(1)
    assert same(losses, plain(model, loss, loader(12), parts=parts))
    assert guard.alarms == []
    assert guard.state_dict()["step"] == 12 // parts
    assert same(state(model), state(started[1]))


@pytest.mark.parametrize("parts", [1, 2])
def test_after_an_alarm_it_is_the_plain_loop_with_a_guard(parts):
    started = begun(parts)
    guard = started[3].watch(started[1], started[2], **ALARM)
    torch.manual_seed(1)
    losses = run(started, started[0].prepare(loader(8 * parts)))
    model, loss = net(), criterion()
    torch.manual_seed(1)
    expected, by_hand = cases.guarded(model, loss, loader(8 * parts), parts=parts)
    assert [(alarm.step, alarm.back_to) for alarm in guard.alarms] == [(4, 1)]
    assert guard.alarms == by_hand.alarms
    assert same(losses, expected)
    assert same(state(model), state(started[1]))
    assert same(state(loss), state(started[3].criterion))


def test_the_guard_looks_in_float32_whatever_accelerate_casts_to():
    """It casts within the model's forward pass, where rounding would look like curvature."""
    found = []
    x, y = next(iter(loader(1)))
    for mixed in ("no", "bf16"):
        _reset()
        accelerator, model, optimizer, loss_of = begun(mixed_precision=mixed)
        before = model.forward
        guard = loss_of.watch(model, optimizer, held_out=cases.held_out(), every=1, probe_every=1)
        guard._rescue_until = 9
        with accelerator.autocast():
            torch.manual_seed(1)
            penalty = guard.penalty(x, y)
            guard.step(x, y)
        found.append((penalty.item(), [numbers for _, _, numbers in guard.state_dict()["sent"]]))
        assert model.forward == before
    assert found[0] == found[1]


def test_a_resume_with_a_guard_goes_on_to_the_bit(tmp_path):
    """From within the steps to which E_lin is added."""
    whole = begun()
    guard = whole[3].watch(whole[1], whole[2], **ALARM)
    torch.manual_seed(1)
    batches = list(loader(8))
    run(whole, batches[:5])
    whole[0].save_state(str(tmp_path))
    rest = run(whole, batches[5:])
    _reset()
    resumed = begun()
    again = resumed[3].watch(resumed[1], resumed[2], **ALARM)
    nn.init.zeros_(resumed[1][1].weight)
    resumed[0].load_state(str(tmp_path))
    assert again.alarms == guard.alarms
    assert again.rescuing
    assert same(run(resumed, batches[5:]), rest)
    assert same(state(resumed[1]), state(whole[1]))
    assert torch.equal(again.state_dict()["generator"], guard.state_dict()["generator"])


def test_validation_is_no_batch_of_the_guards():
    accelerator, model, optimizer, loss_of = begun()
    guard = loss_of.watch(model, optimizer, **CALM)
    (x, y), (other, _) = loader(2)
    seen: list[Tensor] = []
    guard.step = lambda *batch: seen.append(batch[0])
    with accelerator.accumulate(model):
        accelerator.backward(loss_of(model, x, y))
    with torch.no_grad():
        loss_of(model.eval(), other, y)
    optimizer.step()
    assert len(seen) == 1
    assert torch.equal(seen[0], x)


def test_what_cannot_be_guarded():
    accelerator, model, optimizer, loss_of = begun()
    with pytest.raises(TypeError, match=r"^optimizer: expected a torch.optim.Optimizer.* got None"):
        loss_of.watch(model, None)
    accelerator.state.distributed_type = DistributedType.FSDP
    with pytest.raises(ValueError, match=r"^accelerator: expected whole weights in each process.*FSDP"):
        loss_of.watch(model, optimizer)
    accelerator.state.distributed_type = DistributedType.NO
    loss_of.watch(model, optimizer)
    with pytest.raises(RuntimeError, match=r"^watch: expected one call"):
        loss_of.watch(model, optimizer)


def test_arguments_beside_x_reach_the_guard():
    _, model, optimizer, loss_of = begun()
    scaled = Scaled(model)
    guard = loss_of.watch(scaled, optimizer, **CALM)
    seen: list[Any] = []
    guard.step = lambda *batch: seen.append(batch)
    x, y = next(iter(loader(1)))
    loss_of(scaled, x, y, model_kwargs={"scale": 2.0}).backward()
    optimizer.step()
    assert [batch[2] for batch in seen] == [{"scale": 2.0}]


class Scaled(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, scale: float) -> Any:
        return self.model(x) * scale


def test_validation_between_the_parts_of_a_step_moves_nothing():
    accelerator, model, _, loss_of = begun(2)
    x, y = next(iter(loader(1)))
    with accelerator.accumulate(model):
        loss_of(model, x, y)
    count = int(loss_of.criterion.controller.count)
    with torch.no_grad():
        loss_of(model.eval(), x, y)
    model.train()
    with accelerator.accumulate(model):
        loss_of(model, x, y)
    assert int(loss_of.criterion.controller.count) == count == 1


def test_a_normalized_loader():
    seen: list[Tensor] = []
    loss = criterion(mean=MEAN, std=STD, bounds=(0.0, 1.0))
    loss.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    loss_of = AcceleratedLoss(Accelerator(cpu=True), loss, normalized=True)
    x, y = next(iter(loader(1)))
    loss_of(net(), (x - MEAN[0]) / STD[0], y)
    torch.testing.assert_close(seen[0], x, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    with pytest.raises(ValueError, match=r"^normalized: expected a criterion with"):
        AcceleratedLoss(Accelerator(cpu=True), criterion(), normalized=True)


def test_a_call_outside_of_accumulate_is_refused():
    accelerator, model, _, loss_of = begun(2)
    x, y = next(iter(loader(1)))
    with pytest.raises(RuntimeError, match=r"^accelerator: .*inside of accelerator.accumulate.*steps=2"):
        loss_of(model, x, y)
    with torch.no_grad():  # nothing is to be divided
        loss_of(model.eval(), x, y)
    with accelerator.accumulate(model.train()):
        loss_of(model, x, y)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: AcceleratedLoss(None, criterion()), r"^accelerator: expected an accelerate.Accelerator, got None"),
        (lambda: AcceleratedLoss(Accelerator(cpu=True), nn.CrossEntropyLoss()), r"^criterion: expected ELLELoss"),  # type: ignore[arg-type]
    ],
)
def test_what_is_neither(make, said):
    with pytest.raises(TypeError, match=said):
        make()


RANKS = r"""
import sys
from pathlib import Path
from tests.optional import import_torchvision
import_torchvision()
import torch
torch.set_num_threads(1)
from accelerate import debug_launcher
from tests.integrations import test_accelerate as here
debug_launcher(here.rank_step, (Path(sys.argv[1]),), num_processes=2)
"""


def smooth() -> nn.Module:
    """Without batch norm, whose statistics are each rank's own, and without dropout, whose masks are."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Tanh(), nn.Linear(16, cases.CLASSES))


def rank_step(folder: Path) -> None:
    """Two accumulated halves of a step, each this rank's part of a batch, and what comes of it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = smooth()
    wrapped, optimizer = accelerator.prepare(model, sgd(model.parameters()))
    loss_of = AcceleratedLoss(accelerator, criterion())
    part = B // accelerator.num_processes
    mine = slice(part * accelerator.process_index, part * (accelerator.process_index + 1))
    x, y = cases.data(2).tensors
    torch.manual_seed(1)
    for half in range(2):
        of_half = slice(half * B, (half + 1) * B)
        with accelerator.accumulate(wrapped):
            accelerator.backward(loss_of(wrapped, x[of_half][mine], y[of_half][mine]))
            optimizer.step()
            if not accelerator.sync_gradients:
                assert int(loss_of.criterion.state_dict()["controller.count"]) == 1
    found = {"weights": state(model), "state": state(loss_of.criterion)}
    torch.save(found, folder / f"{accelerator.num_processes}-{accelerator.process_index}.pt")


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", RANKS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    rank_step(tmp_path)
    first, second, alone = (torch.load(tmp_path / name) for name in ("2-0.pt", "2-1.pt", "1-0.pt"))
    for name in first:
        assert same(first[name], second[name])
    # E_lin of the ranks, and gradients, are averaged in another order: some roundings of sums of that size.
    for mine, one in zip(first["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(mine, one, rtol=0, atol=8 * torch.finfo(torch.float32).eps)
    for mine, one in zip(first["state"], alone["state"], strict=True):
        torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-12)
