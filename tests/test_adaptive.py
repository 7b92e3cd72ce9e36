"""AdaptiveLambda against Algorithm 1 with a plain Python list, over short and very long histories; what rules share."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast import AdaptiveLambda, functional
from elle_fast.ops import dispatch
from elle_fast.ops.elle_loss.schema import ELLE_LOSS, UPDATE_LAM
from elle_fast.testing import HostSyncError, no_host_sync
from tests.helpers import WIDEST, labels, matrix, not_finite, random, rng, same_values, unit_roundoff


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


# What is known of E_lin: moments of all, a window, and the mean of relative E_lin.
KNOWN: list[dict[str, Any]] = [{}, {"window": 6}, {"rule": "relative", "threshold": 1e-4, "horizon": 5}]
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


@matrix(options=OPTIONS)
def test_follows_the_plain_list(where, options):
    controller, plain = AdaptiveLambda(4000.0, **options), PlainList(4000.0, **options)
    steps = 150 if where.slow else 250
    for value in e_lins(steps, spikes=12.5 / steps):
        lam = where.update(controller, torch.tensor(value))
        expected = plain.update(float(value))
        # gamma is one float32 rounding, or a double's product rounded: one rounding a step apart since lam_max.
        assert lam.item() == pytest.approx(expected, rel=steps * 2 * unit_roundoff(torch.float32))
        assert (lam.dtype, lam.dim(), lam.requires_grad) == (torch.float32, 0, False)
        assert lam.item() == controller.lam.item()
    assert plain.detections > (0 if options.get("sensitivity", 2.0) > 3 else 3)
    assert controller.count.item() == steps
    held = np.array(plain.history[-(options.get("window") or steps) :])
    mean, std = controller.moments()
    # Welford in float64: an error of some n roundings; two passes over a window likewise.
    assert mean.item() == pytest.approx(held.mean(), rel=steps * 4 * unit_roundoff(torch.float64))
    assert std.item() == pytest.approx(held.std(), rel=steps * 8 * unit_roundoff(torch.float64), abs=1e-18)


@matrix()
def test_starts_at_zero_and_needs_min_history(where):
    for min_history in (1, 2, 3, 6):
        controller = AdaptiveLambda(10.0, min_history=min_history)
        assert controller.lam.item() == 0
        for step in range(min_history + 1):
            # Each value is far above everything before it.
            lam = where.update(controller, torch.tensor(10.0**step))
            assert lam.item() == (10.0 if step >= min_history else 0)


@matrix()
def test_equal_values_are_no_detection(where):
    for window in (None, 4):
        controller = AdaptiveLambda(10.0, window=window)
        for _ in range(50):
            assert where.update(controller, torch.tensor(0.1)).item() == 0


@matrix()
def test_the_threshold_is_strict_and_population(where):
    # History 0, 0, 3: mean 1, population std sqrt(2), sample std sqrt(3). Threshold 1 + 2 sqrt(2) = 3.83 (4.46).
    for value, expected in ((3.8, 0.0), (3.9, 10.0), (4.4, 10.0)):
        controller = AdaptiveLambda(10.0)
        for e_lin in (0.0, 0.0, 3.0):
            where.update(controller, torch.tensor(e_lin))
        assert where.update(controller, torch.tensor(value)).item() == expected


@matrix()
def test_the_window_forgets(where):
    full, windowed = AdaptiveLambda(1.0, gamma=0.0), AdaptiveLambda(1.0, gamma=0.0, window=3)
    for controller, expected in ((full, 0.0), (windowed, 1.0)):
        for value in (100.0, 1.0, 1.0, 1.0):
            where.update(controller, torch.tensor(value))
        assert where.update(controller, torch.tensor(2.0)).item() == expected


@matrix(window=[1000, 1024, 1500])
@pytest.mark.parametrize("held", ["less than the window", "all of it", "more"])
def test_a_long_window(where, window, held):
    """Of more values than a kernel takes at once, from a history that is restored."""
    count = {"less than the window": window - 20, "all of it": window, "more": 2 * window + 3}[held]
    values = np.random.default_rng(4).uniform(1, 2, count).astype(np.float32)
    ring = torch.zeros(window, dtype=torch.float64)
    for place in range(max(0, count - window), count):
        ring[place % window] = float(values[place])
    history = values[-window:].astype(np.float64)
    threshold = history.mean() + 2 * history.std()
    # So near to it that not one value of the history could be left out: each has a part of at least 1 / 1500 in it.
    for probe, expected in ((threshold * (1 - 1e-5), 0.0), (threshold * (1 + 1e-5), 10.0)):
        controller = AdaptiveLambda(10.0, window=window)
        controller.load_state_dict({**controller.state_dict(), "count": torch.tensor(count), "history": ring})
        assert where.update(controller, torch.tensor(probe, dtype=torch.float32)).item() == expected
        # The oldest one has made room.
        ring_after = controller.history.cpu()
        assert ring_after[count % window].item() == np.float32(probe)
        others = torch.arange(window) != count % window
        assert torch.equal(ring_after[others], ring[others])


@matrix()
@pytest.mark.slow
def test_a_hundred_thousand_steps(where):
    """Every decision against long-double cumulative sums, the moments against two passes at checkpoints."""
    steps = 100_000
    # All of them once; elsewhere, where a step takes longer, the last ones alone from a history that is restored.
    whole = where.backend == "reference" if WIDEST is None else where == WIDEST
    done = 0 if whole else steps - 1000
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
    assert detected[done:].any()

    controller = AdaptiveLambda(4000.0)
    if done:
        before = values[:done].astype(np.float64)
        moments = {"mean": torch.tensor(before.mean()), "deviations": torch.tensor(before.var() * done)}
        controller.load_state_dict({**controller.state_dict(), "count": torch.tensor(done), **moments})
    tensors = torch.from_numpy(values[done:]).unbind()
    checkpoints = {*np.unique(np.geomspace(5, steps, 50).astype(int)).tolist(), done + 500}
    lams, sizes = [], {name: value.numel() for name, value in controller.state_dict().items()}
    for step, value in enumerate(tensors, start=done + 1):
        lams.append(controller.update(value.to(where.device), backend=where.backend))
        if step in checkpoints:
            history = values[:step].astype(np.float64)
            found = [moment.item() for moment in controller.moments()]
            # The bound of Welford's errors grows as n roundings, times the condition number sqrt(1 + mean^2/var) < 2.
            bound = 2 * step * unit_roundoff(torch.float64) + 1e-14
            assert found == pytest.approx([history.mean(), history.std()], rel=bound)
    assert (torch.stack(lams) == 4000.0).tolist() == detected[done:].tolist()
    assert {name: value.numel() for name, value in controller.state_dict().items()} == sizes
    assert sum(sizes.values()) == 5


@not_finite
@matrix(known=KNOWN)
def test_non_finite_values_are_skipped_and_counted(where, known):
    controller, clean = AdaptiveLambda(10.0, **known), AdaptiveLambda(10.0, **known)
    values = [float(v) for v in e_lins(40, seed=2, spikes=0.2)]
    for step, value in enumerate(values):
        bad = (math.nan, math.inf, -math.inf)[step % 3]
        before = {name: t.clone() for name, t in controller.state_dict().items()}
        lam = where.update(controller, torch.tensor(bad))
        assert lam.item() == before["lam"].item()
        after = controller.state_dict()
        assert all(torch.equal(after[name], t) for name, t in before.items() if name != "skipped")
        assert controller.skipped.item() == step + 1
        assert torch.equal(where.update(controller, torch.tensor(value)), where.update(clean, torch.tensor(value)))
    assert clean.skipped.item() == 0
    assert controller.lam.item() > 0


@matrix(known=KNOWN)
def test_copies_and_checkpoints_continue_identically(where, known):
    values = torch.from_numpy(e_lins(60, seed=3, spikes=0.1)).unbind()
    controller = AdaptiveLambda(10.0, **known)
    for value in values[:25]:
        where.update(controller, value)
    restored = AdaptiveLambda(10.0, **known)
    restored.load_state_dict(copy.deepcopy(controller.state_dict()))
    twins = [restored, copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
    for value in values[25:]:
        expected = where.update(controller, value)
        assert all(torch.equal(where.update(twin, value), expected) for twin in twins)
    for twin in twins:
        assert all(torch.equal(t, twin.state_dict()[name]) for name, t in controller.state_dict().items())


@matrix(known=KNOWN)
def test_a_history_moves_between_backends(where, known):
    """Updates in turn by this backend and by the reference are as good as all by the reference."""
    mixed, plain = AdaptiveLambda(10.0, **known), AdaptiveLambda(10.0, **known)
    for step, value in enumerate(torch.from_numpy(e_lins(60, seed=5, spikes=0.1)).unbind()):
        lam = where.update(mixed, value) if step % 3 else mixed.update(value, backend="reference")
        assert torch.equal(lam.cpu(), plain.update(value, backend="reference"))
    same_state(mixed, plain)


@pytest.mark.parametrize("known", KNOWN, ids=str)
@pytest.mark.parametrize(
    "convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.float()]
)
def test_a_cast_of_the_module_keeps_the_state(known, convert):
    controller = AdaptiveLambda(10.0, **known)
    for value in torch.from_numpy(e_lins(10)).unbind():
        controller.update(value)
    before = {name: t.clone() for name, t in controller.state_dict().items()}
    convert(torch.nn.ModuleList([controller]))
    after = controller.state_dict()
    assert list(after) == list(before)
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert controller.lam is dict(controller.named_buffers())["lam"]
    controller.update(torch.tensor(0.5))


@matrix()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_takes_e_lin_of_any_dtype_and_leaves_it_alone(where, dtype):
    e_lin = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    controller = AdaptiveLambda(10.0)
    lam = where.update(controller, e_lin)
    assert (lam.dtype, lam.requires_grad) == (torch.float32, False)
    assert controller.moments()[0].item() == e_lin.item() == 0.25


@matrix()
def test_a_returned_lam_survives_later_updates(where):
    """Gradient accumulation: two forward passes, then both backward passes."""
    controller = AdaptiveLambda(100.0)
    for value in (1.0, 1.0, 1.0):
        where.update(controller, torch.tensor(value))
    e_lins_of_steps = [torch.tensor(v, requires_grad=True) for v in (5.0, 1.0)]
    losses = [where.update(controller, e) * e for e in e_lins_of_steps]
    sum(losses[1:], losses[0]).backward()
    assert [e.grad for e in e_lins_of_steps] == [torch.tensor(100.0), torch.tensor(99.0)]


@matrix()
def test_in_elle_loss(where):
    logits = torch.randn(8, 3, generator=rng(1), requires_grad=True)
    alpha, target = torch.tensor([0.25, 0.5]), torch.tensor([0, 2])
    controller = AdaptiveLambda(100.0)
    for value in (0.0, 0.0, 0.0):
        where.update(controller, torch.tensor(value))
    loss, ce, e_lin = where.elle_loss(logits, target, alpha, controller)
    with no_host_sync():
        loss.backward()
    assert controller.lam.item() == 100.0
    # One product and one sum in float32.
    assert loss.item() == pytest.approx(ce.item() + 100 * e_lin.item(), rel=4 * unit_roundoff(torch.float32))
    assert controller.count.item() == 4


@matrix()
def test_lam_max_may_be_another_in_each_step(where, monkeypatch):
    """As where it is warmed up. What a backend keeps for calls that are alike does not grow with it."""
    monkeypatch.setattr(dispatch, "MOST_PLANS", 10)
    monkeypatch.setattr(ELLE_LOSS, "_plans", OrderedDict())
    logits = torch.randn(8, 3, generator=rng(1)).to(where.device)
    alpha, target = torch.tensor([0.25, 0.5]).to(where.device), torch.tensor([0, 2]).to(where.device)
    controller = AdaptiveLambda(1.0, sensitivity=0.0, min_history=1)
    for step in range(60):
        controller.lam_max = float(step)
        logits[4:] *= 1.01  # E_lin grows, so that each is a detection
        loss, ce, e_lin = functional.elle_loss(logits, target, alpha, controller, backend=where.backend)
        if step:
            assert controller.lam.item() == step
            assert loss.item() == pytest.approx(ce.item() + step * e_lin.item(), rel=4 * unit_roundoff(torch.float32))
    assert len(ELLE_LOSS._plans) <= 10


def same_state(one: AdaptiveLambda, other: AdaptiveLambda) -> None:
    """All but the moments to the bit; those are sums of the same numbers, maybe fused or in another order."""
    found, expected = ({name: t.cpu() for name, t in c.state_dict().items()} for c in (one, other))
    assert list(found) == list(expected)
    for name, t in expected.items():
        if name in ("mean", "deviations", "relative_mean"):
            assert found[name].item() == pytest.approx(t.item(), rel=1e-12)  # some 100 steps of ten roundings of 1e-16
        else:
            assert same_values(found[name], t), name


@not_finite
@matrix(window=[None, 4], of=["loss", "logits"])
def test_a_run_of_elle_loss_moves_the_state_as_updates_do(where, window, of):
    """The same lam and state as the reference, fed the E_lin of each step; gradients with the lam of their own step."""
    options: dict[str, Any] = {"gamma": 0.7, "window": window}
    controller, plain = AdaptiveLambda(100.0, **options), AdaptiveLambda(100.0, **options)
    target, alpha = labels(3, 4), random(3, seed=1)
    lams, steps = [], []
    for step, e_lin_scale in enumerate((0.1, 0.2, 0.15, 0.1, 3.0, 0.2, math.nan, 0.1, 0.3, 9.0, math.inf, 0.2)):
        logits = (torch.randn(12, 4, generator=rng(step)) * e_lin_scale).requires_grad_()
        loss, ce, e_lin = where.elle_loss(logits, target, alpha, controller, of=of)
        lams.append(plain.update(e_lin, backend="reference").item())
        assert controller.lam.item() == lams[-1]
        same_state(controller, plain)
        if math.isfinite(e_lin_scale):
            expected = ce.item() + lams[-1] * e_lin.item()
            assert loss.item() == pytest.approx(expected, rel=4 * unit_roundoff(torch.float32))
            steps.append((logits, loss, ce, e_lin, lams[-1]))
    assert lams.count(100.0) >= 2
    assert controller.skipped.item() == 2
    assert controller.count.item() == len(lams) - 2
    # Gradient accumulation: every backward pass after the last forward pass.
    for logits, loss, ce, e_lin, lam in steps:
        of_loss, of_ce, of_e_lin = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, ce, e_lin))
        # Three roundings of either term, their sum's on both sides.
        error = 8 * unit_roundoff(torch.float32) * (of_ce.abs() + lam * of_e_lin.abs())
        assert ((of_loss - (of_ce + lam * of_e_lin)).abs() <= error).all()


@matrix(known=KNOWN)
def test_nothing_waits_for_the_device(where, known):
    controller = AdaptiveLambda(10.0, **known)
    values = torch.from_numpy(e_lins(10)).to(where.device).unbind()
    with no_host_sync():
        for value in values:
            controller.update(value, backend=where.backend)
        if controller.rule == "paper":
            controller.moments()


def test_the_guard_catches_what_it_should():
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


def test_the_guard_sees_into_operators(monkeypatch):
    """Inside them PyTorch turns off what the guard is made of."""
    controller, e_lin = AdaptiveLambda(10.0), torch.tensor(0.5)
    for sync in (lambda value: value.item(), lambda value: bool(value), lambda value: torch.ones(1)[value[None] > 0]):
        monkeypatch.setitem(UPDATE_LAM._kernels, "reference", lambda value, *rest, sync=sync: sync(value))
        with no_host_sync(), pytest.raises(HostSyncError):
            UPDATE_LAM.operator(e_lin, controller.state(e_lin.device), "reference", *controller.numbers)


def test_repr_shows_the_options():
    assert repr(AdaptiveLambda(4000.0, window=9)) == (
        "AdaptiveLambda(lam=4000.0, gamma=0.99, sensitivity=2.0, min_history=3, window=9)"
    )


@not_finite
@pytest.mark.parametrize(
    "known, name",
    [
        *((KNOWN[0], name) for name in ("lam", "mean", "deviations")),
        *((KNOWN[1], name) for name in ("lam", "history")),
        (KNOWN[2], "relative_mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_state_that_no_run_leaves_is_refused(known, name, value):
    """With a NaN in its history ELLE-A never sees a collapse again. Nothing of such a checkpoint is taken."""
    controller, saved = (AdaptiveLambda(10.0, **known) for _ in range(2))
    for e_lin in (1.0, 2.0, 3.0, 9.0):
        saved.update(torch.tensor(e_lin))
    state = {each: t.clone() for each, t in saved.state_dict().items()}
    state[name].view(-1)[-1] = value
    before = {each: t.clone() for each, t in controller.state_dict().items()}
    for assign in (False, True):
        with pytest.raises(ValueError, match=rf"^{name}: expected .* as it is ELLE-A's state, got {value}$"):
            controller.load_state_dict(state, assign=assign)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value}$"):
        setattr(controller, name, state[name])
    assert all(torch.equal(t, before[each]) for each, t in controller.state_dict().items())


@pytest.mark.parametrize("name", ["lam", "count", "skipped", "deviations", "relative_mean"])
def test_a_negative_state_is_refused(name):
    controller = AdaptiveLambda(10.0, rule="relative" if name == "relative_mean" else "paper")
    state = {**controller.state_dict(), name: torch.tensor(-1)}
    with pytest.raises(ValueError, match=rf"^{name}: expected a (finite number >= 0|number in \[0, 1\]), .*, got -1$"):
        controller.load_state_dict(state)


@pytest.mark.parametrize("known", KNOWN, ids=str)
def test_a_checkpoint_of_other_dtypes_and_strides(known):
    """Loaded as its own tensors (assign=True), it would be memory of another size than what is written there."""
    controller, again = (AdaptiveLambda(10.0, **known) for _ in range(2))
    for value in (0.25, 0.5, 0.75):
        controller.update(torch.tensor(value))
    state = {
        name: torch.stack([t.float() if t.is_floating_point() else t.int()] * 2, dim=-1)[..., 0]
        for name, t in controller.state_dict().items()
    }
    again.load_state_dict(state, assign=True)
    for name, buffer in controller.named_buffers():
        loaded = again.get_buffer(name)
        assert (loaded.dtype, loaded.is_contiguous()) == (buffer.dtype, True)
        assert torch.equal(loaded, buffer)
    assert torch.equal(controller.update(torch.tensor(0.9)), again.update(torch.tensor(0.9)))
