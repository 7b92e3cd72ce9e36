"""Devices without float64, such as MPS: the CPU stands for one, and refuses every tensor of that dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from elle_fast import AdaptiveLambda, ELLELoss, attacks, backends, methods
from elle_fast._core import devices
from tests.helpers import about, built, labels, random

B, C, D = 6, 3, 5
X, Y = random(B, D, seed=1), labels(B, C)


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, results)):
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                raise TypeError(f"Cannot convert a Tensor to float64, as the device has none: {func}")
        return results


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "has_float64", lambda device: device.type != "cpu")
    monkeypatch.setattr(backends, "_FASTEST", {})  # no kernels either
    with NoFloat64():
        yield


def placed(make: Callable[[], nn.Module]) -> Any:
    """A module that was built on the host and moved to the device."""
    with _disable_current_modes():
        return make().to("cpu")


@pytest.mark.parametrize("name", methods.NAMES)
def test_every_method_trains(without, name):
    model = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C))
    criterion = placed(lambda: built(name, eps=0.1))
    for _ in range(2):
        criterion(model, X, Y, **about(criterion, X)).backward()
    criterion.load_state_dict(copy.deepcopy(criterion.state_dict()))
    attacks.pgd(model, X, Y, 0.1)
    assert criterion.stats["loss"].isfinite()


def decisions(make: Callable[[], AdaptiveLambda], values: Tensor) -> tuple[list[float], list[float]]:
    controller = placed(make)
    return [controller.update(value).item() for value in values], [each.item() for each in controller.moments()]


@pytest.mark.parametrize("window", [None, 20])
def test_the_decisions_are_those_of_float64(request, window):
    """500 values that vary by their own size: mean and deviation differ by some 500 roundings of float32 at most."""
    values = 1e-4 * random(500, seed=3)
    values[::37] *= 10  # detections, far from the threshold; others are far below it
    values[11] = torch.nan

    def make() -> AdaptiveLambda:
        return AdaptiveLambda(4000.0, window=window, sensitivity=3.0)

    expected, moments = decisions(make, values)
    request.getfixturevalue("without")
    found, narrow = decisions(make, values)
    assert found == pytest.approx(expected, rel=2.0**-22)
    assert 4000.0 in expected[50:]
    assert narrow == pytest.approx(moments, rel=500 * 2.0**-24)


def test_the_state_moves_between_devices(monkeypatch):
    """Cast before it goes to such a device and after it comes back, whatever half() or a checkpoint say."""
    controller = AdaptiveLambda(4000.0)
    for value in (0.1, 0.2, 0.3, 0.5):
        controller.update(torch.tensor(value))
    wide = copy.deepcopy(controller.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(devices, "has_float64", lambda device: device.type != "cpu")
        controller.half()
        assert (controller.mean.dtype, controller.lam.dtype) == (torch.float32, torch.float32)
        narrow = copy.deepcopy(controller.state_dict())
        for assign in (False, True):
            other = AdaptiveLambda(4000.0)
            other.load_state_dict(wide, assign=assign)
            other.to("cpu")
            assert other.mean.dtype == torch.float32
            assert torch.equal(other.mean, narrow["mean"])
    controller.float()
    assert controller.mean.dtype == controller.deviations.dtype == torch.float64
    assert torch.equal(controller.mean, narrow["mean"].double())
    assert controller.count.item() == 4


def test_only_a_device_that_refuses_float64_is_without(monkeypatch):
    assert all(devices.has_float64(torch.device(kind)) for kind in ("cpu", "cuda", "meta"))
    devices._takes_float64.cache_clear()
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: (_ for _ in ()).throw(TypeError(f"no {dtype}")))
    assert not devices.has_float64(torch.device("mps"))
    devices._takes_float64.cache_clear()


def test_a_kernel_is_given_no_state_of_float32(without):
    """Where a device has kernels but no float64, ELLE-A's update is the reference's."""
    model = nn.Linear(D, C)
    criterion = placed(lambda: ELLELoss(0.1, AdaptiveLambda(7.0, min_history=1, sensitivity=0.0), backend="cpp"))
    for _ in range(3):
        criterion(model, X, Y).backward()
    assert criterion.controller is not None
    assert criterion.controller.mean.dtype == torch.float32
    assert 0 < criterion.controller.mean.item() < 1
    assert criterion.controller.count.item() == 3
