"""Shared by the tests of the loss: bent models, and the parts of Algorithm 1 written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elle_fast.functional import pack_points
from tests.helpers import Smooth, labels, random

EPS = 0.1
FEATURES, CLASSES, BATCH = 6, 4, 5
F64 = torch.float64

# In float64 a loss below 3 with some hundred roundings is known to 5e-14; a residual r of 1e-4 or more then to 5e-10,
# and E_lin, its square, to 1e-9. The models here are bent so that r is at least that (asserted where it matters).
CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-13}


def data(shape: tuple[int, ...] = (BATCH, FEATURES), seed: int = 1, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    return random(*shape, seed=seed, dtype=dtype), labels(shape[0], CLASSES, seed=seed)


def bent(seed: int = 0, features: int = FEATURES) -> Smooth:
    return Smooth(features, CLASSES, seed=seed, gain=8.0).double()


def close(actual: Any, expected: Any, **tolerance: Any) -> None:
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=F64), torch.as_tensor(expected, dtype=F64), **{**CLOSE, **tolerance}
    )


def ce_rows(model: Any, x: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy per sample, from log-probabilities."""
    logp = model(x).log_softmax(dim=1)
    q = y if y.is_floating_point() else F.one_hot(y, logp.shape[1]).to(logp.dtype)
    q = (1 - label_smoothing) * q + label_smoothing / logp.shape[1]
    losses: Tensor = -(q * logp).sum(dim=1)
    return losses


def per_sample(weight: Tensor, like: Tensor) -> Tensor:
    return weight.view(-1, *[1] * (like.dim() - 1))


def fgsm_by_hand(model: Any, x: Tensor, y: Tensor, eps: float, **kwargs: float) -> Tensor:
    point = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ce_rows(model, point, y, **kwargs).sum(), point)
    return x + eps * grad.sign()


def noise_of(x: Tensor, eps: float, seed: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x_a, x_b and alpha: the only thing taken from the package (tests/ops/pack_points checks it)."""
    points, alpha = pack_points(x, None, eps, seed=seed, **options)
    return points[: len(alpha)], points[len(alpha) : 2 * len(alpha)], alpha


def residual(h: Any, x_a: Tensor, x_b: Tensor, alpha: Tensor) -> Tensor:
    a = per_sample(alpha, x_a)
    h_a, h_b, h_c = h(x_a), h(x_b), h((1 - a) * x_a + a * x_b)
    a = per_sample(alpha, h_a)
    out: Tensor = h_c - (1 - a) * h_a - a * h_b
    return out


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")
