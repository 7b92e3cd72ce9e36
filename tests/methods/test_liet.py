"""LIET against its authors' loop, restated here, in float64."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import methods
from elle_fast.methods.counting import ahead
from elle_fast.methods.liet import LIET, divergence
from elle_fast.recipes.config import TrainConfig
from tests.helpers import Smooth, convnet, grads_of, labels, probabilities, random

B, D, C, LAM = 6, 400, 4, 30.0
SMALL, LARGE = 8 / 255, 16 / 255
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = random(B, D, seed=step, dtype=torch.float64)
    return torch.where(x < 0.2, 0.0, torch.where(x > 0.9, 1.0, x)), labels(B, C, seed=step)


def smooth() -> nn.Module:
    return Smooth(D, C, gain=3.0).double()


def build(eps: float, smoothing: float = 0.0, **options: Any) -> Any:
    given = {"eps": eps, "lam": LAM, "bounds": (0.0, 1.0), "label_smoothing": smoothing, **options}
    return methods.build("liet", **given)


def step(criterion: Any, model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, the points of the batch, and those of constant images."""
    points: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: points.append(args[0].detach().clone()))
    loss = criterion(model, x, target)
    hook.remove()
    return loss, points[-2:], points[:-2]


def js(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(dim=1) + (q * (q / m).log()).sum(dim=1)).mean() / 2


