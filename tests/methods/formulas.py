"""For tests of methods against their formula: a batch, a model, and its losses and gradients in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import Smooth, grads_of, labels, random

SAMPLES, BATCH, FEATURES, CLASSES, EPS, LAM = 12, 4, 5, 4, 0.1, 30.0
# Roundings of a few hundred float64 operations on numbers around 1; penalties are small differences of them.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def training_set() -> tuple[Tensor, Tensor]:
    """Pixels, some of them at the ends of the range and some near it, where clamping shows."""
    x = random(SAMPLES, FEATURES, seed=1, dtype=torch.float64)
    x = torch.where(x < 0.2, x.sub(0.1).clamp(min=0), torch.where(x > 0.8, x.add(0.1).clamp(max=1), x))
    return x, labels(SAMPLES, CLASSES)


def epochs(count: int) -> list[list[Tensor]]:
    """The indices of each batch of each epoch, shuffled."""
    source = torch.Generator().manual_seed(5)
    return [list(torch.randperm(SAMPLES, generator=source).split(BATCH)) for _ in range(count)]


def smooth() -> nn.Module:
    return Smooth(FEATURES, CLASSES, gain=3.0).double()


def step(criterion: Any, model: nn.Module, x: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the points of each forward pass."""
    points: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: points.append(args[0].detach().clone()))
    loss = criterion(model, x, target, **options)
    hook.remove()
    return loss, points


def train(model: nn.Module, loss: Tensor, rate: float = 0.5) -> None:
    """A step; of this rate it is large enough that gradients change their signs from epoch to epoch."""
    with torch.no_grad():
        for parameter, grad in zip(model.parameters(), grads_of(loss, model), strict=True):
            parameter.sub_(rate * grad)


def mean_loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(x), target)


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(mean_loss(model, point, target), point)[0]


def check(criterion: Any, loss: Tensor, expected: Tensor, model: nn.Module) -> None:
    """Value and gradient."""
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(criterion.stats["loss"], expected.detach(), **CLOSE)
    for one, other in zip(grads_of(loss, model), grads_of(expected, model), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


class Kept:
    """Perturbations by sample, learnt from a sample's first start, and then kept by the caller's own rule."""

    def __init__(self, bounds: tuple[float, float] | None) -> None:
        self.bounds = bounds
        self.delta: dict[int, Tensor] = {}

    def within(self, point: Tensor) -> Tensor:
        return point if self.bounds is None else point.clamp(*self.bounds)

    def start(self, index: Tensor, x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of a batch, and where its attack begins; ``seen`` is where it began."""
        for place, sample, point in zip(index.tolist(), x, seen, strict=True):
            if place not in self.delta:
                sign = (point - sample).sign()
                # Where a clamp hides the sign, it points out of the range.
                hidden = (sign == 0) & ((sample == 0) | (sample == 1))
                self.delta[place] = EPS * torch.where(hidden, sample * 2 - 1, sign)
        delta = torch.stack([self.delta[place] for place in index.tolist()])
        return delta, self.within(x + delta)

    def reach(self, x: Tensor, delta: Tensor, direction: Tensor) -> Tensor:
        return self.within(x + (delta + EPS * direction.sign()).clamp(-EPS, EPS))

    def keep(self, index: Tensor, delta: Tensor) -> None:
        """In steps of eps / 127."""
        for place, row in zip(index.tolist(), delta, strict=True):
            self.delta[place] = (row * 127 / EPS).round() * EPS / 127
