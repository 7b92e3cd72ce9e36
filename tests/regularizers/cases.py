"""A batch, models and checks that the tests of the regularisers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.helpers import Smooth, labels, random

BATCH, SHAPE, CLASSES, EPS = 5, (2, 3), 4, 0.3
FEATURES = 6
X, Y = random(BATCH, *SHAPE, seed=1, dtype=torch.float64), labels(BATCH, CLASSES)
X_ADV = X + EPS * (2 * random(BATCH, *SHAPE, seed=2, dtype=torch.float64) - 1)
ZEROS = torch.zeros(BATCH, dtype=torch.int64)


def smooth() -> Any:
    return Smooth(FEATURES, CLASSES).double()


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and its gradient sample by sample: no sum over the batch to get wrong."""
    losses, grads = [], []
    for point, target in zip(x, y, strict=True):
        point = point.clone().requires_grad_()
        losses.append(F.cross_entropy(model(point[None])[0], target))
        grads.append(torch.autograd.grad(losses[-1], point, create_graph=True)[0])
    return losses, grads


def by_parameters(regulariser: Callable[..., Tensor], model: nn.Module, **options: Any) -> bool:
    """Finite differences of the value with respect to every parameter."""
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in model.named_parameters()), strict=True)

    def value(*parameters: Tensor) -> Tensor:
        def call(x: Tensor) -> Any:
            return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

        return regulariser(call, X, Y, X_ADV, **options)

    return torch.autograd.gradcheck(value, values)


class LossOf(nn.Module):
    """Two classes whose cross-entropy for class 0 is ``function(x) > 0`` itself: logits are the log-probabilities."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        loss = self.function(x.flatten(1))
        return torch.stack([-loss, torch.log1p(-torch.exp(-loss))], dim=1)


SLOPE = 2 * random(FEATURES, seed=6, dtype=torch.float64) - 1
# Symmetric, with curvature of either sign.
MATRIX = random(FEATURES, FEATURES, seed=7, dtype=torch.float64) - 0.5
MATRIX = (MATRIX + MATRIX.T) / 2
# Losses of 2 and more: exp(-loss) and 1 - exp(-loss) are then each far from 1, so nothing cancels.
linear = LossOf(lambda x: 8 + x @ SLOPE)
quadratic = LossOf(lambda x: 8 + x @ SLOPE + (x * (x @ MATRIX)).sum(dim=1) / 2)
# Some 20 operations between x and a loss or an entry of its gradient, each rounded, on numbers below 16.
ROUNDING = 20 * 16 * torch.finfo(torch.float64).eps
