"""elle_loss on CUDA by the compiled extension, whose kernels are in csrc/cuda; arguments and results: native.py."""

from __future__ import annotations

from functools import partial

from elle_fast.backends.device import stream
from elle_fast.ops.elle_loss import native

elle_loss = partial(native.elle_loss, "cuda", stream)
elle_loss_backward = partial(native.elle_loss_backward, "cuda", stream)
update_lam = partial(native.update_lam, "cuda", stream)
