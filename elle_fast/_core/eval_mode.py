"""Eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from elle_fast._core.unwrapping import module_of


@contextmanager
def in_eval_mode(model: Any) -> Iterator[None]:
    """Inside, every module of the model is in eval mode; a function that is no method of a module is left alone."""
    root = module_of(model)
    modes = [(module, module.training) for module in root.modules()] if isinstance(root, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
