"""AdaptiveLambda against Algorithm 1 with a plain Python list, over short and very long histories."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast import AdaptiveLambda
from elle_fast.functional import elle_loss
from tests.helpers import no_host_sync, unit_roundoff


class PlainList:
    """ELLE-A as the paper writes it: a list, numpy's mean and population std, lam in float32."""

    def __init__(self, lam, gamma=0.99, sensitivity=2.0, min_history=3, window=None):
        self.lam_max, self.gamma, self.sensitivity = lam, gamma, sensitivity
        self.min_history, self.window = min_history, window
        self.lam = np.float32(0)
        self.history: list[float] = []
        self.skipped = self.detections = 0

    def update(self, e_lin: float) -> float:
        if not math.isfinite(e_lin):
            self.skipped += 1
            return float(self.lam)
        held = np.array(self.history if self.window is None else self.history[-self.window :], dtype=np.float64)
        detected = len(self.history) >= self.min_history and e_lin > held.mean() + self.sensitivity * held.std()
        self.detections += detected
        self.lam = np.float32(self.lam_max) if detected else np.float32(np.float32(self.gamma) * self.lam)
        self.history.append(e_lin)
        return float(self.lam)


def e_lins(count: int, seed: int = 0, spikes: float = 0.05) -> Any:
    """float32 values from 1e-7 to 1e-1, with spikes."""
    source = np.random.default_rng(seed)
    values = 10 ** source.uniform(-7, -3, count)
    spiked = source.random(count) < spikes
    values[spiked] = 10 ** source.uniform(-3, -1, spiked.sum())
    return values.astype(np.float32)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.5},
    {"gamma": 1.0},
    {"gamma": 0.0},
    {"sensitivity": 0.0},
    {"sensitivity": 3.5},
    {"min_history": 1},
    {"min_history": 20},
    {"window": 3},
    {"window": 50},
    {"window": 7, "min_history": 5, "sensitivity": 1.0},
    {"window": 1, "min_history": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_follows_the_plain_list(options):
    controller, plain = AdaptiveLambda(4000.0, **options), PlainList(4000.0, **options)
    for value in e_lins(250):
        lam = controller.update(torch.tensor(value))
        expected = plain.update(float(value))
        # gamma is one float32 rounding, or a double's product rounded: one rounding a step apart since lam_max.
        assert lam.item() == pytest.approx(expected, rel=250 * 2 * unit_roundoff(torch.float32))
        assert (lam.dtype, lam.dim(), lam.requires_grad) == (torch.float32, 0, False)
        assert lam.item() == controller.lam.item()
    assert plain.detections > (0 if options.get("sensitivity", 2.0) > 3 else 3)
    assert controller.count.item() == 250
    held = np.array(plain.history[-(options.get("window") or 250) :])
    mean, std = controller.moments()
    # Welford in float64: an error of some n roundings; two passes over a window likewise.
    assert mean.item() == pytest.approx(held.mean(), rel=250 * 4 * unit_roundoff(torch.float64))
    assert std.item() == pytest.approx(held.std(), rel=250 * 8 * unit_roundoff(torch.float64), abs=1e-18)


def test_starts_at_zero_and_needs_min_history():
    for min_history in (1, 2, 3, 6):
        controller = AdaptiveLambda(10.0, min_history=min_history)
        assert controller.lam.item() == 0
        for step in range(min_history + 1):
            # Each value is far above everything before it.
            lam = controller.update(torch.tensor(10.0**step))
            assert lam.item() == (10.0 if step >= min_history else 0)


def test_equal_values_are_no_detection():
    for window in (None, 4):
        controller = AdaptiveLambda(10.0, window=window)
        for _ in range(50):
            assert controller.update(torch.tensor(0.1)).item() == 0


def test_the_threshold_is_strict_and_population():
    # History 0, 0, 3: mean 1, population std sqrt(2), sample std sqrt(3). Threshold 1 + 2 sqrt(2) = 3.83 (4.46).
    for value, expected in ((3.8, 0.0), (3.9, 10.0), (4.4, 10.0)):
        controller = AdaptiveLambda(10.0)
        for e_lin in (0.0, 0.0, 3.0):
            controller.update(torch.tensor(e_lin))
        assert controller.update(torch.tensor(value)).item() == expected


def test_the_window_forgets():
    full, windowed = AdaptiveLambda(1.0, gamma=0.0), AdaptiveLambda(1.0, gamma=0.0, window=3)
    for controller, expected in ((full, 0.0), (windowed, 1.0)):
        for value in (100.0, 1.0, 1.0, 1.0):
            controller.update(torch.tensor(value))
        assert controller.update(torch.tensor(2.0)).item() == expected


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    """Every decision against long-double cumulative sums, the moments against two passes at checkpoints."""
    steps = 100_000
    values = e_lins(steps, seed=1, spikes=0.002)
    exact = values.astype(np.longdouble)
    # Spikes reach 0.1, so the sums of squares cancel little: the variance is at least 1e-4 of the mean square.
    count = np.arange(1, steps + 1)
    mean = np.cumsum(exact) / count
    std = np.sqrt(np.maximum(np.cumsum(exact**2) / count - mean**2, 0))
    threshold = np.concatenate(([np.inf], (mean + 2 * std)[:-1]))
    threshold[:3] = np.inf
    detected = exact > threshold
    assert 20 < detected.sum() < steps / 2

    controller = AdaptiveLambda(4000.0)
    tensors = torch.from_numpy(values).unbind()
    checkpoints = set(np.unique(np.geomspace(5, steps, 50).astype(int)).tolist())
    lams, sizes = [], {name: value.numel() for name, value in controller.state_dict().items()}
    for step, value in enumerate(tensors, start=1):
        lams.append(controller.update(value))
        if step in checkpoints:
            history = values[:step].astype(np.float64)
            found = [moment.item() for moment in controller.moments()]
            # The bound of Welford's errors grows as n roundings, times the condition number sqrt(1 + mean^2/var) < 2.
            bound = 2 * step * unit_roundoff(torch.float64) + 1e-14
            assert found == pytest.approx([history.mean(), history.std()], rel=bound)
    assert (torch.stack(lams) == 4000.0).numpy().tolist() == detected.tolist()
    assert {name: value.numel() for name, value in controller.state_dict().items()} == sizes
    assert sum(sizes.values()) == 5


@pytest.mark.parametrize("window", [None, 5])
def test_non_finite_values_are_skipped_and_counted(window):
    controller, clean = AdaptiveLambda(10.0, window=window), AdaptiveLambda(10.0, window=window)
    values = [float(v) for v in e_lins(40, seed=2, spikes=0.2)]
    for step, value in enumerate(values):
        bad = (math.nan, math.inf, -math.inf)[step % 3]
        before = {name: t.clone() for name, t in controller.state_dict().items()}
        lam = controller.update(torch.tensor(bad))
        assert lam.item() == before["lam"].item()
        after = controller.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items() if name != "skipped")
        assert controller.skipped.item() == step + 1
        assert torch.equal(controller.update(torch.tensor(value)), clean.update(torch.tensor(value)))
    assert clean.skipped.item() == 0
    assert controller.lam.item() > 0


