"""Lets the cuda backend take tensors on the CPU, whose kernels tests/cuda_emulation/build.py has compiled for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from elle_fast import backends
from elle_fast.backends import extension


def emulated() -> bool:
    """Whether the extension in use is such a one."""
    module = extension.load()
    return module is not None and module.facts().get("cuda") == "emulated"


def emulate() -> None:
    """For all tests of this process."""
    backends.BACKENDS["cuda"] = backends.Backend(
        runs_on="an emulation", serves=lambda device: device == "cpu", why_not=lambda: None
    )
    # Tensors on the CPU have no index, so each is on the current device.
    torch.cuda.current_device = lambda: None  # type: ignore[assignment, return-value]
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(cuda_stream=0)  # type: ignore[assignment, return-value]
