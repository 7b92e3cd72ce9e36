"""AdaptiveLambda with ``rule="relative"``, against numpy in float64 from the formulas of its docstring."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from elle_fast import AdaptiveLambda, ELLELoss, functional, methods
from elle_fast.testing import no_host_sync
from tests.helpers import Where, labels, matrix, not_finite, random, rng, unit_roundoff

RELATIVE: dict[str, Any] = {"rule": "relative"}


class Plain:
    """The rule as its docstring has it, in Python's numbers."""

    def __init__(self, lam, gamma=0.9, min_history=3, threshold=0.2, horizon=8):
        self.lam_max, self.gamma, self.min_history = lam, gamma, min_history
        self.threshold, self.horizon = threshold, horizon
        self.lam, self.m, self.k = np.float32(0), 0.0, 0
        self.detections = 0

    def update(self, e: float) -> float:
        if not math.isfinite(e):
            return float(self.lam)
        enough = self.k >= self.min_history
        self.k += 1
        self.m += max(1 / self.horizon, 1 / self.k) * (e - self.m)
        detected = enough and self.m > self.threshold
        self.detections += detected
        self.lam = np.float32(self.lam_max) if detected else np.float32(np.float32(self.gamma) * self.lam)
        return float(self.lam)


def plain_relative(losses: Tensor, alpha: Tensor, triplets: int = 1) -> float:
    """Of the losses of x_a, x_b, x_c of each triplet, one after the other."""
    blocks = losses.double().numpy().reshape(triplets, 3, -1)
    a = alpha.double().numpy().reshape(triplets, -1)
    at_a, at_b, at_c = blocks[:, 0], blocks[:, 1], blocks[:, 2]
    r = at_c - (1 - a) * at_a - a * at_b
    bent, rise = (r**2).sum(), ((at_b - at_a) ** 2).sum()
    return float(bent / (bent + rise + 1e-12 * (1 + at_c**2).sum()))


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropies, written out."""
    z = logits.double()
    return z.logsumexp(1) - z.gather(1, target[:, None])[:, 0]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"gamma": 0.5, "horizon": 1},
    {"threshold": 0.35, "horizon": 3},
    {"min_history": 20, "threshold": 0.05},
    {"threshold": 0.0, "gamma": 0.0},
]


@matrix(options=OPTIONS)
def test_follows_the_formula(where, options):
    controller, plain = AdaptiveLambda(4000.0, **RELATIVE, **options), Plain(4000.0, **options)
    source = np.random.default_rng(3)
    for step in range(100):
        value = float(source.uniform(0, 0.15 if step % 40 < 25 else 0.8))
        lam = where.update(controller, torch.tensor(value, dtype=torch.float64))
        # As in test_adaptive: gamma is one rounding to float32.
        assert lam.item() == pytest.approx(plain.update(value), rel=200 * unit_roundoff(torch.float32))
        # One rounding of float64 a step, of each of four operations.
        assert controller.relative_mean.item() == pytest.approx(plain.m, rel=4 * 100 * unit_roundoff(torch.float64))
    assert plain.detections > 5
    assert plain.detections < 100 or options["threshold"] == 0
    assert controller.count.item() == 100


@matrix()
def test_the_threshold_is_strict_and_the_first_steps_count_evenly(where):
    for values, expected in (((0.5, 0.0, 0.25), 0.0), ((0.5, 0.0, 0.2578125), 10.0)):
        controller = AdaptiveLambda(10.0, **RELATIVE, threshold=0.25, horizon=100, min_history=1)
        for value in values:
            lam = where.update(controller, torch.tensor(value))
        assert lam.item() == expected
        assert controller.relative_mean.item() == pytest.approx(sum(values) / 3, rel=1e-15)


@matrix(triplets=[1, 2], penalty=["squared", "abs", "smooth_l1"])
def test_in_elle_loss_it_is_of_the_step_whatever_the_penalty(where, triplets, penalty):
    """Of the square of r and not of its penalty; from the losses of the triplets alone."""
    batch, classes = 6, 4
    controller = AdaptiveLambda(100.0, **RELATIVE, gamma=0.7, threshold=0.4, horizon=2, min_history=1)
    plain = Plain(100.0, gamma=0.7, threshold=0.4, horizon=2, min_history=1)
    target, alpha = labels(batch, classes), random(batch * triplets, seed=1)
    options = {"triplets": triplets, "penalty": penalty}
    for step in range(8):
        at_a = torch.randn(batch * triplets, classes, generator=rng(step))
        towards = torch.randn(batch * triplets, classes, generator=rng(step + 100))
        bend = (0.05, 0.1, 3.0, 2.0, 0.1, 0.05, 4.0, 0.1)[step]
        middle = at_a + alpha[:, None] * towards
        middle = middle + bend * torch.randn(batch * triplets, classes, generator=rng(step + 200))
        blocks = [each.unflatten(0, (triplets, batch)) for each in (at_a, at_a + towards, middle)]
        rows = torch.stack(blocks, dim=1).flatten(0, 2)
        logits = torch.cat([torch.randn(batch, classes, generator=rng(step + 300)), rows])
        loss, ce, e_lin = where.elle_loss(logits, target, alpha, controller, **options)
        expected = plain_relative(losses_of(rows, target.repeat(3 * triplets)), alpha, triplets)
        lam = plain.update(expected)
        # Losses of some 5 are rounded at 2^-22, sums of 36 squares of them at each of 40 operations.
        assert controller.relative_mean.item() == pytest.approx(plain.m, rel=1e-4)
        assert controller.lam.item() == pytest.approx(lam, rel=1e-6)
        assert loss.item() == pytest.approx(ce.item() + lam * e_lin.item(), rel=8 * unit_roundoff(torch.float32))
        alone = functional.relative_linearity(rows, target, alpha, **options)
        assert alone.item() == pytest.approx(expected, rel=1e-4)
    assert 1 <= plain.detections <= 7


@matrix()
def test_what_it_is_of_linear_constant_and_independent_losses(where):
    """0, next to 0 and 5/11; the same whatever the scale of the losses."""
    found, oracle = list[float](), list[float]()
    # More than one block of the kernels' reduction, of 1,024. An interpreter takes 24 s for 4,096 samples.
    batch = 1500 if where.slow else 4096
    target, alpha = torch.zeros(batch, dtype=torch.int64), random(batch, seed=2)
    free = torch.randn(3, batch, generator=rng(5))
    linear = torch.stack([free[0], free[1], (1 - alpha) * free[0] + alpha * free[1]])
    for losses in (linear, torch.ones(3, batch), free, 0.01 * free, 3e-5 * free, linear + 100, 100 + 1e-5 * free):
        # With two classes and one logit at 0 the loss is any number above 0: log(1 + exp(z)).
        shifted = losses - losses.min().clamp(max=0) + 0.5
        z = torch.expm1(shifted.double()).log().float()
        rows = torch.stack([torch.zeros(3 * batch), z.flatten()], dim=1)
        logits = torch.cat([torch.zeros(batch, 2), rows])
        for at, means in ((where, found), (Where("reference", "cpu"), oracle)):
            controller = AdaptiveLambda(1.0, **RELATIVE)
            at.elle_loss(logits, target, alpha, controller)
            means.append(controller.relative_mean.item())
    # Rounding leaves an r of some 1e-6 of losses of some 5, which differ by some 1.
    assert found[0] < 1e-10
    # Of a constant loss rounding leaves an r of some 2e-7 at most, whose square is 4 % of 1e-12.
    assert found[1] < 0.04
    # Losses of some 5 are rounded at 2^-22, and differ by some 1.
    assert found[2] == pytest.approx(oracle[2], rel=1e-6)
    # The standard error of a ratio of means over 4,096 samples: 1/64 times a factor of about 1; over 1,500 1/39.
    assert found[2] == pytest.approx(5 / 11, abs=0.05 if where.slow else 0.03)
    assert found[3] == pytest.approx(found[2], rel=1e-3)
    # Losses of some 0.5 are rounded at 3e-8, a thousandth of what they differ by here.
    assert found[4] == pytest.approx(found[2], rel=1e-2)
    # Of large losses a change below their own rounding, some 1e-5, is none.
    assert found[5] < 1e-6
    assert found[6] < 0.1


@not_finite
@matrix(part=["x_adv", "x_c"])
def test_a_loss_that_is_not_finite(where, part):
    """In the triplets it is skipped; in x_adv it is none of the detector's business."""
    target, alpha = labels(4, 3), random(4, seed=1)
    controller = AdaptiveLambda(10.0, **RELATIVE, threshold=0.0, min_history=1)
    for _ in range(3):
        where.elle_loss(torch.randn(16, 3, generator=rng(4)), target, alpha, controller)
    before = {name: value.clone() for name, value in controller.state_dict().items()}
    logits = torch.randn(16, 3, generator=rng(5))
    logits[1 if part == "x_adv" else 13] = math.nan
    where.elle_loss(logits, target, alpha, controller)
    after = controller.state_dict()
    assert before["lam"].item() == 10
    if part == "x_adv":
        assert (after["count"].item(), after["skipped"].item()) == (4, 0)
    else:
        assert after["skipped"].item() == 1
        assert all(torch.equal(after[name], value) for name, value in before.items() if name != "skipped")


