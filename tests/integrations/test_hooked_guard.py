"""What the adapters share of a guard: which steps it sees, what it takes from a criterion, when it takes up a state."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, AutoLambda, ELLELoss, LocalLinearity, methods
from elle_fast.guard import Alarm, CollapsedError
from elle_fast.guard.probe import Probe
from elle_fast.integrations.hooked_guard import Guarding, defaults_of
from elle_fast.methods.awp import AWP
from elle_fast.methods.compose import PlusAdvLC
from tests.helpers import built
from tests.integrations.cases import ALARM, EPS, MEAN, STD, criterion, held_out, loader, net, sgd

BATCHES = list(loader(8))


def started(loss: Any = None, **options: Any) -> tuple[Guarding, nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = sgd(model.parameters())
    guarding = Guarding({"eps": EPS, **options})
    guarding.start(model, optimizer, loss)
    return guarding, model, optimizer


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def steps(guarding: Guarding) -> int:
    found: int = guarding.state_dict()["step"]
    return found


def test_a_step_of_the_optimiser_is_one_of_the_guard():
    guarding, model, optimizer = started()
    moved(model, optimizer)  # of no batch
    assert steps(guarding) == 0
    for x, y in BATCHES[:3]:  # accumulated
        guarding.added(torch.zeros(()), x, y)
    moved(model, optimizer)
    assert steps(guarding) == 1
    moved(model, optimizer)
    assert steps(guarding) == 1
    guarding.stop()
    loss = torch.zeros(())
    assert guarding.added(loss, *BATCHES[0]) is loss
    moved(model, optimizer)
    assert steps(guarding) == 1


def test_what_a_scaler_skips_is_no_step():
    guarding, model, optimizer = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for value, count in ((torch.inf, 0), (1.0, 1)):
        guarding.added(torch.zeros(()), *BATCHES[0])
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, value)
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
        assert steps(guarding) == count


def test_the_optimiser_inside_of_a_wrapper_is_watched():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = net()
    optimizer = sgd(model.parameters())
    guarding = Guarding({"eps": EPS})
    guarding.start(model, Wrapper(optimizer))
    guarding.added(torch.zeros(()), *BATCHES[0])
    moved(model, optimizer)
    assert steps(guarding) == 1


class Unhooked(torch.optim.SGD):
    """As timm's Lookahead, which makes nothing that torch's class makes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


