"""A network that the user's own code builds, by ``package.module:callable``."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from elle_fast._core import checks
from elle_fast._core.digests import digest_of


def call(name: str, in_shape: tuple[int, ...], classes: int, args: dict[str, Any]) -> nn.Module:
    """The module that the callable returns.

    It is called with the keyword options ``args``, and, where its signature has a parameter of that name and ``args``
    has not, with ``num_classes`` or ``classes`` (the number of classes) and ``in_shape`` (a sample's shape).

    Raises:
        TypeError, ValueError: if it does not exist, takes no such option, raises, or returns no module.
    """
    made = _found(name)
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: expected a callable whose signature Python can tell, got {name!r}") from error
    own = {"num_classes": classes, "classes": classes, "in_shape": in_shape}
    options = {each: value for each, value in own.items() if each in parameters} | args
    _check_options(name, parameters, options)
    try:
        net = made(**options)
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"model: {name!r} raised {type(error).__name__}: {reason}") from error
    if not isinstance(net, nn.Module):
        raise TypeError(f"model: expected {name!r} to return a torch.nn.Module, got {checks.describe(net)}")
    return net


def source_digest(name: str) -> str:
    """Of the source files that a callable's code is in, which has been imported: its module's, or its top package's.

    Files are told by their path in the package, so that a copy elsewhere has the same digest.
    """
    top = sys.modules[name.partition(":")[0].partition(".")[0]]
    parts: list[bytes] = []
    for folder in map(Path, getattr(top, "__path__", [])):
        for here, folders, files in os.walk(folder):
            folders[:] = sorted(each for each in folders if each.isidentifier())  # nothing else can be imported
            for file in (Path(here, each) for each in sorted(files) if each.endswith(".py")):
                parts += [str(file.relative_to(folder)).encode(errors="surrogateescape"), file.read_bytes()]
    if not parts and (file := Path(getattr(top, "__file__", None) or "")).is_file():
        parts = [file.read_bytes()]
    return digest_of(*parts)


def _found(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        with _current_folder_first():
            found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"model: the import of {module!r} failed with {type(error).__name__}: {error}") from error
        got = f"got {error.name!r}, which is neither in the current folder, {str(Path.cwd())!r}, nor installed"
        raise ValueError(f"model: expected a module that can be imported in {name!r}, {got}") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"model: the import of {module!r} failed with {type(error).__name__}: {reason}") from error
    made = getattr(found, attribute, None)
    if made is None:
        callables = [each for each, value in vars(found).items() if callable(value)]
        near = "".join(f"; did you mean {match}?" for match in get_close_matches(attribute, callables, 1))
        raise ValueError(f"model: {module!r} has no {attribute!r}{near}")
    if not callable(made):
        raise TypeError(f"model: expected a callable in {name!r}, got {checks.describe(made)}")
    return made  # type: ignore[no-any-return]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """As with ``python -m``. Afterwards it is the last place to look, for imports within functions."""
    here = str(Path.cwd())
    there = here in sys.path or "" in sys.path
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
        if not there:
            sys.path.append(here)


def _check_options(name: str, parameters: Any, options: dict[str, Any]) -> None:
    kinds = inspect.Parameter
    if not any(each.kind is kinds.VAR_KEYWORD for each in parameters.values()):
        taken = [
            each
            for each, value in parameters.items()
            if value.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        ]
        for option in options:
            if option not in taken:
                near = "".join(f"; did you mean {match}?" for match in get_close_matches(option, taken, 1))
                raise ValueError(f"model_args: {name!r} takes no option {option!r}{near}")
    needed = [
        each
        for each, value in parameters.items()
        if value.default is kinds.empty and value.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    if missing := [each for each in needed if each not in options]:
        raise ValueError(f"model_args: {name!r} needs {', '.join(missing)}, which model_args does not give")