def curved(of: Tensor) -> Tensor:
    """Two logits of a model whose loss is far from linear."""
    return torch.stack([20 * (30 * of).sin().sum(1), torch.zeros(len(of))], dim=1)


class Sine(nn.Module):
    """As :func:`curved`, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * curved(x)


def in_loss(**options: Any) -> list[tuple[float, float]]:
    """lam and mean of four steps of ELLELoss or of a method."""
    torch.manual_seed(3)
    ramp = options.pop("ramp", None)
    rule = AdaptiveLambda(7.0, **RELATIVE, threshold=0.1, min_history=1, gamma=0.5, ramp=ramp)
    criterion = ELLELoss(0.5, rule, **options)
    x, y = random(8, 5, seed=1), labels(8, 2)
    found, kept = [], []
    for _ in range(4):
        model = Sine()
        with no_host_sync():
            criterion(model, x, y).backward()
        found.append((rule.lam.item(), rule.relative_mean.item()))
        kept.append(criterion.stats["relative_mean"])
    assert [each.item() for each in kept] == [mean for _, mean in found]  # a step's numbers stay what they are
    return found


def test_in_every_way_through_the_loss():
    """Kernels, the reference, a loss of one's own, the lam of the step before, and light steps see the same."""
    expected = in_loss()
    assert [lam for lam, _ in expected] == [0.0, 7.0, 7.0, 7.0]

    def own(logits: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits, target, reduction="none")

    ways: list[dict[str, Any]] = [{"backend": "reference"}, {"loss_fn": own}, {"lagged": True}, {"forward": "split"}]
    for options in [*ways, {"ramp": 1}]:
        found = in_loss(**options)
        assert [lam for lam, _ in found] == [lam for lam, _ in expected]
        assert [mean for _, mean in found] == pytest.approx([mean for _, mean in expected], rel=1e-4)


