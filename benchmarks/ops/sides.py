"""Shared by the cases of bench_ops.py: their form, and which backends are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.harness.timing import Side
from elle_fast import backends
from elle_fast.backends import extension


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    # Returns each side, or why it is left out; AssertionError if a result is wrong.
    prepare: Callable[[], Mapping[str, Side | str]]
    bytes: int | None = None  # moved by a call
    threads: int | None = None  # of torch; None leaves its number
    plotted: bool = True


def kernels() -> list[str]:
    """The backends that run on the CPU; cpp once for each instruction set, the widest first."""
    module = extension.load()
    names = []
    for name, backend in backends.BACKENDS.items():
        if name == "reference" or not backend.serves("cpu") or backend.why_not() is not None:
            continue
        names += [f"{name}-{isa}" for isa in module.isas()] if name == "cpp" and module is not None else [name]
    return names
