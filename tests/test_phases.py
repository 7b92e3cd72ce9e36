"""AdaptiveLambda over the phases of a training, against the rule of the ELLE authors' ImageNet trainer in plain Python.

There each phase (crops of 128, 224 and 288 pixels) is a process of its own, whose list of E_lin is empty; lam begins at
0, or at lam_max at eps 16/255; with N-FGSM lam_max grows by 1/2,500 of itself a step, and lam does not decay meanwhile.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from elle_fast import AdaptiveLambda, ELLELoss
from elle_fast.testing import no_host_sync
from tests.helpers import convnet, labels, matrix, not_finite, random, rng, unit_roundoff
from tests.test_adaptive import e_lins, same_state

GAMMA, SENSITIVITY, MIN_HISTORY = 0.99, 2.0, 3


def by_the_authors(
    phases: Sequence[Sequence[float]], lam: float, *, window: int, ramp: int | None = None, start: float = 0.0
) -> Iterator[tuple[float, bool]]:
    """lam of each step, and whether it was a detection."""
    for values in phases:
        weight, most, seen = start, lam if ramp is None else 0.0, list[float]()
        for step, value in enumerate(values):
            held = np.array(seen[-window:] or [0.0])
            detected = len(seen) >= MIN_HISTORY and value > held.mean() + SENSITIVITY * held.std()
            if detected:
                weight = most
            elif ramp is None or step > ramp:
                weight *= GAMMA
            seen.append(value)
            yield weight, bool(detected)
            if ramp is not None and step < ramp:
                most += lam / ramp


def values_of(steps: int, seed: int) -> list[float]:
    return [float(value) for value in e_lins(steps, seed=seed, spikes=0.02)]


def follows(phases: list[list[float]], window: int, **options: Any) -> list[tuple[float, bool]]:
    """The lam of each step, after it was compared with the authors'."""
    lam = 100_000.0
    controller = AdaptiveLambda(lam, window=window, **options)
    expected, found = list(by_the_authors(phases, lam, window=window, **options)), []
    for phase, values in enumerate(phases):
        if phase:
            controller.restart()
        found += [controller.update(torch.tensor(value)).item() for value in values]
    # In float32, with two roundings a step between detections that are less than 1,000 steps apart.
    for one, (other, _) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2_000 * unit_roundoff(torch.float32))
    return expected


def test_the_ramp_of_n_fgsm_over_two_phases():
    ramp, steps = 2_500, 2_900
    expected = follows([values_of(steps, 1), values_of(steps, 2)], 500, ramp=ramp)
    for phase in (expected[:steps], expected[steps:]):
        lams, detections = zip(*phase, strict=True)
        levels = {lam for lam, detected in phase if detected}
        assert lams[0] == 0
        assert len(levels) > 20  # each detection of the ramp has a weight of its own
        assert max(levels) == pytest.approx(100_000)
        assert sum(detections[ramp:]) > 2
        # It holds while it grows, and decays afterwards.
        steady = [
            later == lam for lam, later, detected in zip(lams, lams[1:], detections[1:], strict=False) if not detected
        ]
        assert all(steady[: ramp - sum(detections[: ramp + 1])])
        assert not any(steady[ramp:])


@pytest.mark.parametrize("start", [0.0, 100_000.0])
def test_the_first_weight_of_each_phase(start):
    steps = 700  # more than the window holds
    expected = follows([values_of(steps, 3), values_of(steps, 4)], 500, start=start)
    for phase in (expected[:steps], expected[steps:]):
        assert phase[0] == (GAMMA * start, False)
        assert sum(detected for _, detected in phase) > 3


def test_without_a_restart_the_next_phase_meets_the_history_of_the_last():
    """What restart is for: E_lin of the next phase is a hundred times as large, and only its own spike is one."""
    first, second = [1e-6] * 20, [1e-4] * 20
    kept, anew = AdaptiveLambda(10.0), AdaptiveLambda(10.0)
    for value in first:
        kept.update(torch.tensor(value)), anew.update(torch.tensor(value))
    anew.restart()
    assert kept.update(torch.tensor(second[0])).item() == 10
    assert [anew.update(torch.tensor(value)).item() for value in second] == [0] * 20
    assert anew.update(torch.tensor(1e-3)).item() == 10


