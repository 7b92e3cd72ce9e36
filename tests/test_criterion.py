"""When a call is a step of a criterion's state, and the watch over losses that are not finite."""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, TrainingStep, capture, methods
from elle_fast._core.host_copy import HostCopy
from elle_fast.criterion import Record, TrainingLoss
from elle_fast.testing import no_host_sync
from tests.helpers import Called, Smooth, about, built, convnet, labels, random, rng

EPS = 0.1
STATEFUL = (
    *("elle-a", "n-fgsm+elle-a", "gat+elle-a", "trades-single+elle-a", "advmixup-single+elle-a", "gat", "free-at"),
    *("pgi", "pgi-ep", "pco", "rs-cs", "mep-cs", "pgi+elle"),
)
UNIVERSAL = ("uap", "cuap", "fuap", "liet")


def batch(seed: int = 1, size: int = 5) -> tuple[Tensor, Tensor]:
    return random(size, 6, seed=seed), labels(size, 3, seed=seed)


def net() -> nn.Module:
    return Smooth(6, 3, gain=2.0)


def elle_a(**options: Any) -> ELLELoss:
    lam = AdaptiveLambda(5.0, gamma=0.5, sensitivity=0.0, min_history=1)
    return ELLELoss(EPS, lam, generator=rng(1), **options)


def state(module: nn.Module) -> list[Any]:
    return [value.clone() for value in module.state_dict().values()]


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def count(made: ELLELoss) -> int:
    assert made.controller is not None
    return int(made.controller.count)


def call(made: Any, model: Any, seed: int = 1, size: int = 5) -> None:
    x, y = batch(seed, size)
    made(model, x, y, **about(made, x)).backward()


# ---- One call, one step of the state


@pytest.mark.parametrize("name", STATEFUL + UNIVERSAL)
def test_each_state_is_left_alone_where_a_call_is_no_step(name):
    made, model = built(name, eps=EPS), net()
    call(made, model)
    before = state(made)
    with made.frozen():
        call(made, model, seed=2, size=7)
    model.eval()
    with pytest.warns(UserWarning, match="^model: in eval mode, so what "):
        call(made, model, seed=3, size=7)
    call(made, model, seed=3, size=7)  # once
    made.eval()
    model.train()
    call(made, model, seed=4, size=7)
    assert same(before, state(made))
    made.train()
    with made.frozen(False):
        call(made, model, seed=5)
    assert not same(before, state(made))


def test_every_criterion_can_be_frozen():
    for name in methods.NAMES:
        made = built(name, eps=EPS)
        assert isinstance(made, TrainingLoss)
        inner = [each for each in made.modules() if isinstance(each, TrainingLoss)]
        with made.frozen():
            assert not any(each.updates(net()) for each in inner)
        assert all(each.updates(net()) for each in inner)


@pytest.mark.parametrize("lagged", [False, True])
def test_a_frozen_call_is_weighed_by_lam_as_it_is(lagged):
    made, model = elle_a(lagged=lagged), net()
    for seed in range(4):
        call(made, model, seed)
        assert made.controller is not None
        lam = made.controller.lam.clone()
        with made.frozen():
            loss = made(model, *batch(9))
        assert made.stats["lam"] == lam
        torch.testing.assert_close(loss.detach(), made.stats["ce"] + lam * made.stats["e_lin"])


def test_frozen_nests_and_ends_with_an_error():
    made, model = elle_a(), net()

    def interrupted() -> None:
        with made.frozen():
            with made.frozen():
                call(made, model)
            call(made, model)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert count(made) == 0
    call(made, model)
    assert count(made) == 1


def test_a_copy_made_inside_is_not_frozen():
    made, model = elle_a(), net()
    with made.frozen():
        twins = [copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)]
    for twin in twins[:2]:
        call(twin, model)
        assert count(twin) == 1


def shells() -> dict[str, Any]:
    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="eager")

    return {
        "itself": lambda model: model,
        "partial": lambda model: partial(model),
        "method": lambda model: model.forward,
        "compiled": compiled,
        "compiled in a partial": lambda model: partial(compiled(model)),
    }


def test_only_a_state_that_should_have_taken_a_step_is_warned_of():
    model = net().eval()
    for make in (elle_a, partial(ELLELoss, EPS)):
        made: Any = make()
        with torch.no_grad():
            made(model, *batch())
        with made.frozen():
            call(made, model)
        if not made.adaptive:
            call(made, model)
        call(made.eval(), model)


@pytest.mark.filterwarnings("ignore:model. in eval mode")
@pytest.mark.parametrize("shell", shells())
def test_the_mode_of_a_model_in_a_shell(shell):
    model, made = net(), elle_a()
    called = shells()[shell](model)
    assert made.updates(called)
    model.eval()  # not that of the shell
    assert not made.updates(called)
    if isinstance(called, nn.Module):
        called.train()
        assert made.updates(called)
        called.eval()
        assert not made.updates(called)


def test_of_a_function_the_mode_is_not_known():
    model, made = net().eval(), elle_a()
    call(made, lambda x: model(x))
    assert count(made) == 1


def test_layers_in_eval_mode_do_not_matter():
    """As batch norm that is not to be trained."""
    model, made = convnet(), elle_a()
    model.get_submodule("1").eval()
    assert made.updates(model)


