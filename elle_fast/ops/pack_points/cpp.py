"""pack_points on the CPU by the compiled extension. The kernels: csrc/cpu/pack_points.cpp.

Arguments and results: native.py.
"""

from __future__ import annotations

from functools import partial

import torch

from elle_fast.ops.pack_points import native

pack_points = partial(native.pack_points, "cpu", torch.get_num_threads)
random_start = partial(native.random_start, "cpu", torch.get_num_threads)
