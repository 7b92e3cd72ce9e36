"""``torch.compile`` of the model that a run trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

BACKEND: str | Callable[..., Any] = "inductor"
# Graphs of one model: of each number of rows, with and without a gradient, in each precision of its passes.
_GRAPHS = 64


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """The model compiled for batches of fixed sizes; it has the parameters, the buffers and the mode of ``model``.

    Torch compiles a graph for each kind of forward pass when it comes the first time: that of the attack, of the
    points, of the triplets, and each again for an epoch's last batch that is not full.

    Raises:
        RuntimeError: if torch cannot compile here; the message says what is missing.
    """
    import torch._dynamo.config as config  # takes a second, and only a compiled run needs it

    # Torch gives up after 8, and goes on without compiling; the name is an older one's too.
    for name in ("recompile_limit", "cache_size_limit"):
        if hasattr(config, name):
            setattr(config, name, max(_GRAPHS, getattr(config, name)))
    try:
        torch.compile(torch.square, backend=BACKEND, dynamic=False)(torch.ones(2, device=device))
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # of what torch._dynamo raises for a backend
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise RuntimeError(
            "compile: expected that torch.compile works here, which needs a C++ compiler, or Triton on a GPU; got "
            f"{type(cause).__name__}: {reason}"
        ) from error
    found = torch.compile(model, backend=BACKEND, dynamic=False)
    assert isinstance(found, nn.Module)
    return found
