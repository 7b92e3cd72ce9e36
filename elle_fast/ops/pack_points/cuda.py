"""pack_points on CUDA by the compiled extension. The kernels: csrc/cuda/pack_points.cu."""

from __future__ import annotations

from torch import Tensor

from elle_fast.ops.cuda_support import on_device, stream
from elle_fast.ops.pack_points import native
from elle_fast.ops.pack_points.validation import Packing


@on_device
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
    where = stream(x)
    return native.pack_points("pack_cuda", where, x, grad, x_adv, alpha, seed, statistics, packing, out)


@on_device
def random_start(x: Tensor, seed: Tensor, packing: Packing) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    return native.random_start("start_cuda", stream(x), x, seed, packing)
