"""A bound on E_lin's part of the gradient, relative to the cross-entropy's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from elle_fast.ops.elle_loss.reference import widen
from elle_fast.ops.elle_loss.validation import Linearity

__all__ = ["bounded"]


def bounded(rows: Tensor, batch: int, options: Linearity, max_ratio: float) -> tuple[Tensor, Linearity]:
    r"""The packed rows, whose gradient of ``lam E_lin`` is scaled down where it is too large; and their layout.

    With g the gradient that reaches the triplets' rows and g_ce the one that reaches the ``batch`` rows of x_adv, both
    as whole tensors in the 2-norm, the model gets

    .. math::
        g \cdot min(1, max\_ratio \cdot |g_{ce}| / |g|)

    All of it is on the device. Where nothing is scaled, the factor is exactly 1 and no bit changes; nor does it where a
    norm is NaN. A second derivative is an error. x_b of ``"elle-2p"`` is x_adv: it gets rows of its own, which makes
    the layout ``"elle"``, so that its part of E_lin's gradient is bounded with the others.

    Args:
        rows: logits ``[N, C]`` or losses ``[N]`` in the order of :mod:`elle_fast.ops.layout`, with x_adv.
        batch: the rows of x_adv.
        options: their layout.
        max_ratio: ``> 0``.
    """
    if options.points == "elle-2p":
        blocks = rows[batch:].unflatten(0, (options.triplets, 2, -1))
        x_b = rows[: blocks.shape[2]].expand_as(blocks[:, 0])
        triplets = torch.stack([blocks[:, 0], x_b, blocks[:, 1]], dim=1)
        rows, options = torch.cat([rows[:batch], triplets.flatten(0, 2)]), options._replace(points="elle")
    bounded_rows: Tensor = _Bounded.apply(rows, batch, max_ratio)  # type: ignore[no-untyped-call]
    return bounded_rows, options


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, batch: int, max_ratio: float) -> Tensor:
        ctx.batch, ctx.max_ratio = batch, max_ratio
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        g_ce, g = grad[: ctx.batch], grad[ctx.batch :]
        return torch.cat([g_ce, g * _factor(g_ce, g, ctx.max_ratio).to(g.dtype)]), None, None


def _factor(g_ce: Tensor, g: Tensor, max_ratio: float) -> Tensor:
    # In float32 at least: squares of a half-precision gradient leave its range.
    limit, size = (torch.linalg.vector_norm(each, dtype=widen(each).dtype) for each in (g_ce, g))
    # 0 / 0 where both are zero: nothing to scale. A number in torch.where would be copied to the device.
    factor: Tensor = (max_ratio * limit / size).nan_to_num(nan=1.0).clamp(max=1.0)
    return factor
