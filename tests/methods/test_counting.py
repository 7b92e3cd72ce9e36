"""Methods that count steps, where a step has several calls: the first counts, and the frozen ones have its number."""

import copy

import pytest

from elle_fast.methods.awp import AWP
from elle_fast.methods.converge_smooth import Convergence
from elle_fast.methods.guided import Guided
from tests.helpers import about
from tests.methods.cases import BATCH, EPS, LAM, batch, build, smooth, step

PARTS = 3


def calls(criterion, model, steps):
    """For each call of so many steps of several parts: what was added to the cross-entropy, in units of the penalty."""
    (x, target), found = batch(), []
    for _ in range(steps):
        for part in range(PARTS):
            with criterion.frozen(part > 0):
                loss = criterion(model, x, target, **about(criterion, x)).detach()
            found.append(float((loss - criterion.stats["ce"]) / criterion.stats["penalty"]))
    return found


@pytest.mark.parametrize("name", ["nuat", "advlc", "liet"])
def test_all_parts_of_a_step_have_one_weight(name):
    found = calls(build(name, steps=5), smooth(), 5)
    weights = found[::PARTS]
    assert found == pytest.approx([weight for weight in weights for _ in range(PARTS)], rel=1e-6)
    assert sorted(weights) == weights
    assert weights[3] - weights[1] > 0.2 * LAM


def test_all_parts_of_a_step_are_guided_or_none(monkeypatch):
    found, attack = [], Guided._attack

    def seen(self, *given):
        found.append(given[-1])
        return attack(self, *given)

    monkeypatch.setattr(Guided, "_attack", seen)
    calls(build("gat"), smooth(), 4)
    assert found == ([0.0] * PARTS + [LAM] * PARTS) * 2
    # The call that AWP makes ahead of the step has the step's number, and so have both of a frozen one.
    criterion, (x, target) = AWP(build("gat")), batch()
    del found[:]
    for _ in range(2):
        for frozen in (False, True):
            with criterion.frozen(frozen):
                criterion(smooth(), x, target)
    assert found == [0.0] * 4 + [LAM] * 4
    assert copy.deepcopy(criterion).base._ahead == criterion.base._ahead == 0


def test_liet_makes_its_signs_anew_once_a_step():
    """Its 10 steps are those of a large eps."""
    (x, target), model, criterion = batch(), smooth(), build("liet", eps=EPS)
    passes: list[list[int]] = [[] for _ in range(12)]
    for number in passes:
        for part in range(PARTS):
            with criterion.frozen(part > 0):
                number.append(len(step(criterion, model, x, target)[1]))
    expected = [3 if part == 0 and number in (0, 10) else 2 for number in range(12) for part in range(PARTS)]
    assert [min(count, 3) for number in passes for count in number] == expected


@pytest.mark.parametrize("name", ["rs-cs", "mep-cs"])
def test_convergence_is_that_of_the_steps_epoch(name, monkeypatch):
    found, penalty = [], Convergence.penalty

    def seen(self, loss, samples, done, updates):
        found.append((done, updates))
        return penalty(self, loss, samples, done, updates)

    monkeypatch.setattr(Convergence, "penalty", seen)
    options = {"samples": BATCH} if name == "mep-cs" else {}
    criterion, (x, target) = build(name, epoch_steps=2, **options), batch()
    for _ in range(3):
        for part in range(PARTS):
            with criterion.frozen(part > 0):
                criterion(smooth(), x, target, **about(criterion, x))
    assert found == [(number, part == 0) for number in range(3) for part in range(PARTS)]


def test_the_warm_up_of_awp():
    (x, target), model, criterion = batch(), smooth(), AWP(build("fgsm"), 0.05, warmup=2)
    found = []
    for _ in range(4):
        for part in range(PARTS):
            with criterion.frozen(part > 0):
                found.append(len(step(criterion, model, x, target)[1]))
    assert found == [2] * 2 * PARTS + [3] * 2 * PARTS
