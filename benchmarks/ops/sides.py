"""What the cases of benchmarks/ops/bench_ops.py share: the backends to be timed on a device, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from elle_fast import backends
from elle_fast.backends import extension


@dataclass(frozen=True)
class Setting:
    """Where and how the cases run."""

    device: str = "cpu"
    dry: bool = False  # tiny sizes, a call each, and no C++ from torch.compile: nothing is measured


def devices() -> tuple[str, ...]:
    """Those of this machine."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def kernels(device: str) -> list[str]:
    """The backends that run there; cpp once for each instruction set, the widest first."""
    module = extension.load()
    names = []
    for name, backend in backends.BACKENDS.items():
        if name == "reference" or not backend.serves(device) or backend.why_not() is not None:
            continue
        names += [f"{name}-{isa}" for isa in module.isas()] if name == "cpp" and module is not None else [name]
    return names


def fastest(device: str) -> list[str]:
    """The same, cpp with its widest instruction set alone."""
    found = kernels(device)
    return found[:1] if device == "cpu" else found


def compiled(function: Callable[..., Any], setting: Setting) -> Callable[..., Any]:
    """The function under torch.compile, for the shapes of its first call."""
    how = "aot_eager" if setting.dry else "inductor"
    return torch.compile(function, backend=how, dynamic=False, fullgraph=True)
