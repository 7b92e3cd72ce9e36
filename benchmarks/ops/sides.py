"""What the cases of bench_ops.py share: their form, and which backends are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