def test_a_step_is_light_until_the_detection():
    torch.manual_seed(3)
    rule = AdaptiveLambda(7.0, **RELATIVE, threshold=0.1, min_history=2, gamma=0.5)
    criterion = ELLELoss(0.5, rule, skip_below=0.01)
    kinds = []
    for _ in range(5):
        kinds.append(criterion.next_kind(Sine()))
        criterion(Sine(), random(8, 5, seed=1), labels(8, 2)).backward()
    assert kinds == ["light", "light", "light", "full", "full"]


@pytest.mark.parametrize("name", ["elle-a", "n-fgsm+elle-a", "gat+elle-a", "nuat+elle-a", "plain+elle-a"])
def test_methods_take_the_rule(name):
    criterion = methods.build(name, eps=0.5, lam=5.0, rule="relative")
    core: Any = criterion
    assert (core.controller.rule, core.controller.lam_max) == ("relative", 5.0)
    for _ in range(5):
        criterion(Sine(), random(8, 5, seed=1), labels(8, 2)).backward()
    assert core.controller.count.item() == 5
    assert core.controller.relative_mean.item() > 0.2
    assert core.controller.lam.item() == 5.0


def test_a_frozen_call_and_eval_mode_leave_it_alone():
    rule = AdaptiveLambda(7.0, **RELATIVE)
    criterion = ELLELoss(0.5, rule, lagged=True)
    with criterion.frozen():
        criterion(Sine(), random(8, 5, seed=1), labels(8, 2))
    with torch.no_grad():
        criterion(Sine().eval(), random(8, 5, seed=1), labels(8, 2))
    assert rule.count.item() == 0
    assert rule.relative_mean.item() == 0


def test_restart_forgets():
    controller = AdaptiveLambda(7.0, **RELATIVE, start=2.0)
    for _ in range(5):
        controller.update(torch.tensor(0.9))
    assert controller.lam.item() == 7
    controller.restart()
    state = [controller.lam.item(), controller.count.item(), controller.relative_mean.item()]
    assert state == [2.0, 0, 0.0]


