"""elle_loss on the CPU by the compiled extension. The kernels: csrc/cpu/elle_loss.cpp.

Arguments and results: native.py.
"""

from __future__ import annotations

from functools import partial

import torch

from elle_fast.ops.elle_loss import native

elle_loss = partial(native.elle_loss, "cpu", torch.get_num_threads)
elle_loss_backward = partial(native.elle_loss_backward, "cpu", torch.get_num_threads)
update_lam = partial(native.update_lam, "cpu", 1)
