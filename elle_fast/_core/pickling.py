"""Modules that hold functions of the user's own: what cannot be pickled is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

from torch import nn


class Picklable(nn.Module):
    """A module whose functions are pickled by their names.

    Pickling (``torch.save``, spawned processes, Lightning's ``save_hyperparameters``) raises PicklingError for a lambda
    or a function inside another one, with the attribute's name, which is the argument's. ``copy.deepcopy`` takes any.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: _Nameless(name, value) if _nameless(value) else value for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        found = {name: value.function if isinstance(value, _Nameless) else value for name, value in state.items()}
        super().__setstate__(found)  # type: ignore[no-untyped-call]


class _Nameless:
    """A function that has no name by which a pickle could find it."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __deepcopy__(self, memo: Any) -> _Nameless:
        return self

    def __reduce__(self) -> NoReturn:
        raise pickle.PicklingError(
            f"{self.name}: expected a function that can be pickled, got {self.function!r}; use one defined at the top "
            'of a module, functools.partial of one, operator.itemgetter("logits") or operator.attrgetter("logits")'
        )


def _nameless(value: object) -> bool:
    while isinstance(value, partial):
        value = value.func
    return isinstance(value, FunctionType) and ("<lambda>" in value.__qualname__ or "<locals>" in value.__qualname__)