def test_with_a_ramp():
    controller = AdaptiveLambda(100.0, **RELATIVE, ramp=10, min_history=1)
    assert [round(controller.update(torch.tensor(0.9)).item(), 3) for _ in range(12)] == [
        *(0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0, 100.0)
    ]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rule": "papers"}, "rule: expected one of 'paper', 'relative', got 'papers'"),
        ({"threshold": 0.2}, "threshold: expected None with rule='paper', which has none, got 0.2"),
        ({"horizon": 8}, "horizon: expected None with rule='paper', which has none, got 8"),
        ({**RELATIVE, "sensitivity": 2.0}, "sensitivity: expected None with rule='relative', which has none, got 2.0"),
        ({**RELATIVE, "window": 5}, "window: expected None with rule='relative', which has none, got 5"),
        ({**RELATIVE, "threshold": 1.5}, r"threshold: expected a finite number in \[0, 1\], got 1.5"),
        ({**RELATIVE, "threshold": math.nan}, r"threshold: expected a finite number in \[0, 1\], got nan"),
        ({**RELATIVE, "horizon": 0}, "horizon: expected an integer >= 1, got 0"),
    ],
)
def test_options_of_one_rule_given_to_another(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        AdaptiveLambda(1.0, **options)


@pytest.mark.parametrize("saved, loaded", [({}, RELATIVE), (RELATIVE, {}), ({"window": 4}, RELATIVE)])
def test_a_state_of_another_rule(saved, loaded):
    one, other = AdaptiveLambda(1.0, **saved), AdaptiveLambda(1.0, **loaded)
    one.update(torch.tensor(0.5))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^state_dict: expected the state of rule='{other.rule}', with .*, got one"):
        other.load_state_dict(one.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_what_belongs_to_one_rule_cannot_be_set_on_another():
    with pytest.raises(AttributeError, match=r"it is no option of rule='relative'"):
        AdaptiveLambda(1.0, **RELATIVE).sensitivity = 3.0
    with pytest.raises(AttributeError, match=r"it is no option of rule='paper'"):
        AdaptiveLambda(1.0).threshold = 0.3
    controller = AdaptiveLambda(1.0, **RELATIVE, min_history=1)
    controller.threshold, controller.horizon = 0.5, 1
    assert [controller.update(torch.tensor(value)).item() for value in (0.1, 0.4, 0.6)] == [0.0, 0.0, 1.0]
    with pytest.raises(RuntimeError, match=r"^rule: expected 'paper', which has a history"):
        controller.moments()


@pytest.mark.parametrize("options", [{"points": "five-point"}, {"points": "elle-2p"}, {"of": "logits"}])
def test_it_is_of_three_points_and_of_losses(options):
    ((name, got),) = options.items()
    message = rf"^{name}: expected .* with relative E_lin \(rule='relative'\), got '{got}'$"
    controller = AdaptiveLambda(1.0, **RELATIVE)
    with pytest.raises(ValueError, match=message):
        ELLELoss(0.1, controller, **options)
    with pytest.raises(ValueError, match=message):
        functional.elle_loss(torch.randn(24, 3), labels(4, 3), random(4, seed=1), controller, **options)
    with pytest.raises(ValueError, match=message):
        functional.relative_linearity(torch.randn(24, 3), labels(4, 3), random(4, seed=1), **options)


def test_rounding_in_low_precision_is_warned_of_once():
    x, y = random(8, 5, seed=1), labels(8, 2)
    for precision, warned in ((None, 1), ("fp32", 0)):
        criterion = ELLELoss(0.5, AdaptiveLambda(7.0, **RELATIVE), triplet_precision=precision)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            criterion(Sine(), x, y)
            assert not found
            for _ in range(3):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    criterion(Sine(), x, y)
        assert [str(each.message).split(":")[0] for each in found] == ["triplet_precision"] * warned
    criterion = ELLELoss(0.5, AdaptiveLambda(7.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        criterion(Sine(), x, y)


def test_repr_and_options_show_the_rule():
    controller = AdaptiveLambda(7.0, **RELATIVE, threshold=0.3)
    shown = "lam=7.0, gamma=0.9, min_history=3, rule='relative', threshold=0.3, horizon=8"
    assert repr(controller) == f"AdaptiveLambda({shown})"
    assert set(controller.options) == {"lam", "gamma", "min_history", "rule", "threshold", "horizon"}


@pytest.mark.parametrize("name, value", [("threshold", 0.4), ("horizon", 5), ("gamma", 0.5)])
def test_a_captured_step_would_notice_another_option(name, value):
    """What its graph holds as a constant is compared before each replay."""
    controller = AdaptiveLambda(7.0, **RELATIVE)
    criterion = ELLELoss(0.5, controller)
    before = criterion.constants()
    assert criterion.constants() == before
    setattr(controller, name, value)
    assert criterion.constants() != before


def test_a_mean_above_one_is_no_state():
    controller = AdaptiveLambda(7.0, **RELATIVE)
    with pytest.raises(ValueError, match=r"^relative_mean: expected a number in \[0, 1\], .*, got 7"):
        controller.load_state_dict({**controller.state_dict(), "relative_mean": torch.tensor(7.0)})


def test_lam_auto_has_a_history():
    with pytest.raises(ValueError, match=r"^rule: expected 'paper' with lam='auto'"):
        methods.build("elle-a", eps=0.1, lam="auto", rule="relative")
    with pytest.raises(ValueError, match=r"^rule: method 'elle' takes .*; method 'elle-a' takes it"):
        methods.build("elle", eps=0.1, lam=1.0, rule="relative")
