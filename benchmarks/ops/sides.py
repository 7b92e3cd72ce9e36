"""What the cases of bench_ops.py share: their form, and which backends are timed on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.harness.timing import Side
from elle_fast import backends
from elle_fast.backends import extension


@dataclass(frozen=True)
class Case:
    """What is compared with what."""

    name: str
    # Inputs, and each side or why it is left out; AssertionError if their results are wrong.
    prepare: Callable[[], Mapping[str, Side | str]]
    bytes: int | None = None  # that a call has to move
    threads: int | None = None  # torch's own number
    device: str = "cpu"
    plotted: bool = True


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