@matrix(window=[None, 6])
@pytest.mark.parametrize("options", [{"ramp": 12}, {"start": 7.0}], ids=["ramp", "start"])
def test_any_backend_and_a_copy_at_any_step(where, window, options):
    """The same lam as the reference, in the middle of a ramp too; restored, copied and pickled it goes on alike."""
    values = torch.from_numpy(e_lins(40, seed=5, spikes=0.2)).unbind()
    controller, plain = (AdaptiveLambda(10.0, window=window, **options) for _ in range(2))
    for step, value in enumerate(values):
        if step == 30:
            controller.restart()
            plain.restart()
        if step in (5, 31):
            restored = AdaptiveLambda(10.0, window=window, **options)
            restored.load_state_dict(copy.deepcopy(controller.state_dict()))
            twins = [restored, copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))]
        lam = where.update(controller, value)
        assert torch.equal(lam, plain.update(value, backend="reference"))
        assert step < 5 or all(torch.equal(where.update(twin, value), lam) for twin in twins)
        if step == 29:
            for twin in twins:
                twin.restart()
    same_state(controller, plain)


@matrix(penalty=["squared", "smooth_l1"])
def test_a_ramp_in_elle_loss(where, penalty):
    """The lam of a step weighs its own E_lin, in the value and in the gradient."""
    controller, plain = (AdaptiveLambda(100.0, ramp=8, min_history=1, sensitivity=0.5) for _ in range(2))
    target, alpha = labels(3, 4), random(3, seed=1)
    lams = []
    for step, scale in enumerate((0.1, 0.3, 0.9, 0.1, 0.1, 2.0, 0.1, 0.1, 0.1, 0.1, 6.0, 0.1)):
        logits = (torch.randn(12, 4, generator=rng(step)) * scale).requires_grad_()
        loss, ce, e_lin = where.elle_loss(logits, target, alpha, controller, penalty=penalty)
        lams.append(plain.update(e_lin, backend="reference").item())
        assert controller.lam.item() == lams[-1]
        assert loss.item() == pytest.approx(ce.item() + lams[-1] * e_lin.item(), rel=4 * unit_roundoff(torch.float32))
        of_loss, of_ce, of_e_lin = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, ce, e_lin))
        error = 8 * unit_roundoff(torch.float32) * (of_ce.abs() + lams[-1] * of_e_lin.abs())
        assert ((of_loss - (of_ce + lams[-1] * of_e_lin)).abs() <= error).all()
    # 2/8 at the third step, held; 5/8 at the sixth, held until the ninth; the whole at the eleventh.
    assert lams[2:8] == [25.0, 25.0, 25.0, 62.5, 62.5, 62.5]
    assert lams[8:10] == pytest.approx([62.5, 0.99 * 62.5])
    assert lams[10] == 100


@not_finite
def test_a_value_that_is_not_finite_is_no_step_of_the_ramp():
    controller, clean = AdaptiveLambda(10.0, ramp=10), AdaptiveLambda(10.0, ramp=10)
    for step, value in enumerate(values_of(25, 6)):
        if step % 3 == 0:
            controller.update(torch.tensor(math.nan))
        assert torch.equal(controller.update(torch.tensor(value)), clean.update(torch.tensor(value)))
    assert controller.lam.item() > 0


@matrix(window=[None, 6])
def test_restart_is_in_place_and_does_not_wait(where, window):
    """A captured step goes on with the same memory; what was counted in vain stays counted."""
    controller = AdaptiveLambda(10.0, window=window, start=4.0)
    fresh = {name: t.clone() for name, t in controller.state_dict().items()}
    for value in (1.0, 2.0, math.nan, 1.0, 9.0):
        where.update(controller, torch.tensor(value))
    assert controller.lam.item() == 10
    before = {name: t.data_ptr() for name, t in controller.named_buffers()}
    with no_host_sync():
        controller.restart()
    assert {name: t.data_ptr() for name, t in controller.named_buffers()} == before
    after = controller.state_dict()
    assert after.pop("skipped").item() == 1
    assert all(torch.equal(t.cpu(), fresh[name]) for name, t in after.items())
    assert controller.on_host() == 4


def test_light_steps_follow_a_restart():
    """``skip_below`` reads lam on the host: the first step of a phase that starts at lam_max is full."""
    criterion = ELLELoss(0.1, AdaptiveLambda(5.0, start=5.0), skip_below=0.5)
    model, x, y = convnet(), random(4, 3, 8, 8, seed=1), labels(4, 4)
    assert criterion.controller is not None
    kinds = []
    for step in range(6):
        if step == 4:
            criterion.controller.restart()
        if step == 2:
            criterion.controller.lam.fill_(1.0)
        kinds.append(criterion.next_kind(model))
        criterion(model, x, y)
    assert kinds == ["full", "full", "light", "light", "full", "full"]


def test_repr_shows_what_is_given():
    assert repr(AdaptiveLambda(4.0, ramp=9)).endswith("window=None, ramp=9)")
    assert repr(AdaptiveLambda(4.0, start=2.0)).endswith("window=None, start=2.0)")
