"""Universal perturbations: their authors' loop, restated here with the state carried by hand, in float64."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import methods
from elle_fast.methods import uap
from tests.helpers import Smooth, convnet, grads_of, labels, probabilities, random

B, D, C, EPS, LAM = 6, 7, 4, 0.1, 30.0
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Pixels, some at the ends of the range; not every class is in every batch."""
    x = random(B, D, seed=step, dtype=torch.float64)
    return torch.where(x < 0.2, 0.0, torch.where(x > 0.9, 1.0, x)), labels(B, C - 1, seed=step) + step % 2


def smooth() -> Any:
    return Smooth(D, C, gain=3.0).double()


def build(name: str, **options: Any) -> Any:
    return methods.build(name, **{"eps": EPS, "lam": LAM, "bounds": (0.0, 1.0), **options})


def ball(point: Tensor, x: Tensor) -> Tensor:
    return (x + (point - x).clamp(-EPS, EPS)).clamp(0, 1)


def step(criterion: Any, model: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor]]:
    points: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: points.append(args[0].detach().clone()))
    loss = criterion(model, x, target)
    hook.remove()
    return loss, points


class ByHand:
    """u, in units of x, and m of each pattern, as the authors' loop keeps them."""

    def __init__(self, number: int) -> None:
        self.reach = 1.25 * EPS
        self.u = self.reach * (random(number, D, seed=50, dtype=torch.float64) - 0.5).sign()
        self.m = torch.zeros(number, D, dtype=torch.float64)

    def learn(self, grad: Tensor, chosen: list[int]) -> None:
        grad = grad / grad.abs().sum()
        for each in set(chosen):
            rows = torch.tensor([place for place, own in enumerate(chosen) if own == each])
            self.m[each] = grad[rows].mean(dim=0) + 0.3 * self.m[each]
            self.u[each] = (self.u[each] + self.reach * self.m[each].sign()).clamp(-self.reach, self.reach)

    def step(self, model: nn.Module, before: Tensor, x: Tensor, y: Tensor, chosen: list[int]) -> tuple[Any, ...]:
        """The points and the loss of a step, after which u and m are the next step's."""
        start = ball(before + self.u[torch.tensor(chosen)], x).requires_grad_()
        logits = model(start)
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, y), start, retain_graph=True)
        x_adv = ball(start.detach() + EPS * grad.sign(), x)
        logits_adv = model(x_adv)
        change = (logits_adv - logits).square().sum() / (B * C)
        self.learn(grad, chosen)
        return start.detach(), x_adv, F.cross_entropy(logits_adv, y) + LAM * change


