"""pack_points on the CPU by the compiled extension, whose kernels are in csrc/cpu; arguments and results: native.py."""

from __future__ import annotations

from functools import partial

from elle_fast.backends.device import threads
from elle_fast.ops.pack_points import native

pack_points = partial(native.pack_points, "cpu", threads)
random_start = partial(native.random_start, "cpu", threads)
