"""pack_points on the CPU by the compiled extension. The kernels: csrc/cpu/pack_points.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from elle_fast.ops.pack_points import native
from elle_fast.ops.pack_points.validation import Packing


def pack_points(
    x: Tensor,
    grad: Tensor | None,
    x_adv: Tensor | None,
    alpha: Tensor | None,
    seed: Tensor,
    statistics: Tensor | None,
    packing: Packing,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``."""
    where = torch.get_num_threads()
    return native.pack_points("pack_cpu", where, x, grad, x_adv, alpha, seed, statistics, packing, out)


def random_start(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    return native.random_start("start_cpu", torch.get_num_threads(), x, seed, packing)