def same_step(model: nn.Module, found: tuple[Tensor, list[Tensor]], expected: tuple[Any, ...]) -> None:
    loss, points = found
    for point, other in zip(points, expected[:-1], strict=True):
        torch.testing.assert_close(point, other, **CLOSE)
    torch.testing.assert_close(loss, expected[-1], **CLOSE)
    grads = grads_of(loss, model)
    for one, other in zip(grads, grads_of(expected[-1], model), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    descend(model, grads)


def descend(model: nn.Module, grads: Any) -> None:
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.sub_(0.3 * grad)


def same_state(criterion: Any, hand: ByHand) -> None:
    assert criterion.universal.dtype == torch.int8
    torch.testing.assert_close(hand.reach * criterion.universal.double(), hand.u, **CLOSE)
    torch.testing.assert_close(criterion.momentum, hand.m, **CLOSE)


@pytest.mark.parametrize("name, number", [("uap", 1), ("cuap", C)])
def test_their_loop_over_several_steps(name, number):
    criterion, model, hand, moved = build(name), smooth(), ByHand(number), 0
    criterion.load_state_dict({"universal": hand.u.sign().to(torch.int8), "momentum": hand.m})
    for i in range(8):
        (x, y), before = batch(i), hand.u.clone()
        chosen = y.tolist() if name == "cuap" else [0] * B
        assert name == "uap" or len(set(chosen)) < C
        found = step(criterion, model, x, y)
        same_step(model, found, hand.step(model, x, x, y, chosen))
        same_state(criterion, hand)
        moved += not torch.equal(before, hand.u)
    assert moved > 3
    assert criterion.universal.unique().tolist() == [-1, 0, 1]


def test_fuap_chooses_by_features_and_trains_its_layers_by_adam():
    criterion, model, hand = build("fuap"), smooth(), ByHand(50)
    torch.manual_seed(0)
    first, second = nn.Linear(8, 50), nn.Linear(50, C)
    parameters = [first.weight, first.bias, second.weight, second.bias]
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    weights = torch.cat([parameter.detach().flatten() for parameter in parameters])
    criterion.load_state_dict(
        {
            "universal": hand.u.sign().to(torch.int8),
            "momentum": hand.m,
            "head": torch.stack([weights, torch.zeros_like(weights), torch.zeros_like(weights)]),
            "head_steps": torch.zeros((), dtype=torch.int64),
        }
    )
    seen = set()
    for i in range(12):
        x, y = batch(i)
        found = step(criterion, model, x, y)
        noised = found[1].pop(0)
        assert noised.min() >= 0
        assert noised.max() <= 1
        assert (noised - x).abs().max() <= EPS
        assert ((noised - x)[(x > EPS) & (x < 1 - EPS)].abs() > EPS / 2).any()
        features = torch.tanh(model.first(noised)).detach().float()
        entries = first(features)
        chosen = entries.argmax(dim=1).tolist()
        seen |= set(chosen)
        optimizer.zero_grad()
        F.cross_entropy(second(entries.relu()), y).backward()
        optimizer.step()
        same_step(model, found, hand.step(model, noised, x, y, chosen))
        same_state(criterion, hand)
        trained = torch.cat([parameter.detach().flatten() for parameter in parameters])
        # Adam's step is 1e-3 at most; sqrt and division differ by some roundings of it, in 12 steps.
        torch.testing.assert_close(criterion.head[0], trained, rtol=0, atol=12e-3 * 1e-4)
    assert criterion.head_steps == 12
    assert len(seen) > 1


@pytest.mark.parametrize("name, shape", [("uap", (1, D)), ("cuap", (C, D)), ("fuap", (50, D))])
def test_what_there_is_at_first(name, shape):
    """Random signs, no momentum; the layers as torch draws them."""
    (x, y), criterion, model = batch(0), build(name), smooth()
    assert all(value.numel() in (0, 1) for value in criterion.state_dict().values())
    torch.manual_seed(0)
    _, points = step(criterion, model, x, y)
    start = points[-2]
    inside = (x > EPS) & (x < 1 - EPS)
    moved = (start - x)[inside].abs()
    if name == "fuap":  # clip(noise + 1.25 eps u) is at most 0.75 eps away from a corner
        assert moved.min() >= 0.25 * EPS - 1e-12
    else:
        torch.testing.assert_close(moved, torch.full_like(moved, EPS), **CLOSE)
    assert criterion.universal.shape == criterion.momentum.shape == shape
    assert criterion.momentum.dtype == torch.float64
    again = build(name)
    torch.manual_seed(0)
    again(model, x, y)
    assert all(map(torch.equal, criterion.state_dict().values(), again.state_dict().values()))
    if name == "fuap":
        assert criterion.head.shape == (3, 50 * 8 + 50 + C * 50 + C)
        bounds = torch.tensor([8**-0.5] * 450 + [50**-0.5] * (51 * C))
        drawn = criterion._head([(50, 8), (50,), (C, 50), (C,)], torch.device("cpu"))
        assert drawn is criterion.head
        fresh = build(name)._head([(50, 8), (50,), (C, 50), (C,)], torch.device("cpu"))
        assert (fresh[0].abs() <= bounds).all()
        assert fresh[0][:450].abs().max() > 0.9 * 8**-0.5
        assert not fresh[1:].any()


@pytest.mark.parametrize("name", ["uap", "cuap", "fuap"])
def test_a_run_that_is_resumed_ends_with_the_same_bits(name):
    def run(criterion: Any, model: nn.Module, steps: range) -> None:
        for i in steps:
            torch.manual_seed(i)
            descend(model, grads_of(criterion(model, *batch(i)), model))

    whole, model = build(name), smooth()
    run(whole, model, range(7))
    first, other = build(name), smooth()
    run(first, other, range(3))
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    second = build(name)
    second.load_state_dict(torch.load(saved, weights_only=True))
    run(second, other, range(3, 7))
    assert all(map(torch.equal, whole.state_dict().values(), second.state_dict().values()))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("scale, kept", [(torch.nan, 0.3), (torch.inf, 0.3), (0.0, 0.3)])
def test_a_gradient_that_is_not_finite_or_zero_counts_as_0(scale, kept):
    universal, momentum = torch.tensor([[1, -1, 0]], dtype=torch.int8), torch.tensor([[0.5, 0.5, -0.5]])
    found = uap.learned(universal, momentum, torch.zeros(2, dtype=torch.int64), scale * torch.ones(2, 3))
    assert torch.equal(found["momentum"], kept * momentum)
    assert found["universal"].tolist() == [[1, 0, -1]]


def test_samples_of_another_shape_begin_anew_and_batches_of_another_size_do_not():
    criterion, model = build("cuap"), smooth()
    criterion(model, *batch(0))
    before = criterion.universal.clone()
    criterion(model, *(each[:2] for each in batch(1)))
    assert criterion.universal.shape == before.shape
    assert (criterion.universal != before).any(dim=1).sum() <= 2
    criterion(Smooth(3, C).double(), batch(2)[0][:, :3], batch(2)[1])
    assert criterion.universal.shape == criterion.momentum.shape == (C, 3)


def test_label_smoothing_is_that_of_the_loss_alone():
    (x, y), model, results = batch(0), smooth(), []
    for smoothing in (0.0, 0.4):
        criterion = build("uap", label_smoothing=smoothing)
        torch.manual_seed(0)
        results.append(step(criterion, model, x, y))
    (_, points), (loss, others) = results
    assert all(map(torch.equal, points, others))
    logits, logits_adv = (model(point) for point in others)
    expected = F.cross_entropy(logits_adv, y, label_smoothing=0.4) + LAM * F.mse_loss(logits_adv, logits)
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_the_classes_of_cuap():
    """Counted in eval mode, or given; the class of probabilities is that of the highest."""
    x, y = random(4, 3, 8, 8, seed=0), labels(4, C)
    model, counted, given = convnet(C), build("cuap"), build("cuap", classes=C)
    norm: Any = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    for criterion, passes in ((counted, 2), (given, 2), (counted, 2)):
        before = int(norm.num_batches_tracked)
        criterion(model, x, y)
        assert norm.num_batches_tracked - before == passes
        assert criterion.universal.shape == (C, 3, 8, 8)
    assert model.training
    with pytest.raises(ValueError, match=r"^classes: expected 4, one for each of the model's logits, got 5"):
        build("cuap", classes=5)(model, x, y)
    for wrong in (0, 2.5, "x"):
        with pytest.raises((TypeError, ValueError), match=r"^classes: expected an integer >= 1"):
            build("cuap", classes=wrong)
    soft, hard = build("cuap", lam=0.0), build("cuap", lam=0.0)
    chances = probabilities(B, C)
    for criterion, target in ((soft, chances), (hard, chances.argmax(dim=1))):
        torch.manual_seed(0)
        _, points = step(criterion, smooth(), batch(0)[0], target)
        assert torch.equal(points[-2], ball(points[-2], batch(0)[0]))
    changed = [(criterion.momentum != 0).any(dim=1) for criterion in (soft, hard)]
    assert torch.equal(*changed)
    assert 0 < changed[0].sum() <= len(set(chances.argmax(dim=1).tolist()))


def test_what_fuap_takes():
    x, y = batch(0)
    criterion = build("fuap")
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module for FUAP, got "):
        criterion(lambda points: points[:, :C], x, y)
    with pytest.raises(ValueError, match=r"^model: expected a linear layer for FUAP, got none in a Flatten"):
        criterion(nn.Flatten(), x[:, :C], y)
    with pytest.raises(ValueError, match=r"^model: expected one that is not compiled for FUAP"):
        criterion(torch.compile(smooth(), backend="eager"), x, y)
    twice = nn.Sequential(nn.Unflatten(1, (1, D)), nn.Linear(D, C).double(), nn.Flatten())
    with pytest.raises(ValueError, match=r"^model: expected its last linear layer to take features \[6, D\], got "):
        criterion(twice, x, y)
    assert not any(module._forward_pre_hooks for module in twice.modules())
    for classes, number in ((10, 50), (100, 200), (200, 300)):
        criterion = build("fuap")
        criterion(nn.Linear(D, classes).double(), x, y)
        assert len(criterion.universal) == number
    row = uap.FUAP(EPS, LAM, patterns=3)
    row(smooth(), x, y)
    assert len(row.universal) == 3
    with pytest.raises(ValueError, match=r"^patterns: expected an integer >= 1"):
        uap.FUAP(EPS, LAM, patterns=0)


@pytest.mark.parametrize("name", ["uap", "cuap", "fuap"])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_state_keeps_its_dtype_in_half_precision(name, autocast):
    """A batch's mean gradient, of a 1-norm of 1 over all pixels, would underflow in float16."""
    dtype = torch.float32 if autocast else torch.bfloat16
    x, y, model = random(4, 3, 8, 8, seed=0).to(dtype), labels(4, C), convnet(C).to(dtype)
    criterion = build(name).half()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(2):
            criterion(model, x, y).backward()
    floating = [value.dtype for value in criterion.state_dict().values() if value.is_floating_point()]
    assert floating
    assert set(floating) == {torch.float32}
    assert criterion.momentum.any()
