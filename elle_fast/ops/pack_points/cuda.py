"""pack_points on CUDA by the compiled extension, whose kernels are in csrc/cuda; arguments and results: native.py."""

from __future__ import annotations

from functools import partial

from elle_fast.backends.device import stream
from elle_fast.ops.pack_points import native

pack_points = partial(native.pack_points, "cuda", stream)
random_start = partial(native.random_start, "cuda", stream)
