"""What the methods' tests share: a tiny model in float64, the points of its passes, and formulas restated."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from elle_fast import methods
from tests.helpers import Smooth, about, built, grads_of, labels, random

BATCH, FEATURES, CLASSES, EPS, LAM = 6, 5, 4, 0.1, 30.0
# Roundings of a few hundred float64 operations on numbers around 1; E_lin and penalties are small differences of them.
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def batch():
    """Pixels, some of them at the ends of the range, where clamping shows."""
    x = random(BATCH, FEATURES, seed=1, dtype=torch.float64)
    return torch.where(x < 0.3, 0.0, torch.where(x > 0.8, 1.0, x)), labels(BATCH, CLASSES)


def smooth():
    return Smooth(FEATURES, CLASSES, gain=3.0).double()


def build(name, **options):
    lam = LAM if "lam" in methods.find(name).takes else None
    return built(name, **{"eps": EPS, "lam": lam, "bounds": (0.0, 1.0), **options})


def step(criterion, model, x, target):
    """The loss and the points of each forward pass."""
    points = []
    hook = model.register_forward_pre_hook(lambda module, args: points.append(args[0].detach().clone()))
    loss = criterion(model, x, target, **about(criterion, x))
    hook.remove()
    return loss, points


def losses(model, x, target):
    """Per-sample cross-entropy, to labels or probabilities."""
    if target.dim() == 1:
        target = F.one_hot(target, CLASSES).double()
    return -(target * model(x).log_softmax(dim=1)).sum(dim=1)


def gradient(model, x, target, **options):
    point = x.clone().requires_grad_()
    return torch.autograd.grad(losses(model, point, target).sum(), point, **options)[0]


def kl(model, x, x_adv):
    p, q = model(x).softmax(dim=1), model(x_adv).softmax(dim=1)
    return (p * (p / q).log()).sum(dim=1).mean()


def ball(point, x):
    return torch.minimum(torch.maximum(point, x - EPS), x + EPS).clamp(0, 1)


def e_lin(model, points, target):
    """From the last three blocks of a pass; alpha is what x_c says."""
    x_a, x_b, x_c = points[-3 * BATCH :].chunk(3)
    alpha = ((x_c - x_a) * (x_b - x_a)).sum(dim=1) / (x_b - x_a).square().sum(dim=1)
    a, b, c = (losses(model, each, target) for each in (x_a, x_b, x_c))
    return (c - (1 - alpha) * a - alpha * b).square().mean()


def check(criterion, loss, expected, model):
    """Value and gradient."""
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(criterion.stats["loss"], expected.detach(), **CLOSE)
    for one, other in zip(grads_of(loss, model), grads_of(expected, model), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


class Wrapper(DistributedDataParallel):
    """Of one process, which need not copy rank 0's buffers over its own, but writes to them as the others do."""

    passes = 0

    def forward(self, *args):
        self.passes += 1
        for buffer in self.module.buffers():
            buffer.add_(0)
        return super().forward(*args)
