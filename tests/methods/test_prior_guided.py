"""FGSM-PGI against its formula over several epochs, from the points that its forward passes see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elle_fast import capture, data, methods
from elle_fast.methods.prior_guided import PriorGuided
from tests.helpers import labels, random
from tests.methods.formulas import (
    BATCH,
    CLASSES,
    CLOSE,
    EPS,
    FEATURES,
    LAM,
    SAMPLES,
    Kept,
    check,
    epochs,
    gradient,
    mean_loss,
    smooth,
    step,
    train,
    training_set,
)


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize("name", ["pgi", "pgi-ep"])
def test_an_attack_begins_where_that_of_the_epoch_before_ended(name, bounds):
    (x, target), model, kept = training_set(), smooth(), Kept(bounds)
    criterion = methods.build(name, eps=EPS, lam=LAM, bounds=bounds, samples=SAMPLES)
    momenta = torch.zeros_like(x)
    turned, partial = 0, 0
    for epoch in epochs(5):
        for index in epoch:
            loss, (start, x_adv) = step(criterion, model, x[index], target[index], samples=index)
            delta, expected = kept.start(index, x[index], start)
            assert (delta.abs() <= EPS * (1 + 1e-12)).all()
            torch.testing.assert_close(start, expected, **CLOSE)
            grad = gradient(model, start, target[index])
            torch.testing.assert_close(x_adv, kept.reach(x[index], delta, grad), **CLOSE)
            momenta[index] = grad / grad.abs().sum() + 0.3 * momenta[index]
            following = x_adv if name == "pgi-ep" else kept.reach(x[index], delta, momenta[index])
            turned += int((momenta[index].sign() != grad.sign()).sum())
            partial += int((((following - x[index]) / EPS).round(decimals=6) % 1 != 0).sum())
            kept.keep(index, following - x[index])
            penalty = (model(x_adv) - model(start)).square().mean()
            check(criterion, loss, mean_loss(model, x_adv, target[index]) + LAM * penalty, model)
            torch.testing.assert_close(criterion.stats["penalty"], penalty.detach(), **CLOSE)
            train(model, mean_loss(model, x_adv, target[index]))
    assert turned > 0  # else FGSM-EP would pass for FGSM-MEP
    assert (partial > 0) == (bounds is not None)  # and clamped perturbations are kept too


def test_all_begin_with_signs_and_do_so_anew():
    (x, target), model = training_set(), smooth()
    criterion = PriorGuided(EPS, LAM, SAMPLES, epoch_steps=3, reset_epochs=2)
    signs = []
    for number, epoch in enumerate(epochs(5)):
        starts = torch.zeros_like(x)
        for index in epoch:
            loss, (start, _) = step(criterion, model, x[index], target[index], samples=index)
            starts[index] = (start - x[index]) / EPS
            if number % 2 == 0:
                assert criterion.momenta is not None
                assert (criterion.momenta.values[index] != 0).all()
            train(model, loss)
        whole = torch.allclose(starts.abs(), torch.ones_like(starts))
        assert whole == (number % 2 == 0)  # an epoch's end is 0 where two signs differ
        if whole:
            signs.append(starts)
    assert 0.2 < (signs[0] > 0).double().mean() < 0.8
    assert not torch.equal(signs[0].round(), signs[1].round())


def test_the_momentum_begins_anew_too():
    (x, target), model = training_set(), smooth()
    criterion = PriorGuided(EPS, LAM, SAMPLES, epoch_steps=1, reset_epochs=1)
    for index in epochs(2)[0]:
        _, (start, _) = step(criterion, model, x[index], target[index], samples=index)
        grad = gradient(model, start, target[index])
        assert criterion.momenta is not None
        expected = grad / grad.abs().mean()
        torch.testing.assert_close(criterion.momenta.values[index].double(), expected, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("aligned", [False, True])
def test_what_is_kept_moves_with_the_image_if_it_is_aligned(aligned):
    images = (random(6, 2, 5, 6, seed=2) * 255).to(torch.uint8)
    split = data.Split(images, labels(6, CLASSES))
    criterion = PriorGuided(EPS, LAM, 6, decay=0.0, aligned=aligned)
    model = nn.Sequential(nn.Flatten(), nn.Linear(60, CLASSES)).double()
    frames: dict[int, Tensor] = {}
    for epoch in range(4):
        for x, y, samples in data.identified_batches(split, 3, seed=0, epoch=epoch, augment=True):
            points = x.double()
            _, (start, x_adv) = step(criterion, model, points, y, samples=samples)
            assert samples.offsets is not None
            assert samples.flips is not None
            for row, place in enumerate(samples.index.tolist()):
                top, left, flip = *samples.offsets[:, row].tolist(), bool(samples.flips[row])
                found = torch.zeros(2, 5 + 8, 6 + 8, dtype=torch.float64)  # with the border
                if not aligned:
                    top, left, flip = 4, 4, False
                window = found[:, top : top + 5, left : left + 6]
                mask = torch.zeros_like(found)
                mask[:, top : top + 5, left : left + 6] = 1
                if place in frames:
                    found[:, 4:9, 4:10] = frames[place]
                    seen = (start - points)[row]
                    torch.testing.assert_close(seen.flip(-1) if flip else seen, window, **CLOSE)
                    window.copy_((x_adv - points)[row].flip(-1) if flip else (x_adv - points)[row])
                    frames[place] = found[:, 4:9, 4:10].clone()
                else:
                    frames[place] = criterion.perturbations.values[place].double() * EPS / 127
                    delta = (x_adv - points)[row].flip(-1) if flip else (x_adv - points)[row]
                    inside = mask[:, 4:9, 4:10].bool()
                    window.copy_(delta)
                    torch.testing.assert_close(frames[place][inside], found[:, 4:9, 4:10][inside], **CLOSE)


@pytest.mark.parametrize(
    "given, error, said",
    [
        (None, TypeError, "got None"),
        (3, TypeError, r"got 3 \(int\)"),
        ([0, 1, 2, 3], TypeError, "got "),
        (torch.arange(BATCH).float(), TypeError, "torch.float32"),
        (torch.arange(BATCH)[:, None], TypeError, r"\[4, 1\]"),
        (torch.arange(BATCH + 1), ValueError, r"\[5\]"),
        (data.Samples(torch.arange(BATCH - 1)), ValueError, r"\[3\]"),
    ],
)
def test_samples_that_do_not_fit_the_batch(given, error, said):
    x, target = (part[:BATCH] for part in training_set())
    criterion = PriorGuided(EPS, LAM, SAMPLES)
    with pytest.raises(error, match=rf"^samples: expected the places of {BATCH} training samples, int64 .*{said}"):
        criterion(smooth(), x, target, samples=given)
    assert criterion.state_dict()["_extra_state"] == 0
    criterion(smooth(), x, target, samples=data.Samples(torch.arange(BATCH)))


@pytest.mark.parametrize("index, said", [([0, 1, 2, SAMPLES], "from 0 to 12"), ([-1, 1, 2, 3], "from -1 to 3")])
def test_samples_that_the_training_set_does_not_have(index, said):
    x, target = (part[:BATCH] for part in training_set())
    criterion = PriorGuided(EPS, LAM, SAMPLES)
    with pytest.raises(ValueError, match=rf"^samples: expected places in \[0, {SAMPLES}\), .* got some {said}"):
        criterion(smooth(), x, target, samples=torch.tensor(index))


def test_samples_of_another_shape():
    x, target = (part[:BATCH] for part in training_set())
    criterion, model = PriorGuided(EPS, LAM, SAMPLES), smooth()
    criterion(model, x, target, samples=torch.arange(BATCH))
    with pytest.raises(ValueError, match=rf"^x: expected samples of shape \[{FEATURES}\], .* got .*\[4, 3\]"):
        criterion(model, x[:, :3], target, samples=torch.arange(BATCH))


def test_a_validation_needs_no_samples_and_begins_with_signs():
    x, target = (part[:BATCH] for part in training_set())
    criterion, model = PriorGuided(EPS, LAM, SAMPLES), smooth()
    criterion(model, x, target, samples=torch.arange(BATCH))
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.eval()
    with torch.no_grad():
        _, (start, _) = step(criterion, model, x, target)
        torch.testing.assert_close((start - x).abs(), torch.full_like(x, EPS), **CLOSE)
        _, (start, _) = step(criterion, model, x, target, samples=torch.arange(BATCH))
    assert not torch.allclose((start - x).abs(), torch.full_like(x, EPS))
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    criterion.train()
    with criterion.frozen(), pytest.raises(TypeError, match=r"^samples: "):
        criterion(model, x, target)


@pytest.mark.parametrize("name", ["pgi", "pgi-ep", "pco", "mep-cs"])
def test_the_state_of_another_training_set_is_refused(name):
    x, target = (part[:BATCH] for part in training_set())
    made: list[Any] = [methods.build(name, eps=EPS, samples=count, epoch_steps=3) for count in (SAMPLES, SAMPLES + 1)]
    made[0](smooth(), x, target, samples=torch.arange(BATCH))
    before = {key: value.clone() for key, value in made[1].state_dict().items()}
    with pytest.raises(ValueError, match=r"^criterion: expected the state of 13 training samples, .*got .*\[12, 5\].*"):
        made[1].load_state_dict(made[0].state_dict())
    assert before["perturbations._extra_state"].equal(made[1].state_dict()["perturbations._extra_state"])
    with pytest.raises(TypeError, match=r"^samples: method '.*' keeps something for each training sample; expected"):
        methods.build(name, eps=EPS, epoch_steps=3)


def test_what_is_kept_costs_what_the_docstring_says():
    x, y = random(2, 3, 32, 32, seed=0), labels(2, CLASSES)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, CLASSES))
    for name, size in (("pgi", 9216), ("pgi-ep", 3072), ("pco", 3072)):
        criterion = methods.build(name, eps=EPS, samples=10)
        criterion(model, x, y, samples=torch.arange(2))
        kept = [value for key, value in criterion.state_dict().items() if key != "_extra_state"]
        assert sum(value.nbytes for value in kept) == 10 * size
    assert "9,216 a CIFAR image" in str(PriorGuided.__doc__)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_does_not_stay(value):
    x, target = (part[:BATCH] for part in training_set())
    criterion, model = PriorGuided(EPS, LAM, SAMPLES), smooth()
    broken = smooth()
    with torch.no_grad():
        next(broken.parameters()).fill_(value)
    criterion(broken, x, target, samples=torch.arange(BATCH))
    assert all(value.isfinite().all() for value in criterion.state_dict().values())
    assert criterion(model, x, target, samples=torch.arange(BATCH)).isfinite()


@pytest.mark.parametrize("name", ["pgi", "pgi+elle-a"])
def test_capture_refuses_it(name):
    x, target = (part[:BATCH] for part in training_set())
    model = smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    criterion: Any = methods.build(name, eps=EPS, samples=SAMPLES)
    with pytest.raises(
        ValueError, match=r"^criterion: expected one whose .* got one where PriorGuided counts its steps on the host; "
    ):
        capture(criterion, model, optimizer, x, target)


def test_a_radius_of_zero():
    x, target = (part[:BATCH] for part in training_set())
    criterion, model = PriorGuided(0.0, LAM, SAMPLES), smooth()
    for _ in range(2):
        _, (start, x_adv) = step(criterion, model, x, target, samples=torch.arange(BATCH))
        assert torch.equal(start, x)
        assert torch.equal(x_adv, x)
