"""elle_fast.TrainingStep: the training loop written by hand, for every kind of criterion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elle_fast import ELLELoss, TrainingStep, capture, methods
from tests.helpers import labels
from tests.step.common import EPS, OPTIONS, RATES, Net, batches, by_hand, everything, parts, same


def cross_entropy(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(x), target)


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_loop_by_hand(name, scaled):
    """Losses, weights, statistics, momentum, lam, scale and random numbers, to the bit."""
    options: dict[str, Any] = {**OPTIONS[name], "scaler": scaler() if scaled else None}
    hand: dict[str, Any] = {"autocast": options.get("autocast"), "clip": options.get("clip_grad_norm")}
    hand["scaler"] = scaler() if scaled else None
    expected, found = parts(skip_below=0.3), parts(skip_below=0.3)
    data = batches(12, short=5)
    torch.manual_seed(1)
    losses = by_hand(expected, data, RATES, **hand)
    torch.manual_seed(1)
    step = TrainingStep(*found, **options)
    for (x, y), rate, expected_loss in zip(data, RATES, losses, strict=True):
        found[2].param_groups[0]["lr"] = rate
        loss = step(x, y)
        assert loss.item() == expected_loss
        assert loss.shape == ()
        assert not loss.requires_grad
    assert same(everything(*expected), everything(*found))
    if scaled:
        assert options["scaler"].get_scale() == hand["scaler"].get_scale() > 1024.0
    gradients = [
        (one.grad, other.grad) for one, other in zip(*(p[1].parameters() for p in (expected, found)), strict=True)
    ]
    assert all(one is not None and other is not None and torch.equal(one, other) for one, other in gradients)


@pytest.mark.parametrize("method", [None, "trades-single", "free-at", "nuat", "n-fgsm+elle-a"])
def test_any_criterion(method):
    def make() -> tuple[Any, nn.Module, torch.optim.Optimizer]:
        _, model, optimizer = parts()
        if method is None:
            return cross_entropy, model, optimizer
        lam = None if method == "free-at" else 2.0
        return methods.build(method, eps=EPS, lam=lam, bounds=None), model, optimizer

    expected, found = make(), make()
    torch.manual_seed(1)
    losses = by_hand(expected, batches(6), RATES[:6])
    torch.manual_seed(1)
    step = TrainingStep(*found)
    for (x, y), rate, loss in zip(batches(6), RATES, losses, strict=False):
        found[2].param_groups[0]["lr"] = rate
        assert step(x, y).item() == loss
    assert same(*([each.detach() for each in made[1].state_dict().values()] for made in (expected, found)))


def test_gradients_of_an_earlier_call_do_not_add_up():
    """Not those of weights that the optimiser does not move either."""
    _, model, _ = parts()
    step = TrainingStep(cross_entropy, model, torch.optim.SGD(list(model.parameters())[:2], lr=0.0))
    model.eval()  # no dropout: the same gradients each time
    found = []
    for _ in range(2):
        step(*batches(1)[0])
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) == 6
    assert same(*found)
    step.clear()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_measure_of_each_step():
    """Once the loss is there, before the weights move, without a graph; it changes nothing."""
    made, plain = parts(), parts()
    seen: list[Any] = []

    def right(criterion: Any, target: Tensor) -> Any:
        seen.append((criterion, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), weight.detach().clone()))
        return (criterion.output.argmax(dim=1) == target).sum()

    weight = next(made[1].parameters())
    step = TrainingStep(*made, autocast=torch.bfloat16, measure=right)
    assert step.measured is None
    found: list[Any] = []
    outputs: list[Any] = []
    torch.manual_seed(1)
    for x, y in batches(4, short=2):
        before = weight.detach().clone()
        step(x, y)
        criterion, graph, cast, then = seen.pop()
        assert criterion is made[0]
        assert not graph
        assert not cast
        assert torch.equal(then, before)
        assert not torch.equal(then, weight)
        outputs.append((made[0].output, y))
        found.append(step.measured)
    assert found == [sum(int(row.argmax() == label) for row, label in zip(*each, strict=True)) for each in outputs]
    assert len(set(map(int, found))) > 1
    torch.manual_seed(1)
    by_hand(plain, batches(4, short=2), [0.1] * 4, autocast=torch.bfloat16)
    assert same(everything(*plain), everything(*made))


def test_what_a_measure_returns():
    criterion, model, optimizer = parts()
    x, y = batches(1)[0]
    step = TrainingStep(criterion, model, optimizer, measure=lambda criterion, target: 3)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"^measure: expected a function that returns a tensor, got 3 \(int\) from it"):
        step(x, y)
    step.measure = None
    step(x, y)
    assert step.measured is None


def test_an_autocast_around_the_call_reaches_no_criterion_without_one():
    dtypes = []

    def criterion(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        dtypes.append(model(x).dtype)
        return cross_entropy(model, x, target)

    _, model, optimizer = parts()
    for autocast in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            TrainingStep(criterion, model, optimizer, autocast=autocast)(*batches(1)[0])
    assert dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"criterion": 3.0}, TypeError, "^criterion: expected a callable, got 3.0"),
        ({"model": cross_entropy}, TypeError, "^model: expected Module, got "),
        ({"optimizer": []}, TypeError, "^optimizer: expected Optimizer, got "),
        ({"autocast": "bf16"}, TypeError, "^autocast: expected dtype or None, got 'bf16'"),
        ({"scaler": 2.0}, TypeError, "^scaler: expected GradScaler or None, got 2.0"),
        (
            {"clip_grad_norm": 0.0},
            ValueError,
            r"^clip_grad_norm: expected a finite number in \(0, 3.4.*\], got 0.0",
        ),
        ({"measure": 3.0}, TypeError, "^measure: expected None or a callable, got 3.0"),
        ({"clip_grad_norm": "1"}, TypeError, "^clip_grad_norm: expected "),
    ],
)
def test_bad_arguments(change, error, message):
    model = Net()
    good: dict[str, Any] = {"criterion": ELLELoss(EPS), "model": model}
    good["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        TrainingStep(**{**good, **change})


@pytest.mark.parametrize(
    "loss, error, got",
    [
        (lambda rows: rows, ValueError, r"a tensor of shape \[8\], .*cpu"),
        (lambda rows: rows.mean()[None], ValueError, r"a tensor of shape \[1\], .*cpu"),
        (lambda rows: rows.detach().mean(), ValueError, r"a tensor of shape \[\], .* without a graph"),
        (lambda rows: None, TypeError, r"None \(NoneType\)"),
        (lambda rows: (rows.mean(), rows), TypeError, r"2 items, tensors among them \(tuple\)"),
    ],
)
def test_a_criterion_without_a_loss(loss, error, got):
    _, model, optimizer = parts()
    x, y = batches(1)[0]
    step = TrainingStep(lambda model, x, y: loss(F.cross_entropy(model(x), y, reduction="none")), model, optimizer)
    before = everything(nn.Module(), model, optimizer)[:-1]
    with pytest.raises(error, match=rf"^criterion: expected a loss, a 0-dim tensor with a graph, got {got}$"):
        step(x, y)
    assert same(before[:4], everything(nn.Module(), model, optimizer)[:4])  # no weight has moved


def test_an_optimizer_that_needs_a_closure():
    criterion, model, _ = parts()
    with pytest.raises(TypeError, match=r"^optimizer: expected one whose step\(\) needs no closure, got LBFGS; "):
        TrainingStep(criterion, model, torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.complex64])
def test_an_autocast_that_there_is_not(dtype):
    criterion, model, optimizer = parts()
    x, y = batches(1)[0]
    for call in (
        lambda: TrainingStep(criterion, model, optimizer, autocast=dtype),
        lambda: capture(criterion, model, optimizer, x, y, autocast=dtype),
    ):
        with pytest.raises(ValueError, match=rf"^autocast: expected None, .*, got {dtype}$"):
            call()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_scaler_of_one_scales_nothing_and_skips_what_is_not_finite(kind, fused):
    """The documented way to skip such a step: no bit changes but that there is no such step."""
    found = []
    for scaler, spoilt in ((None, ()), (torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=3), (2, 3, 7))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1, fused=fused)
        criterion = ELLELoss(EPS, 10.0)
        step = TrainingStep(criterion, model, optimizer, scaler=scaler)
        data = batches(6)
        for i in spoilt:
            x, y = data[0]
            data.insert(i, (x * torch.inf, y))
        for i, (x, y) in enumerate(data):
            torch.manual_seed(100 + i - sum(each < i for each in spoilt))
            assert step(x, y).isfinite() == (i not in spoilt)
        found.append([each.clone() for each in everything(criterion, model, optimizer)[:-1]])
    assert same(*found)


@pytest.mark.parametrize("x", [None, "x", [1.0]])
def test_a_batch_that_is_no_tensor(x):
    criterion, model, optimizer = parts()
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got "):
        TrainingStep(criterion, model, optimizer)(x, labels(8, 3))
