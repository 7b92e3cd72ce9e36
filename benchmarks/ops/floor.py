"""The floor of pack_points on the CPU: floor.c, compiled on first use by the system's compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("floor.c")
FLAGS = ("-O3", "-march=native")
ALIGNMENT = 64


@lru_cache(maxsize=1)
def compiled() -> Any:
    """The C function, or a string that says why there is none."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "floor.so"
        command = [*compiler, *FLAGS, "-shared", "-fPIC", "-pthread", "-o", str(library), str(_SOURCE), "-ldl"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        except OSError as error:
            return f"no C compiler: {error}"
        except subprocess.SubprocessError as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            return f"the floor does not compile: {lines[-1]}"
        # Once loaded, the file is no longer needed.
        function = ctypes.CDLL(str(library)).floor_of_pack_points
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return function


def floor(x: Tensor, grad: Tensor, points: Tensor, *, streamed: bool) -> Callable[[], None] | str:
    """A call that reads ``x`` and ``grad`` and fills ``points``, four times as long; or why there is none."""
    function = compiled()
    if isinstance(function, str):
        return function
    size = x.numel() * x.element_size()
    if size % ALIGNMENT or any(tensor.data_ptr() % ALIGNMENT for tensor in (x, grad, points)):
        return f"sizes and addresses are no multiples of {ALIGNMENT} bytes"
    assert points.nbytes == 4 * size == 4 * grad.nbytes
    count = torch.get_num_threads()

    def call() -> None:
        # data_ptr() in here, so that the closure keeps the tensors alive.
        if not function(x.data_ptr(), grad.data_ptr(), points.data_ptr(), size, streamed, count):
            raise RuntimeError(f"the floor could not have {count} threads")

    return call