def class_signs(model: nn.Module) -> Tensor:
    rows = []
    for each in range(C):
        point = torch.full((1, D), 0.5, dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(model(point), torch.tensor([each]))
        rows.append(torch.autograd.grad(loss, point)[0][0].sign())
    return torch.stack(rows)


def descend(model: nn.Module, grads: Any) -> None:
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.sub_(0.3 * grad)


@pytest.mark.parametrize("eps, every, most", [(SMALL, 20, 0.5), (LARGE, 10, 1.0)])
def test_their_loop_over_several_steps(eps, every, most):
    """Steps of two epochs, each of 27; LI is new at their beginnings and every so many steps."""
    length, epochs, large = 27, 2, eps == LARGE
    criterion, model = build(eps, steps=epochs * length, epoch_steps=length, bounds=None), smooth()
    shares, sides, renewed, own = [], set(), [], torch.empty(0)
    for i in range(epochs * length):
        x, y = batch(i)
        if i % length % every == 0:
            own = class_signs(model)
        loss, (start, x_adv), constant = step(criterion, model, x, y)
        if i == 0:  # classes are counted
            assert torch.equal(constant.pop(0), x)
        renewed += [i] * len(constant)
        assert all(torch.equal(each, torch.full((C, D), 0.5, dtype=torch.float64)) for each in constant)
        torch.testing.assert_close(criterion.signs.double(), own, **CLOSE)

        moved = (start - x) / eps
        kept = [((moved - side * own[y]).abs() < 1e-12) for side in (1, -1)]
        place = int(kept[1].sum() > kept[0].sum())
        share, noise = 1 - kept[place].double().mean().item(), moved[~kept[place]]
        shares.append(share)
        sides.add(place)
        assert noise.numel() == 0 or noise.abs().max() <= (2 if large else 1)
        if noise.numel() > 500:
            # Uniform: the standard deviation of its mean is 0.58 (1.15) / sqrt(500) at most.
            assert noise.abs().max() > (1.9 if large else 0.95)
            assert abs(noise.mean().item()) < (0.3 if large else 0.15)

        point = start.clone().requires_grad_()
        logits = model(point)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), point, retain_graph=True)
        expected = start + eps * grad.sign()
        if not large:
            expected = x + (expected - x).clamp(-eps, eps)
        torch.testing.assert_close(x_adv, expected, **CLOSE)
        logits_adv = model(x_adv)
        weight = LAM * (i // length + 1) / epochs
        value = F.cross_entropy(logits_adv, y) + weight * js(logits.softmax(dim=1), logits_adv.softmax(dim=1))
        torch.testing.assert_close(loss, value, **CLOSE)
        grads = grads_of(loss, model)
        for one, other in zip(grads, grads_of(value, model), strict=True):
            torch.testing.assert_close(one, other, **CLOSE)
        assert torch.equal(criterion.output, logits_adv.detach())
        descend(model, grads)
    assert renewed == [epoch * length + i for epoch in range(epochs) for i in range(0, length, every)]
    assert sides == {0, 1}
    # Of 2,400 entries the share is some 0.01 from the one that is drawn.
    assert max(shares) < most + 0.05
    assert max(shares) > most - 0.1
    assert min(shares) > (0.05 if not large else -1)
    assert min(shares) < (0.2 if not large else 0.15)


def test_points_are_clamped():
    for eps in (SMALL, LARGE):
        criterion, model = build(eps), smooth()
        for i in range(3):
            x, y = batch(i)
            _, points, _ = step(criterion, model, x, y)
            assert all(point.min() >= 0 and point.max() <= 1 for point in points)
            furthest = (points[1] - x).abs().max()
            assert furthest <= SMALL + 1e-12 if eps == SMALL else furthest > LARGE + 0.01


def test_the_label_smoothing_is_not_uniform_and_that_of_the_attack_too():
    """The draws in their order: noise, share and side, mask, and classes' shares for each of three losses."""
    (x, y), model, criterion = batch(0), smooth(), build(SMALL, 0.6, classes=C)

    def smoothed(logits: Tensor, target: Tensor) -> Tensor:
        hard = F.one_hot(target, C).double()
        shares = torch.rand(len(target), C).double() * (1 - hard)
        soft = 0.4 * hard + 0.6 * shares / shares.sum(dim=1, keepdim=True)
        torch.testing.assert_close(soft.sum(dim=1), torch.ones(len(target), dtype=torch.float64))
        return -(soft * logits.log_softmax(dim=1)).sum(dim=1).mean()

    torch.manual_seed(3)
    loss, (start, x_adv), _ = step(criterion, model, x, y)
    torch.manual_seed(3)
    grey = torch.full((C, D), 0.5, dtype=torch.float64, requires_grad=True)
    own = torch.autograd.grad(smoothed(model(grey), torch.arange(C)), grey)[0].sign()
    assert not torch.equal(own, class_signs(model))
    noise, (share, side), mask = 2 * torch.rand_like(x) - 1, torch.rand(2), torch.rand(x.shape)
    delta = torch.where(mask < 0.1 + 0.4 * share, noise, own[y])
    point = (x + (1 if side >= 0.5 else -1) * SMALL * delta).clamp(0, 1).requires_grad_()
    torch.testing.assert_close(start, point.detach(), **CLOSE)
    logits = model(point)
    (grad,) = torch.autograd.grad(smoothed(logits, y), point, retain_graph=True)
    expected = (x + (start + SMALL * grad.sign() - x).clamp(-SMALL, SMALL)).clamp(0, 1)
    torch.testing.assert_close(x_adv, expected, **CLOSE)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, y), point, retain_graph=True)
    assert not torch.equal(plain.sign(), grad.sign())
    logits_adv = model(x_adv)
    value = smoothed(logits_adv, y) + LAM * js(logits.softmax(dim=1), logits_adv.softmax(dim=1))
    torch.testing.assert_close(loss, value, **CLOSE)


@pytest.mark.parametrize(
    "eps, data, smoothing",
    [(0.01, "mnist", 0.6), (SMALL, "cifar10", 0.6), (SMALL, "cifar100", 0.8), (LARGE, "cifar100", 0.4)],
)
def test_the_label_smoothing_is_its_own(eps, data, smoothing):
    for name in ("liet", "liet+elle-a"):
        config = TrainConfig(method=name, eps=eps, data=data)
        assert config.resolved().label_smoothing == smoothing
        assert replace(config, label_smoothing=0.1).resolved().label_smoothing == 0.1
        if data != "cifar100":
            assert methods.build(name, eps=eps).core.label_smoothing == smoothing
    assert TrainConfig(method="uap+elle-a").resolved().label_smoothing == 0
    assert methods.build("liet", eps=eps, label_smoothing=0.0).label_smoothing == 0
    one_class = methods.build("liet", eps=eps)
    assert one_class(Smooth(D, 1), batch(0)[0].float(), torch.zeros(B, dtype=torch.int64)).isfinite()


