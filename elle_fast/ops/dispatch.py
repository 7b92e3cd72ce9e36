"""Operations: for each an operator in torch, the functions that its backends have for it, and its launch plans.

The operator tells a graph what it has to know: schema and shapes. The backend is one of its arguments and is looked up
when it runs. In plain eager mode the backend's function is called past the operator, as the dispatcher takes about 8 us
for some twenty arguments (benchmarks/results/overhead.json).
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_compiling

R = TypeVar("R")

# Kinds of calls whose plans an operation keeps: enough for every layer shape and last batch of a training.
MOST_PLANS = 256

_PLAIN = (Tensor, torch.nn.Parameter)
_LIBRARY = torch.library.Library("elle_fast", "DEF")
_SCHEMA_TYPES = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    tuple[float, float] | None: "float[]?",
    tuple[float, ...] | None: "float[]?",
    torch.dtype | None: "ScalarType?",
    torch.memory_format: "MemoryFormat",
}


_OPS: list[Op] = []


class Op:
    """One operation.

    Args:
        schema: ``name(arguments) -> results`` of the operator, as :mod:`torch.library` takes it.
        implementation: what the operator does with real tensors.
        fake: what it returns for tensors without data.
        folder: of ``elle_fast/ops``, where each backend is a file that has a function of the operation's name.
    """

    def __init__(
        self, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any], *, folder: str
    ) -> None:
        self.name = schema.partition("(")[0]
        self.folder = folder
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._plans: OrderedDict[Any, Any] = OrderedDict()
        _OPS.append(self)
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"elle_fast::{self.name}", fake, lib=_LIBRARY)
        self.operator: Any = getattr(torch.ops.elle_fast, self.name).default

    def kernel(self, backend: str) -> Callable[..., Any]:
        """The backend's function. Its file is imported when it is first asked for."""
        found = self._kernels.get(backend)
        if found is None:
            module = importlib.import_module(f"elle_fast.ops.{self.folder}.{backend}")
            found = self._kernels[backend] = getattr(module, self.name)
        return found

    def plan(self, make: Callable[..., R], *key: Any) -> R:
        """``make(*key)``, made once for each backend's ``make`` and key; the oldest of too many is forgotten.

        The key holds all that the plan depends on, read off the very tensors that the kernel is given.
        """
        found: R | None = self._plans.get((make, key))
        if found is None:
            found = self._plans[make, key] = make(*key)
            if len(self._plans) > MOST_PLANS:
                self._plans.popitem(last=False)
        return found


def forget_plans() -> None:
    """Every operation plans its launches anew."""
    for op in _OPS:
        op._plans.clear()


def fields_of(options: type) -> str:
    """The fields of a NamedTuple as arguments of a schema."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(options).items())


def hashable(options: Sequence[Any]) -> list[Any]:
    """The values of a NamedTuple as it was: the dispatcher hands sequences over as lists."""
    return [tuple(option) if isinstance(option, list) else option for option in options]


def eager(tensor: Tensor) -> bool:
    """True in plain eager mode: not compiling, no tensor subclass, no dispatch mode."""
    if is_compiling() or type(tensor) not in _PLAIN:
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, which cannot know, that a kernel wrote to them: a graph that saved one of them is out of date."""
    if tensors:
        torch.autograd.graph.increment_version(tensors)