@pytest.mark.parametrize("window", [None, 6])
def test_copies_and_checkpoints_continue_identically(window):
    values = torch.from_numpy(e_lins(60, seed=3, spikes=0.1)).unbind()
    controller = AdaptiveLambda(10.0, window=window)
    for value in values[:25]:
        controller.update(value)
    restored = AdaptiveLambda(10.0, window=window)
    restored.load_state_dict(copy.deepcopy(controller.state_dict()))
    twins = [restored, copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
    for value in values[25:]:
        expected = controller.update(value)
        assert all(torch.equal(twin.update(value), expected) for twin in twins)
    for twin in twins:
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in controller.state_dict().items())


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()]
)
def test_a_cast_of_the_module_keeps_the_state(window, convert):
    controller = AdaptiveLambda(10.0, window=window)
    for value in torch.from_numpy(e_lins(10)).unbind():
        controller.update(value)
    before = {name: t.clone() for name, t in controller.state_dict().items()}
    convert(torch.nn.ModuleList([controller]))
    after = controller.state_dict()
    assert list(after) == list(before)
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert controller.lam is dict(controller.named_buffers())["lam"]
    controller.update(torch.tensor(0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_takes_e_lin_of_any_dtype_and_leaves_it_alone(dtype):
    e_lin = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    controller = AdaptiveLambda(10.0)
    lam = controller.update(e_lin)
    assert (lam.dtype, lam.requires_grad) == (torch.float32, False)
    assert controller.moments()[0].item() == e_lin.item() == 0.25


def test_a_returned_lam_survives_later_updates():
    """Gradient accumulation: two forward passes, then both backward passes."""
    controller = AdaptiveLambda(100.0)
    for value in (1.0, 1.0, 1.0):
        controller.update(torch.tensor(value))
    e_lins_of_steps = [torch.tensor(v, requires_grad=True) for v in (5.0, 1.0)]
    losses = [controller.update(e) * e for e in e_lins_of_steps]
    sum(losses[1:], losses[0]).backward()
    assert [e.grad for e in e_lins_of_steps] == [torch.tensor(100.0), torch.tensor(99.0)]


def test_in_elle_loss():
    logits = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    alpha, target = torch.tensor([0.25, 0.5]), torch.tensor([0, 2])
    controller = AdaptiveLambda(100.0)
    for value in (0.0, 0.0, 0.0):
        controller.update(torch.tensor(value))
    with no_host_sync():
        loss, ce, e_lin = elle_loss(logits, target, alpha, controller)
        loss.backward()
    assert controller.lam.item() == 100.0
    # One product and one sum in float32.
    assert loss.item() == pytest.approx(ce.item() + 100 * e_lin.item(), rel=4 * unit_roundoff(torch.float32))
    assert controller.count.item() == 4


@pytest.mark.parametrize("window", [None, 6])
def test_nothing_waits_for_the_device(window):
    controller = AdaptiveLambda(10.0, window=window)
    with no_host_sync():
        for value in torch.from_numpy(e_lins(10)).unbind():
            controller.update(value)
        controller.moments()


def test_the_guard_catches_what_it_should():
    from tests.helpers import HostSyncError

    value = torch.tensor(1.0)
    syncs = [
        lambda: value.item(),
        lambda: value.tolist(),
        lambda: bool(value > 0),
        lambda: float(value),
        lambda: int(value),
        lambda: value.cpu(),
        lambda: value.numpy(),
        lambda: value.nonzero(),
        lambda: [1, 2][value.long()],
        lambda: torch.ones(3)[torch.ones(3) > 0],
        lambda: torch.equal(value, value),
        lambda: torch.ops.aten._local_scalar_dense(value),
    ]
    for sync in syncs:
        with no_host_sync(), pytest.raises(HostSyncError):
            sync()


def test_repr_shows_the_options():
    assert repr(AdaptiveLambda(4000.0, window=9)) == (
        "AdaptiveLambda(lam=4000.0, gamma=0.99, sensitivity=2.0, min_history=3, window=9)"
    )