def test_loops_with_more_than_one_call_a_step():
    model, made = net(), elle_a()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    for step in range(3):
        calls = itertools.count()

        def closure(step: int = step, calls: itertools.count[int] = calls) -> Any:
            optimizer.zero_grad()
            with made.frozen(next(calls) > 0):
                loss = made(model, *batch(step))
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        assert next(calls) > 2
        assert count(made) == step + 1
    for part in range(4):
        with made.frozen(part > 0):
            call(made, model, seed=part)
    assert count(made) == 4


def test_a_frozen_call_may_be_light_and_is_not_counted():
    """So that all parts of an accumulated gradient cost the same."""
    model, made = convnet(norm=False), ELLELoss(EPS, adaptive=True, skip_below=0.5)
    x, y = random(4, 3, 8, 8, seed=1), labels(4, 4)
    made(model, x, y)
    with made.frozen():
        assert made.next_kind(model) == "light"
        made(model, x, y)
    assert int(made.stats["light_steps"]) == 1
    assert made.next_kind(model.eval()) == "full"


def test_capture_sees_it():
    made, model = elle_a(skip_below=0.5), net()
    step = capture(made, model, torch.optim.SGD(model.parameters(), lr=0.1), *batch())
    step(*batch())
    constants = made.constants()
    with made.frozen():
        step(*batch())
        assert {name for name, value in made.constants().items() if value != constants[name]} == {"frozen"}
    assert count(made) == 1


# ---- Losses that are not finite


class Lossy(TrainingLoss):
    """Its losses are given."""

    def forward(self, *losses: float) -> None:
        for value in losses:
            self.last = Record({"loss": torch.tensor(value)}, None)
            self.raise_if_diverged(after=3)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "losses, at",
    [
        ([1.0] * 9, None),
        ([NAN, NAN, 1.0, NAN, INF, 1.0, -INF, NAN, 2.0], None),
        ([1.0, NAN, INF, -INF, 1.0], 3),
        ([NAN, NAN, NAN], 2),
    ],
)
def test_it_counts_losses_in_a_row(losses, at):
    made = Lossy()
    made(*losses[:at])
    if at is not None:
        with pytest.raises(RuntimeError, match=r"^loss: expected finite numbers, got 3 in a row that are not"):
            made(losses[at])
        made(NAN, NAN)  # it begins anew


def test_each_loss_counts_once_and_before_the_first_there_is_none():
    made = Lossy()
    made.raise_if_diverged(after=1)
    made.last = Record({"loss": torch.tensor(NAN)}, None)
    for _ in range(5):
        made.raise_if_diverged(after=2)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin.raise_if_diverged(after=2)
    with pytest.raises(ValueError, match=r"^after: expected an integer >= 1, got 0"):
        made.raise_if_diverged(after=0)


# NuAT's singular values are an error of torch's own then.
@pytest.mark.parametrize("name", [name for name in methods.NAMES if name != "nuat"])
def test_a_loop_with_any_method(name):
    made, model = built(name, eps=EPS, bounds=None), net()
    step = TrainingStep(Called(made), model, torch.optim.SGD(model.parameters(), lr=0.01))
    step(*batch())
    made.raise_if_diverged(after=2)
    with torch.no_grad():
        next(model.parameters()).fill_(NAN)
    step(*batch())
    made.raise_if_diverged(after=2)
    step(*batch())
    with pytest.raises(RuntimeError, match="got 2 in a row"):
        made.raise_if_diverged(after=2)


class Event:
    """Stands for a CUDA event."""

    def __init__(self) -> None:
        self.there = False

    def query(self) -> bool:
        return self.there

    def synchronize(self) -> None:
        assert self.there, "a wait"


def test_nothing_waits_where_copies_take_their_time(monkeypatch):
    """As on CUDA: an error comes late, and no copy is read before it is there."""
    events: list[Event] = []

    def start(tensor: Tensor) -> HostCopy:
        events.append(Event())
        return HostCopy(tensor, tensor._version, tensor.clone(), events[-1])  # type: ignore[arg-type]

    monkeypatch.setattr(HostCopy, "start", start)
    monkeypatch.setattr(HostCopy, "item", lambda copy: float(copy.copy.numpy().sum()))
    made = Lossy()
    losses = [torch.tensor(value) for value in [1.0] + [NAN] * 9]
    for loss in losses:
        made.last = Record({"loss": loss}, None)
        with no_host_sync():
            made.raise_if_diverged(after=3)
    assert len(events) == 1  # the copy of the first count is still under way
    events[0].there = True
    made.raise_if_diverged(after=3)
    assert len(events) == 2
    events[1].there = True
    with pytest.raises(RuntimeError, match="got 9 in a row"):
        made.raise_if_diverged(after=3)


@pytest.mark.parametrize("on", ["False", None, 1])
def test_frozen_is_told_yes_or_no(on):
    with pytest.raises(TypeError, match=r"^on: expected True or False, got "), ELLELoss(0.1).frozen(on):
        pass


def test_state_of_another_shape():
    controller = ELLELoss(0.1, adaptive=True).controller
    assert controller is not None
    for name in ("lam", "count", "mean"):
        with pytest.raises(ValueError, match=rf"^{name}: expected a tensor of shape \[\], got a tensor of shape \[8\]"):
            setattr(controller, name, torch.ones(8))
