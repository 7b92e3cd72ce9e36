"""The library of operators, and the functions that each backend has for them.

An operator says what a graph has to know: schema and shapes. The backend is one of its arguments and is looked up when
it runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

_PLAIN = (Tensor, torch.nn.Parameter)

_LIBRARY = torch.library.Library("elle_fast", "DEF")

# A backend is a file in the folder of each op; it is imported when first used.
_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {}
_FOLDERS = {
    "pack_points": "pack_points",
    "random_start": "pack_points",
    "elle_loss": "elle_loss",
    "elle_loss_backward": "elle_loss",
    "update_lam": "elle_loss",
}


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator of ``schema``, and return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"elle_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.elle_fast, name).default


def eager(tensor: Tensor) -> bool:
    """Whether nobody has to see the operator: no compiler, no subclass of Tensor, no dispatch mode.

    The backend's function is then called directly: the dispatcher takes about 8 us for some twenty arguments
    (benchmarks/results/overhead.json).
    """
    if is_compiling() or type(tensor) not in _PLAIN:
        return False
    return torch._C._len_torch_dispatch_stack() == 0


def changed(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, which cannot know, that a kernel wrote to them: a graph that saved one of them is out of date."""
    if tensors:
        torch.autograd.graph.increment_version(tensors)


def function(op: str, backend: str) -> Callable[..., Any]:
    """What ``backend`` runs for ``op``."""
    found = _FUNCTIONS.get((op, backend))
    if found is None:
        module = importlib.import_module(f"elle_fast.ops.{_FOLDERS[op]}.{backend}")
        found = _FUNCTIONS[op, backend] = getattr(module, op)
    return found
