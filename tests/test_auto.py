"""AutoLambda: its formula by hand, what the formula means, and every way to ask for it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elle_fast import AdaptiveLambda, AutoLambda, ELLELoss, methods
from elle_fast._core.host_copy import HostCopy
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, grads_of, labels, not_finite, random, rng, unit_roundoff
from tests.loss.cases import EPS, bent, ce_rows, data, per_sample
from tests.test_adaptive import e_lins

# Batches are large images here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:x. expected pictures in")


class ByHand:
    """A list, numpy's mean and population std, and lam in float32."""

    def __init__(self, rho=50.0, lam_max=1e6, gamma=0.99, sensitivity=2.0, min_history=3, window=None):
        self.rho, self.lam_max, self.gamma, self.sensitivity = rho, lam_max, gamma, sensitivity
        self.min_history, self.window = min_history, window
        self.lam, self.history, self.weights = np.float32(0), [], []

    def update(self, e_lin: float) -> float:
        held = np.array(self.history if self.window is None else self.history[-self.window :], dtype=np.float64)
        threshold = held.mean() + self.sensitivity * held.std() if len(held) else 0.0
        if len(self.history) >= self.min_history and e_lin > threshold:
            weight = self.lam_max if threshold == 0 else min(self.lam_max, self.rho / (2 * math.sqrt(threshold)))
            self.weights.append(weight)
            self.lam = np.float32(weight)
        else:
            self.lam = np.float32(np.float32(self.gamma) * self.lam)
        self.history.append(e_lin)
        return float(self.lam)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"rho": 1.0},
    {"rho": 1e4, "lam_max": 1e5},
    {"gamma": 0.0, "sensitivity": 1.0},
    {"min_history": 20},
    {"window": 7, "min_history": 5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_its_formula(options):
    controller, plain, steps = AutoLambda(**options), ByHand(**options), 250
    for value in e_lins(steps):
        lam = controller.update(torch.tensor(value))
        # A rounding of float32 for each step since the detection, on both sides.
        assert lam.item() == pytest.approx(plain.update(float(value)), rel=steps * 2 * unit_roundoff(torch.float32))
        assert (lam.dtype, lam.dim()) == (torch.float32, 0)
        assert torch.equal(lam, controller.lam)
    assert len(set(plain.weights)) > 2  # so it is no constant
    assert (1e5 in plain.weights) == ("lam_max" in options)


def test_the_slope_at_the_threshold_is_rho_times_the_cross_entropys():
    """Gradients of both terms by autograd in float64, with respect to the losses that they are made of."""
    rho, model, (x, y) = 30.0, bent(), data()
    controller = AutoLambda(rho)
    for value in (1e-4, 2e-4, 4e-4, 1e-4):
        controller.update(torch.tensor(value, dtype=torch.float64))
    mean, std = controller.moments()
    threshold = (mean + 2 * std).item()

    alpha = torch.linspace(0.1, 0.9, len(y), dtype=torch.float64)
    a, b = x + 0.1, x - 0.05 * x.sign()
    points = (a, b, torch.lerp(a, b, per_sample(alpha, x)))
    losses = [ce_rows(model, point, y).detach().requires_grad_() for point in (x, *points)]
    residual = losses[3] - (1 - alpha) * losses[1] - alpha * losses[2]
    # A batch whose E_lin is the threshold's, as a scale of the residual gives.
    scale = math.sqrt(threshold / residual.detach().square().mean().item())
    r = (scale * residual).detach().requires_grad_()
    assert r.square().mean().item() == pytest.approx(threshold, rel=1e-12)
    ce = losses[0].mean()
    lam = controller.update(torch.tensor(1.001 * threshold, dtype=torch.float64)).double()
    (of_r,), (of_ce,) = torch.autograd.grad(lam * r.square().mean(), r), torch.autograd.grad(ce, losses[0])
    # lam is rounded to float32.
    assert (of_r.norm() / of_ce.norm()).item() == pytest.approx(rho, rel=2 * unit_roundoff(torch.float32))


def test_in_the_logits_the_ratio_is_about_the_one_that_is_said():
    """sqrt(1 + 2/3) = 1.29 where all rows have the same |softmax - onehot|, and alpha is uniform: here both nearly."""
    logits = (1e-2 * random(4 * 512, 10, seed=0, dtype=torch.float64)).requires_grad_()
    target, alpha = labels(512, 10), torch.rand(512, dtype=torch.float64, generator=rng(1))
    l_adv, l_a, l_b, l_c = torch.nn.functional.cross_entropy(logits, target.repeat(4), reduction="none").chunk(4)
    e_lin = (l_c - (1 - alpha) * l_a - alpha * l_b).square().mean()
    (of_ce,) = torch.autograd.grad(l_adv.mean(), logits, retain_graph=True)
    (of_e,) = torch.autograd.grad(e_lin, logits)
    ratio = of_e.norm() / of_ce.norm() / (2 * e_lin.sqrt())
    assert ratio.item() == pytest.approx(math.sqrt(5 / 3), rel=0.1)


def test_a_jump_is_weighed_by_the_steps_before_it():
    controller = AutoLambda()
    for value in (1e-6, 2e-6, 3e-6):
        controller.update(torch.tensor(value))
    before = controller.weight()
    for jump in (1e-5, 10.0):  # however large
        assert copy.deepcopy(controller).update(torch.tensor(jump)).item() == pytest.approx(before.item(), rel=1e-6)
    # 2e-6 and twice the population's deviation.
    assert before.item() == pytest.approx(25 / math.sqrt(2e-6 + 2 * math.sqrt(2 / 3) * 1e-6), rel=1e-6)


def test_a_history_of_zeros_gives_lam_max():
    controller = AutoLambda(lam_max=123.0)
    assert controller.weight().item() == 123.0
    for _ in range(3):
        assert controller.update(torch.tensor(0.0)).item() == 0
    assert controller.update(torch.tensor(1e-12)).item() == 123.0


@not_finite
@pytest.mark.parametrize("window", [None, 6])
def test_a_value_that_is_not_finite_is_skipped(window):
    controller, clean = AutoLambda(window=window), AutoLambda(window=window)
    for step, value in enumerate(e_lins(40, seed=2, spikes=0.2)):
        bad = (math.nan, math.inf)[step % 2]
        before = controller.lam.item()
        assert controller.update(torch.tensor(bad)).item() == before
        assert torch.equal(controller.update(torch.tensor(value)), clean.update(torch.tensor(value)))
    assert controller.skipped.item() == 40
    assert clean.lam.item() > 0


@pytest.mark.parametrize("window", [None, 6])
def test_copies_and_checkpoints_continue_identically(window):
    values = torch.from_numpy(e_lins(60, seed=3, spikes=0.1)).unbind()
    controller = AutoLambda(window=window)
    for value in values[:25]:
        controller.update(value)
    restored = AutoLambda(window=window)
    restored.load_state_dict(copy.deepcopy(controller.state_dict()))
    twins = [restored, copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
    for value in values[25:]:
        expected = controller.update(value)
        assert all(torch.equal(twin.update(value), expected) for twin in twins)
    assert controller.lam.item() > 0


# ---- In a loss


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Large images, to which eps is little, until step 4; from then on small ones, and so E_lin jumps."""
    return random(4, 3, 8, 8, seed=step) * (20 if step < 4 else 1), labels(4, 4, seed=step)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forward": "split"},
        {"points": "elle-2p"},
        {"points": "five-point"},
        {"lagged": True},
        {"triplet_fraction": 0.5},
        {"of": "logits"},
        {"loss_fn": lambda output, target: torch.nn.functional.cross_entropy(output, target, reduction="none")},
        {"max_ratio": 100.0},
        {"backend": "reference"},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_a_loss_is_elle_as_with_lam_max_set_by_hand_before_each_step(options):
    auto = ELLELoss(EPS, lam="auto", generator=rng(1), **options)
    byhand = ELLELoss(EPS, AdaptiveLambda(1.0), generator=rng(1), **options)
    model, controller, lams = convnet(), byhand.controller, []
    assert isinstance(auto.controller, AutoLambda)
    assert controller is not None
    for step in range(8):
        mean, std = controller.moments()
        threshold = (mean + 2 * std).item()
        controller.lam_max = 1e6 if threshold == 0 else min(1e6, 25 / math.sqrt(threshold))
        expected, found = byhand(model, *batch(step)), auto(model, *batch(step))
        # E_lin and ce are the same; lam and the sum are rounded apart.
        close: dict[str, Any] = {"rtol": 20 * unit_roundoff(torch.float32), "atol": 0.0}
        torch.testing.assert_close(found, expected, **close)
        for name in ("ce", "e_lin", "lam"):
            torch.testing.assert_close(auto.stats[name], byhand.stats[name], **close)
        lams.append(auto.stats["lam"].item())
        if step == 5 and not auto.lagged:
            pairs = zip(grads_of(found, model), grads_of(expected, model), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert max(lams) > 1
    assert lams[2] == 0  # too short a history


def test_a_step_waits_for_nothing():
    criterion, model = ELLELoss(EPS, lam="auto"), convnet()
    criterion(model, *batch(0))
    with no_host_sync():
        criterion(model, *batch(1)).backward()


@pytest.mark.parametrize("make", [AutoLambda, lambda: AdaptiveLambda(10.0)], ids=["auto", "elle-a"])
def test_in_a_compiled_step_the_history_is_that_of_eager_mode(make):
    eager, compiled = make(), make()
    torch.compiler.reset()
    run = torch.compile(lambda e_lin: compiled.update(e_lin, "reference"), backend="aot_eager", fullgraph=True)
    for value in torch.from_numpy(e_lins(30, seed=3, spikes=0.2)).unbind():
        assert torch.equal(run(value), eager.update(value, "reference"))
    assert all(torch.equal(value, eager.state_dict()[name]) for name, value in compiled.state_dict().items())
    assert min(eager.mean.item(), eager.lam.item()) > 0


def test_a_frozen_call_leaves_the_history_alone():
    criterion, model = ELLELoss(EPS, lam="auto"), convnet()
    for step in range(6):
        criterion(model, *batch(step))
    before = copy.deepcopy(criterion.state_dict())
    with criterion.frozen():
        criterion(model, *batch(6))
    assert before
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    assert criterion.stats["lam"].item() > 0


def test_light_steps_are_measured_against_what_a_detection_would_set():
    criterion, model = ELLELoss(EPS, AutoLambda(gamma=0.1), skip_below=0.05), convnet()
    kinds, parts = [], []
    for step in range(9):
        assert isinstance(criterion.controller, AutoLambda)
        parts.append((criterion.controller.lam / criterion.controller.weight()).item())
        kinds.append(criterion.next_kind(model))
        criterion(model, *batch(step % 4 if step != 4 else 4))
    assert kinds == ["light" if part <= 0.05 else "full" for part in parts]
    assert {"light", "full"} == set(kinds)
    assert not AutoLambda().at_most(-1)
    assert all(AutoLambda().at_most(part) for part in (0.0, 1.0))


def test_1_takes_in_a_lam_that_is_more_than_a_detection_would_set_now():
    controller = AutoLambda(gamma=1.0)
    for value in (1.0, 2.0, 3.0, 9.0):
        controller.update(torch.tensor(value))
    assert controller.lam.item() > controller.weight().item()
    assert controller.at_most(1.0)
    assert not controller.at_most(0.99)


def test_a_copy_under_way_is_for_that_lam_alone():
    class Waits:
        def synchronize(self) -> None:
            pass

    controller = AutoLambda()
    controller.lam.fill_(1.0)
    controller._sent = HostCopy(controller.lam, controller.lam._version, torch.tensor(0.25), Waits())  # type: ignore[arg-type]
    assert controller.on_host() == 0.25
    assert (controller.at_most(0.25), controller.at_most(0.2)) == (True, False)
    controller.update(torch.tensor(1.0))
    # What is on the device: 0.99 of lam.
    assert controller.on_host() == pytest.approx(0.99 / 25)


@pytest.mark.parametrize("name", [name for name, row in methods.TABLE.items() if "skip_below" in row.levers])
def test_every_method_with_elle_a_takes_it(name):
    criterion: Any = methods.build(name, eps=0.1, lam="auto")
    model = convnet()
    for step in range(8):
        loss = criterion(model, *batch(step))
    assert loss.isfinite()
    assert criterion.stats["lam"].item() > 0


# ---- What is refused


@pytest.mark.parametrize("lam", ["Auto", "", "4000"])
def test_another_string(lam):
    with pytest.raises(ValueError, match=f"^lam: expected a number >= 0, 'auto' or an AdaptiveLambda, got '{lam}'$"):
        ELLELoss(EPS, lam=lam)


@pytest.mark.parametrize("name", ["rho", "lam_max"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_are_not_above_0(name, value):
    for refused in (lambda: AutoLambda(**{name: value}), lambda: setattr(AutoLambda(), name, value)):
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number in \\(0, "):
            refused()


@pytest.mark.parametrize("penalty", ["abs", "smooth_l1"])
def test_a_penalty_that_is_no_square(penalty):
    with pytest.raises(ValueError, match=f"^lam: 'auto' .* expected penalty='squared' beside it, got '{penalty}'$"):
        ELLELoss(EPS, lam="auto", penalty=penalty)


@pytest.mark.parametrize(
    "name, hint", [("elle", "; method 'elle-a' takes it"), ("gat+elle", "; method 'gat+elle-a' takes it"), ("nuat", "")]
)
def test_a_method_without_elle_a(name, hint):
    expected = f"^lam: method '{name.replace('+', '[+]')}' .*does not apply \\(got 'auto'\\){hint.replace('+', '[+]')}$"
    with pytest.raises(ValueError, match=expected):
        methods.build(name, eps=0.1, lam="auto")


def test_what_a_captured_step_cannot_follow_names_rho():
    criterion = ELLELoss(EPS, lam="auto")
    before = criterion.constants()
    assert criterion.constants() == before
    assert isinstance(criterion.controller, AutoLambda)
    criterion.controller.rho = 40.0
    assert criterion.constants() != before


def test_repr_shows_the_options():
    assert repr(AutoLambda(rho=20.0, window=9)) == (
        "AutoLambda(rho=20.0, lam_max=1000000.0, gamma=0.99, sensitivity=2.0, min_history=3, window=9)"
    )
