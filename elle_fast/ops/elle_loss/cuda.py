"""elle_loss on CUDA by the compiled extension. The kernels: csrc/cuda/elle_loss.cu.

Arguments and results: native.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elle_fast.backends.cuda_host import on_device, stream
from elle_fast.ops.elle_loss import native


@on_device
def elle_loss(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``loss``, ``ce`` and ``e_lin``, 0-dim, and what the backward needs."""
    return native.elle_loss("cuda", lambda: stream(logits), logits, *arguments)


@on_device
def elle_loss_backward(logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient of the logits, contiguous, in their dtype."""
    return native.elle_loss_backward("cuda", lambda: stream(logits), logits, *arguments)


@on_device
def update_lam(e_lin: Tensor, *arguments: Any) -> Tensor:
    """Takes in this step's E_lin; the new lam, a copy."""
    return native.update_lam("cuda", stream(e_lin), e_lin, *arguments)
