"""Both ops as a user would write them in plain torch, with torch's own random numbers and no checks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_points(
    x: Tensor,
    grad: Tensor,
    start: Tensor | None,
    eps: float,
    *,
    step_size: float | None = None,
    bounds: tuple[float, float] | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The packed points and alpha; ``start`` is the attack's random start, kept from its gradient."""

    def clamped(points: Tensor) -> Tensor:
        return points if bounds is None else points.clamp(*bounds)

    x_adv = clamped((x if start is None else start) + (step_size or eps) * grad.sign())
    x_a = clamped(x + torch.empty_like(x).uniform_(-eps, eps))
    x_b = clamped(x + torch.empty_like(x).uniform_(-eps, eps))
    alpha = torch.rand(x.shape[0], device=x.device)
    # One pass, where (1 - alpha) * x_a + alpha * x_b takes four.
    x_c = torch.lerp(x_a, x_b, alpha.to(x.dtype).view(-1, *[1] * (x.dim() - 1)))
    points = torch.cat([x_adv, x_a, x_b, x_c])
    return points if mean is None or std is None else (points - mean) / std, alpha


def elle_loss(logits: Tensor, target: Tensor, alpha: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the cross-entropy and E_lin."""
    adv, a, b, c = F.cross_entropy(logits, target.repeat(4), reduction="none").chunk(4)
    ce = adv.mean()
    e_lin = (c - (1 - alpha) * a - alpha * b).square().mean()
    return ce + lam * e_lin, ce, e_lin
