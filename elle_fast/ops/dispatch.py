"""An operation: its operator in torch, its backends' functions, and its launch plans.

A graph sees the operator, whose schema and shapes it needs; the operator looks up the backend, an argument, when it
runs. In plain eager mode the backend's function is called directly, as the dispatcher takes about 8 us for some twenty
arguments (benchmarks/results/overhead.json).
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
    """One operation, called as ``op(backend, *values, *options)``.

    Args:
        name: of the operator, and of each backend's function, which takes ``(*values, *options)``.
        values: arguments as :mod:`torch.library` writes them; the first is a tensor.
        options: the NamedTuples that the function takes; the operator takes their fields one by one.
        results: as :mod:`torch.library` writes them.
        fake: makes the results, without data, of the function's arguments.
        folder: of ``elle_fast/ops``, where each backend is a file with a function of the operation's name.
        written: which of the values is a list of tensors that the function writes to, if one is.
    """

    def __init__(
        self,
        name: str,
        values: str,
        options: tuple[Any, ...],
        results: str,
        fake: Callable[..., Any],
        *,
        folder: str,
        written: int | None = None,
    ) -> None:
        self.name, self.folder = name, folder
        self._options, self._written = options, written
        self._kernels: dict[str, Callable[..., Any]] = {}
        self._plans: OrderedDict[Any, Any] = OrderedDict()
        _OPS.append(self)
        fields = [f"{_SCHEMA_TYPES[kind]} {field}" for each in options for field, kind in get_type_hints(each).items()]
        _LIBRARY.define(f"{name}({values}, str backend, {', '.join(fields)}) -> {results}")
        _LIBRARY.impl(name, lambda *flat: self._run(*self._unflattened(flat)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"elle_fast::{name}", lambda *flat: fake(*self._unflattened(flat)[1]), lib=_LIBRARY)
        self.operator: Any = getattr(torch.ops.elle_fast, name).default

    def __call__(self, backend: str, *arguments: Any) -> Any:
        """Call the backend's function, through the operator where a compiler, a subclass or a mode has to see it."""
        if eager(*arguments):
            return self._run(backend, arguments)
        values, options = arguments[: -len(self._options)], arguments[-len(self._options) :]
        return self.operator(*values, backend, *[field for option in options for field in option])

    def _unflattened(self, flat: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
        """The backend and its function's arguments, from the operator's."""
        # The dispatcher hands sequences over as lists; a plan's key has to be hashable.
        left: list[Any] = [tuple(value) if type(value) is list else value for value in flat]
        options: list[Any] = []
        for kind in reversed(self._options):
            count = len(kind._fields)
            options.insert(0, kind(*left[-count:]))
            del left[-count:]
        return left.pop(), (*left, *options)

    def _run(self, backend: str, arguments: Sequence[Any]) -> Any:
        result = self.kernel(backend)(*arguments)
        if self._written is not None:
            # Else a graph that saved the lam of the step before would use this step's.
            changed(arguments[self._written])
        return result

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


def eager(*values: Any) -> bool:
    """True in plain eager mode: not compiling, no dispatch mode, and no tensor subclass among the values."""
    return not is_compiling() and torch._C._len_torch_dispatch_stack() == 0 and _plain(values)


def _plain(values: Sequence[Any]) -> bool:
    for value in values:
        kind = type(value)
        if kind is list or kind is tuple:
            if not _plain(value):
                return False
        elif kind not in _PLAIN and isinstance(value, Tensor):
            return False
    return True


def changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that a kernel wrote to them, so that a graph which saved one of them raises an error."""
    for tensor in tensors:  # torch 2.4 does not take them all at once
        torch.autograd.graph.increment_version(tensor)
