"""elle_loss on the CPU by the compiled extension, whose kernels are in csrc/cpu; arguments and results: native.py."""

from __future__ import annotations

from functools import partial

from elle_fast.backends.device import threads
from elle_fast.ops.elle_loss import native

elle_loss = partial(native.elle_loss, "cpu", threads)
elle_loss_backward = partial(native.elle_loss_backward, "cpu", threads)
update_lam = partial(native.update_lam, "cpu", threads)
