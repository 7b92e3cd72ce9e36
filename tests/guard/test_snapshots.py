"""Snapshots: what is kept, what going back restores, and where."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from elle_fast.guard.snapshots import Snapshots


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.thawed = nn.Linear(3, 2), nn.Linear(3, 2)
        self.register_buffer("own", torch.zeros(2), persistent=False)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, *layers: str) -> None:
    optimizer.zero_grad()
    for layer in layers:
        for weight in getattr(model, layer).parameters():
            weight.grad = torch.ones_like(weight)
    optimizer.step()


def made(**options: Any) -> tuple[Net, torch.optim.Adam, Snapshots]:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    trained(model, optimizer, "used")
    return model, optimizer, Snapshots(model, optimizer, (), **{"on_host": False, **options})


@pytest.mark.parametrize("on_host", [False, True])
def test_going_back_restores_in_place(on_host):
    model, optimizer, snapshots = made(on_host=on_host)
    model.get_buffer("own").fill_(1.0)
    snapshots.take(1)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    trained(model, optimizer, "used", "thawed")
    model.get_buffer("own").fill_(2.0)
    snapshots.take(5)
    moments = optimizer.state[model.used.weight]["exp_avg"]
    places = [weight.data_ptr() for weight in model.parameters()], moments.data_ptr()
    assert snapshots.go_back(1) == 1
    assert snapshots.newest == 1  # the newer one is forgotten
    assert places == ([weight.data_ptr() for weight in model.parameters()], moments.data_ptr())
    weights, states = before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.get_buffer("own").tolist() == [1.0, 1.0]  # which no checkpoint has
    for number, state in states.items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][number][name]) for name, value in state.items())
    begun = optimizer.state[model.thawed.weight]
    assert begun
    assert not any(value.any() for value in begun.values())  # as if it had not begun


def test_what_is_kept_is_a_copy():
    model, _, snapshots = made()
    snapshots.take(1)
    state = snapshots.state_dict()
    other = Snapshots(model, torch.optim.Adam(model.parameters()), (), on_host=False)
    other.load_state_dict(state)
    kept = copy.deepcopy(other.state_dict()["kept"][0]["model"])
    for value in state["kept"][0]["model"].values():
        value.fill_(7.0)
    assert all(torch.equal(value, kept[name]) for name, value in other.state_dict()["kept"][0]["model"].items())


def test_there_are_never_three(monkeypatch):
    _, _, snapshots = made()
    copied, alive = Snapshots._copied, []

    def counting(self, value):
        if isinstance(value, dict) and "step" in value and "model" in value:
            alive.append(len(self._kept) + 1)
        return copied(self, value)

    monkeypatch.setattr(Snapshots, "_copied", counting)
    for step in (1, 2, 3, 4):
        snapshots.take(step)
    assert alive == [1, 2, 2, 2]
    assert [each["step"] for each in snapshots.state_dict()["kept"]] == [3, 4]


@pytest.mark.parametrize("on_host, place", [(False, r"the device's memory \(on_host=True"), (True, "the host's")])
def test_without_room_the_error_says_so(on_host, place, monkeypatch):
    _, _, snapshots = made(on_host=on_host)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("not enough memory: you tried"),
    ):
        monkeypatch.setattr(Snapshots, "_copied", Mock(side_effect=error))
        with pytest.raises(MemoryError, match=rf"^snapshot: expected room for weights and optimiser in {place}"):
            snapshots.take(1)
    monkeypatch.setattr(Snapshots, "_copied", Mock(side_effect=RuntimeError("another")))
    with pytest.raises(RuntimeError, match=r"^another$"):
        snapshots.take(1)
