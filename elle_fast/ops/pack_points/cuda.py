"""pack_points on CUDA by the compiled extension. The kernels: csrc/cuda/pack_points.cu.

Arguments and results: native.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elle_fast.backends.cuda_host import on_device, stream
from elle_fast.ops.pack_points import native


@on_device
def pack_points(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The packed rows in the order of :mod:`elle_fast.ops.layout`, and alpha ``[triplets * Bt]``."""
    return native.pack_points("cuda", lambda: stream(x), x, *arguments)


@on_device
def random_start(x: Tensor, *arguments: Any) -> Tensor:
    """The point ``[B, ...]`` from which the attack takes its gradient; pack_points draws the same one again."""
    return native.random_start("cuda", lambda: stream(x), x, *arguments)
