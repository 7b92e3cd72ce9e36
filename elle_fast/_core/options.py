"""Options that are set on an object which is built: each takes effect, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NoReturn

from elle_fast._core import checks


class Options:
    """Base class, named before ``nn.Module``: what comes of ``built.name = value``.

    An option in ``_changeable`` is checked, in the constructor's own assignment as well, and counts from the next call
    on. Other arguments of the constructor, and what ``_fixed`` adds, are set once; another value is an AttributeError.
    So is one for an argument that is kept elsewhere. What is no option, and whatever a subclass outside of this package
    adds, is free.
    """

    # A check (name, value) -> value for each.
    _changeable: ClassVar[Mapping[str, Callable[[str, Any], Any]]] = {}
    _fixed: ClassVar[Collection[str]] = ()
    # Arguments that are not kept by their name, and what to do instead.
    _elsewhere: ClassVar[Mapping[str, str]] = {}
    # Derived: what may be set, those of `_changeable` and the properties that have a setter.
    _settable: ClassVar[Collection[str]] = ()

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
            return
        bases = [base for base in cls.__mro__ if issubclass(base, Options)]
        cls._changeable = {name: check for base in reversed(bases) for name, check in base._changeable.items()}
        cls._elsewhere = {name: hint for base in reversed(bases) for name, hint in base._elsewhere.items()}
        properties = {name: each for base in reversed(bases) for name, each in vars(base).items()}
        setters = [name for name, each in properties.items() if isinstance(each, property) and each.fset is not None]
        cls._settable = tuple(dict.fromkeys((*cls._changeable, *setters)))
        names = {*inspect.signature(cls).parameters, *(name for base in bases for name in base._fixed)}
        cls._fixed = frozenset(name for name in names if getattr(getattr(cls, name, None), "fset", None) is None)

    def __setattr__(self, name: str, value: Any) -> None:
        if (check := self._changeable.get(name)) is not None:
            value = check(name, value)
        elif isinstance(getattr(type(self), name, None), property):
            return object.__setattr__(self, name, value)  # before torch keeps a module or a parameter by this name
        elif name in self._elsewhere or (name in self._fixed and hasattr(self, name)):
            self._refuse(name, value, self._elsewhere.get(name, "build another one"))
        super().__setattr__(name, value)

    def _refuse(self, name: str, value: Any, hint: str) -> NoReturn:
        expected = f"{type(self).__name__}.{name}: expected no other value after it is built; {hint}"
        raise AttributeError(f"{expected}, got {checks.describe(value)}")