def test_an_optimiser_whose_steps_are_not_seen_is_refused():
    model = net()
    for optimizer, got in ((Unhooked(sgd(model.parameters())), "Unhooked"), (None, "None"), (model, "Sequential")):
        with pytest.raises(TypeError, match=rf"^optimizer: expected a torch.optim.Optimizer .* got {got}"):
            Guarding({"eps": EPS}).start(model, optimizer)


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"thresold": 0.1}, TypeError, r"^CollapseGuard: expected options among .*, got thresold"),
        ({"threshold": 2.0}, ValueError, r"^threshold: expected"),
        ({"held_out": 3}, TypeError, r"^held_out: expected x and y"),
        ({"action": "panic"}, ValueError, r"^action: expected"),
        ({"also": [3]}, TypeError, r"^also: expected objects with state_dict"),
        ({"on_alarm": 3}, TypeError, r"^on_alarm: expected"),
        ({"model": net}, TypeError, r"^model: expected none, as the adapter knows it"),
        ({"optimizer": net}, TypeError, r"^optimizer: expected none, as the adapter knows it"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_are_checked_at_once(options, error, said):
    with pytest.raises(error, match=said):
        Guarding(options)


def test_a_radius_is_needed():
    model = net()
    with pytest.raises(TypeError, match=r"^eps: expected the radius of the ball.*no criterion"):
        Guarding({}).start(model, sgd(model.parameters()))


def test_the_radius_follows_the_criterion():
    """As in a warm-up, unless it was given."""
    for options, expected in (({}, 0.01), ({"eps": 0.02}, 0.02)):
        loss = criterion()
        model = net()
        guarding = Guarding(options)
        guard = guarding.start(model, sgd(model.parameters()), loss)
        loss.eps = 0.01
        guarding.added(torch.zeros(()), *BATCHES[0])
        assert guard.eps == expected


def test_a_criterion_goes_back_with_the_weights():
    """Unless it remembers each sample."""
    for loss, known in ((criterion(), True), (built("pgi", eps=EPS), False)):
        guarding, model, optimizer = started(loss)
        guarding.added(torch.zeros(()), *BATCHES[0])
        moved(model, optimizer)
        (kept,) = guarding.state_dict()["snapshots"]["kept"]
        assert len(kept["also"]) == known


def test_what_a_guard_takes_from_a_criterion():
    pick, losses = (lambda output: output), (lambda output, target: output.sum(1))
    loss = ELLELoss(
        EPS, 10.0, bounds=(0.0, 1.0), mean=MEAN, std=STD, norm="l2", logits=pick, loss_fn=losses,
        triplet_precision="fp32",
    )  # fmt: skip
    assert defaults_of(loss) == {
        "norm": "l2", "mean": MEAN, "std": STD, "logits": pick, "loss_fn": losses, "triplet_precision": "fp32",
        "bounds": (0.0, 1.0), "lam": 10.0,
    }  # fmt: skip
    assert defaults_of(ELLELoss(EPS, AdaptiveLambda(7.0)))["lam"] == 7.0
    for weightless in (ELLELoss(EPS, AutoLambda()), ELLELoss(EPS, 0.0)):
        assert "lam" not in defaults_of(weightless)
    # Of another E_lin the weight is another, and a precision that nobody chose is the guard's own choice.
    others: list[dict[str, Any]] = [{"penalty": "abs"}, {"of": "logits"}, {"points": "five-point"}]
    for other in others:
        assert "lam" not in defaults_of(ELLELoss(EPS, 10.0, **other))
    assert "triplet_precision" not in defaults_of(ELLELoss(EPS, 10.0))
    assert defaults_of(ELLELoss(EPS, bounds=(0.0, 1.0), clamp="attack"))["bounds"] == (0.0, 1.0)
    assert defaults_of(methods.build("n-fgsm", eps=EPS, bounds=(0.0, 0.5))) == {"bounds": (0.0, 0.5)}


def test_a_criterion_around_another_has_that_ones():
    """AWP and AdvLC attack and weigh as what they are around."""
    inner: dict[str, Any] = {"mean": MEAN, "std": STD, "bounds": (0.0, 1.0), "norm": "l2"}
    for lam in (10.0, AdaptiveLambda(7.0)):
        expected = defaults_of(ELLELoss(EPS, lam, **inner))
        assert expected["mean"] == MEAN
        assert "lam" in expected
        assert defaults_of(AWP(ELLELoss(EPS, lam, **inner))) == expected
        assert defaults_of(PlusAdvLC(ELLELoss(EPS, lam, **inner), 1.0)) == expected
    around = AWP(methods.build("n-fgsm", eps=EPS, bounds=(0.0, 0.5)))
    assert defaults_of(around) == {"bounds": (0.0, 0.5)}


@pytest.mark.parametrize("bounds", [None, "any"])
def test_a_criterion_without_bounds_has_a_guard_that_clamps_nothing_and_warns_of_nothing(bounds):
    loss = ELLELoss(EPS, 10.0, bounds=bounds)
    model, (x, y) = net(), BATCHES[0]
    far = x * 6 - 3
    guard = Guarding({"held_out": (far, y)}).start(model, sgd(model.parameters()), loss, **defaults_of(loss))
    torch.manual_seed(0)
    guard.step(far, y)  # a warning would be an error
    assert defaults_of(loss)["bounds"] == "any"
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for dtype in (torch.float32, torch.bfloat16):  # none of whose numbers is as large as float32's largest
        model.to(dtype)
        seen.clear()
        guard = Guarding({"held_out": (far, y), "every": 1, "probe_every": 1}).start(
            model, sgd(model.parameters()), loss, **defaults_of(loss)
        )
        guard.step(far.to(dtype), y)
        assert {points.dtype for points in seen} == {dtype}
        assert seen[0].amin() < -2.5
        assert seen[-1].amax() > 2.5


def test_a_state_waits_for_its_guard():
    one, model, optimizer = started()
    for x, y in BATCHES[:2]:
        one.added(torch.zeros(()), x, y)
        moved(model, optimizer)
    state = one.state_dict()
    late = Guarding({"eps": EPS})
    assert late.state_dict() == {}
    late.load_state_dict({})  # of a checkpoint without a guard
    late.load_state_dict(state)
    assert late.state_dict() is state
    late.start(model, optimizer)
    assert steps(late) == 2
    late.load_state_dict({**state, "step": 7})
    assert steps(late) == 7
    late.stop()
    assert steps(late) == 7
    assert late.alarms == []


@pytest.mark.parametrize("device, dtype", [("meta", torch.float32), ("cpu", torch.float64)])
def test_held_out_samples_go_to_the_device_and_dtype_of_the_batches(device, dtype):
    """As with Lightning's precision="64-true"."""
    seen = []

    class Shown(nn.Module):
        def forward(self, x: Tensor, own: Tensor, shared: Tensor) -> Tensor:
            seen.append((x.device.type, x.dtype, own.device.type, shared.device.type))
            return x.flatten(1)[:, :3] + own + shared

    (x, y), given = held_out(), {"own": torch.zeros(12, 1), "shared": torch.zeros(1)}
    probe = Probe((x, y, given), LocalLinearity(EPS), None)
    probe.withstood(Shown(), torch.zeros(1, device=device, dtype=dtype))
    assert set(seen) == {(device, dtype, device, device)}
    assert probe.target.device.type == device


def test_what_goes_back_with_the_weights():
    """The criterion, what the adapter knows, and what a user has named."""
    model, loss = net(), criterion()
    known, named = (torch.optim.swa_utils.AveragedModel(model) for _ in range(2))
    guarding = Guarding({"also": [named]})
    guard = guarding.start(model, sgd(model.parameters()), loss, also=(known,))
    assert guard._snapshots._also == (loss, known, named)


def test_a_second_start_ends_the_first():
    guarding, model, optimizer = started()
    first = guarding.guard
    assert first is not None
    guarding.start(model, optimizer)
    guarding.added(torch.zeros(()), *BATCHES[0])
    moved(model, optimizer)
    assert steps(guarding) == 1
    assert first.state_dict()["step"] == 0
    assert len(optimizer._optimizer_step_post_hooks) == 1


def alarmed(**options: Any) -> tuple[Guarding, list[Tensor]]:
    guarding, model, optimizer = started(**{**ALARM, **options})
    found = []
    for x, y in BATCHES:
        zero = torch.zeros(())
        found.append(guarding.added(zero, x, y) - zero)
        moved(model, optimizer)
    return guarding, found


def test_an_alarm_is_a_line_and_a_call(caplog):
    seen: list[Alarm] = []
    with caplog.at_level(logging.WARNING, "elle_fast.guard"):
        guarding, added = alarmed(on_alarm=seen.append)
    assert seen == guarding.alarms
    (alarm,) = seen
    guarding.alarms.clear()  # a list of the caller's own
    assert guarding.alarms == seen
    assert (alarm.step, alarm.back_to) == (4, 1)
    (line,) = caplog.messages
    assert line == alarm.line("elle")
    assert [bool(each > 0) for each in added] == [False] * 4 + [True] * 3 + [False]


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_one_rank_says_it(rank, lines, caplog, monkeypatch):
    guarding, _, _ = started()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    with caplog.at_level(logging.WARNING, "elle_fast.guard"):
        guarding._say(Alarm(4, "linearity", 0.3, 0.2, 1))
    assert len(caplog.messages) == lines


def test_a_stop_is_an_error():
    with pytest.raises(CollapsedError, match=r"^the training collapsed: Alarm\(step=4"):
        alarmed(action="stop")


@pytest.mark.parametrize(
    "action, back_to, said",
    [
        ("elle", 1, "; back to step 1, and E_lin in the loss for a while"),
        ("elle", None, "; the weights stay as they are, and E_lin in the loss for a while"),
        ("rollback", 1, "; back to step 1"),
        ("stop", 1, "; back to step 1, and stop"),
        ("alarm", None, ""),
    ],
)
def test_the_line_of_an_alarm(action, back_to, said):
    line = Alarm(4, "linearity", 0.3121, 0.2, back_to).line(action)
    assert line == f"guard: linearity is 0.312, beyond 0.2, in step 4{said}"
