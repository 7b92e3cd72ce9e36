"""The average of the weights against its formula, torch's own, and a batch norm that has not seen data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from elle_fast.recipes.averaging import WeightAverage, checked_tau

STEPS = 40


def trained_states(average: Any = None):
    """A float64 network with batch norm; its state after each of the steps, in which it moves a lot."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    averages = [] if average is None else [make(model) for make in average]
    states = []
    for step in range(STEPS):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 2).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        for each in averages:
            each.update_parameters(model)
    return model, states, averages


@pytest.mark.parametrize("tau", [0.05, 0.5, 0.999])
def test_the_average_is_its_formula(tau):
    _, states, (average,) = trained_states([lambda model: WeightAverage(model, tau)])
    # The part that each step's weights have in the end: 1 - d of their own step, times every later d.
    decays = [0.0] + [min(tau, (1 + n) / (10 + n)) for n in range(1, STEPS)]
    parts = [1 - decay for decay in decays]
    for step, decay in enumerate(decays):
        for earlier in range(step):
            parts[earlier] *= decay
    assert sum(parts) == pytest.approx(1)
    for name, value in average.module.state_dict().items():
        expected = sum(part * state[name].double() for part, state in zip(parts, states, strict=True))
        if name.endswith("num_batches_tracked"):
            assert value == STEPS
            assert value.dtype == torch.int64
        else:
            # Each update rounds a few times, by 2^-53 of numbers of the order of one.
            torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)
            # A bias before batch norm does not move.
            assert torch.equal(value, states[-1][name]) <= (name == "0.bias")
    assert {name for name, _ in average.named_buffers()} >= {"module.1.running_mean", "module.1.running_var"}
    assert average.n_averaged == STEPS


def test_with_a_small_tau_it_is_torchs_to_the_bit():
    """Without the growing decay, which begins with 2 / 11."""
    tau = 0.1
    _, _, (ours, torchs) = trained_states(
        [
            lambda model: WeightAverage(model, tau),
            lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(tau), use_buffers=True),
        ]
    )
    other = torchs.state_dict()
    for name, value in ours.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # torch's averages this integer, and rounds it down
            assert torch.equal(value, other[name]), name
    assert ours.state_dict().keys() == other.keys()


def test_the_model_is_left_alone():
    alone, *_ = trained_states()
    beside, *_ = trained_states([lambda model: WeightAverage(model, 0.9)])
    assert all(torch.equal(value, beside.state_dict()[name]) for name, value in alone.state_dict().items())


def test_a_batch_norm_that_has_not_seen_data_does_not_pass():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.used(x)

    said = "average: expected batch norms that have seen data, got 'unused' with its initial mean and variance"
    model = Unused()
    average = WeightAverage(model, 0.9)
    with pytest.raises(RuntimeError, match=said.replace("'unused'", "'used'")):
        average.ready()
    model(torch.randn(4, 3))
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match=said):
        average.ready()
    model.unused(torch.randn(4, 3))
    average.update_parameters(model)
    assert average.ready() is average.module
    # Those without running statistics take each batch's.
    assert WeightAverage(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)), 0.9).ready()


@pytest.mark.parametrize("value", [0, 0.0, 1, 1.0, -0.1, 2, float("nan"), float("inf")])
def test_a_tau_outside_the_interval(value):
    with pytest.raises(ValueError, match=r"average: expected a number in \(0, 1\), got"):
        checked_tau(value)
    for bad in ("0.9", None, True, [0.9]):
        with pytest.raises(TypeError, match=r"average: expected a number in \(0, 1\), got"):
            checked_tau(bad)


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_gpu():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).cuda()
    model(torch.randn(8, 3, device="cuda"))
    average = WeightAverage(model, 0.9)
    average.update_parameters(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            average.update_parameters(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.n_averaged == 4