@pytest.mark.parametrize(
    "options, weights",
    [
        ({}, [1, 1, 1, 1]),
        ({"steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1]),
        ({"steps": 5, "epoch_steps": 2}, [1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_the_weight_grows_by_the_epoch(options, weights):
    (x, y), criterion, model = batch(0), build(SMALL, **options), smooth()
    for weight in weights:
        loss = criterion(model, x, y).detach()
        penalty = criterion.stats["penalty"]
        assert penalty > 0
        torch.testing.assert_close(loss, criterion.stats["ce"] + weight * LAM * penalty, **CLOSE)


@pytest.mark.parametrize("stop", [3, 20])
def test_a_run_that_is_resumed_ends_with_the_same_bits(stop):
    def run(criterion: Any, model: nn.Module, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            descend(model, grads_of(criterion(model, *batch(i)), model))

    whole, model = build(SMALL, 0.6, steps=30, epoch_steps=23), smooth()
    run(whole, model, range(30))
    first, other = build(SMALL, 0.6, steps=30, epoch_steps=23), smooth()
    run(first, other, range(stop))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = build(SMALL, 0.6, steps=30, epoch_steps=23)
    second.load_state_dict(torch.load(saved, weights_only=True))
    run(second, other, range(stop, 30))
    assert all(map(torch.equal, whole.state_dict().values(), second.state_dict().values()))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_constant_images_are_seen_in_eval_mode_at_the_middle_of_the_range():
    x, y, model, modes = 3 * random(4, 3, 8, 8, seed=0) - 1, labels(4, C), convnet(C), []
    model.register_forward_pre_hook(lambda module, args: modes.append((module.training, args[0].unique().tolist()[:2])))
    criterion = build(SMALL, bounds=(-1.0, 2.0), classes=C)
    criterion(model, x, y)
    assert [training for training, _ in modes] == [False, True, True]
    assert modes[0][1] == [0.5]
    assert all(module.training for module in model.modules())
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2
    assert criterion.signs.shape == (C, 3, 8, 8)
    criterion = build(SMALL, bounds=(-1.0, 2.0))
    criterion(model, x, y)
    assert norm.num_batches_tracked == 4


def test_a_call_that_is_no_step_leaves_the_signs_alone():
    criterion, model = build(SMALL, epoch_steps=1), smooth()
    with criterion.frozen():
        criterion(model, *batch(0))
    assert criterion.signs.numel() == 0
    criterion(model, *batch(0))
    before = criterion.signs.clone()
    descend(model, [3 * parameter for parameter in model.parameters()])
    for context, passes in ((criterion.frozen(), 0), (ahead(criterion), 1)):
        with context:
            _, _, constant = step(criterion, model, *batch(1))
        assert len(constant) == passes
        assert torch.equal(criterion.signs, before)
    _, _, constant = step(criterion, model, *batch(1))
    assert len(constant) == 1
    assert not torch.equal(criterion.signs, before)


def test_classes_and_targets():
    (x, y), model = batch(0), smooth()
    with pytest.raises(ValueError, match=r"^classes: expected 4, one for each of the model's logits, got 5"):
        build(SMALL, classes=5)(model, x, y)
    for name in ("classes", "steps", "epoch_steps"):
        wrong: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"^{name}: expected an integer >= 1"):
            LIET(SMALL, 1.0, **wrong)
    chances = probabilities(B, C)
    starts = []
    for target in (chances, chances.argmax(dim=1)):
        torch.manual_seed(0)
        starts.append(step(build(SMALL), model, x, target)[1][0])
    assert torch.equal(*starts)


def test_the_divergence_is_that_of_jensen_and_shannon():
    logits, other = 50 * random(5, C, seed=1).double() - 25, 50 * random(5, C, seed=2).double() - 25
    p, q = logits.softmax(dim=1), other.softmax(dim=1)
    torch.testing.assert_close(divergence(logits, other), js(p, q), **CLOSE)
    far = torch.tensor([[1e4, 0.0]])
    assert divergence(far, -far).item() == pytest.approx(math.log(2), rel=1e-6)
    assert divergence(far, far) == 0
