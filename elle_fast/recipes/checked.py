"""How options are checked, written and read, wherever they come from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from elle_fast._core import checks
from elle_fast.evaluation import radius
from elle_fast.recipes import averaging


class Checked:
    """Options whose types and ranges are checked when they are made, by hand, from a file or from a checkpoint."""

    norm: str | None

    def __post_init__(self) -> None:
        for option in fields(self):  # type: ignore[arg-type]  # the subclasses are dataclasses
            value = getattr(self, option.name)
            if option.name == "eps" and value is not None:  # that of l2 may be large; the norm may be the checkpoint's
                value = radius(value, "l2" if self.norm is None else self.norm)
            object.__setattr__(self, option.name, _checked(option, value))


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file's mapping.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming it, if it is no YAML, holds no mapping or has a key twice.
    """
    try:
        with path.open("rb") as file:
            given = yaml.load(file, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # the latter of a date or a tagged number that is none
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected lines of the form 'option: value', got {checks.describe(given)}")
    return given


def refuse_unknown(given: Iterable[Any], known: Iterable[str], source: str, what: str) -> None:
    """Raise a ValueError for the first name that is not known, with the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            near = "".join(f"; did you mean {match}?" for match in get_close_matches(str(name), known, 1))
            raise ValueError(f"{source}: {name}: not {what}{near}")


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
    """Refuses a key that is there twice; YAML forbids it, and PyYAML would take the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        names = [self.construct_object(key, deep) for key, _ in node.value]
        if twice := [name for name in found if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]}: given twice", node.start_mark)
        return found


def parse_mapping(text: str) -> dict[str, Any]:
    """``{depth: 4, drop_rate: 0}``, as YAML has it; the braces may be left out."""
    try:
        found: dict[Any, Any] = yaml.load(text if text.lstrip().startswith("{") else f"{{{text}}}", _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(
            f"expected a mapping such as '{{depth: 4}}', got {text!r}: {' '.join(str(error).split())}"
        ) from error
    for name in found:
        if found[name] is None and isinstance(name, str) and (mark := re.search("[:=]", name)):
            meant = f"{name[: mark.start()]}: {name[mark.end() :]}"
            raise ValueError(f"expected a mapping such as '{{depth: 4}}', got {text!r}; did you mean '{{{meant}}}'?")
    plain: dict[str, Any] = _plain("model_args", found)
    return plain


def _plain(name: str, value: Any) -> Any:
    """A copy of what YAML and a checkpoint can hold; TypeError for anything else. Tuples become lists.

    ``1e-3`` is a number, which in YAML needs a dot (1.0e-3).
    """
    if isinstance(value, dict):
        if other := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{name}: expected strings as names, got {checks.describe(other[0])}")
        return {key: _plain(name, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, each) for each in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: expected numbers, strings, lists and mappings, got {checks.describe(value)}")


def parse_number(text: str) -> float:
    """``8/255`` or ``0.1``."""
    if not isinstance(text, str):
        raise TypeError(f"text: expected a string, got {checks.describe(text)}")
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator if slash else 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as 8/255, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text!r}")
    return value


def number_text(value: float) -> str:
    """The shorter of ``0.1`` and ``8/255`` that :func:`parse_number` reads back to the same bits."""
    if not math.isfinite(255 * value):
        return repr(value)
    fraction = f"{round(value * 255)}/255"
    return min(repr(value), fraction, key=len) if parse_number(fraction) == value else repr(value)


def _checked(option: Field[Any], value: Any) -> Any:
    """The value, if it has the option's type and range; by default integers are >= 1 and numbers >= 0."""
    kind, _, optional = str(option.type).removeprefix("Annotated[").partition(" | ")
    if value is None and optional:
        return None
    if kind == "bool":
        return checks.flag(option.name, value)
    if kind == "int":
        return checks.integer(option.name, value, **{"low": 1, **option.metadata})
    if option.name == "lam" and isinstance(value, str):
        if value != "auto":
            raise ValueError(f"lam: expected a number >= 0 or 'auto', got {checks.shown(value)}")
        return value
    if option.name == "average":
        return averaging.checked_tau(value)
    if kind == "float":
        return checks.real(option.name, value, **{"low": 0, **option.metadata})
    if kind == "Path":
        return checks.path(option.name, value)
    if kind.startswith("MutableMapping"):
        if not isinstance(value, dict):
            raise TypeError(f"{option.name}: expected a mapping from names to values, got {checks.describe(value)}")
        return _plain(option.name, value)
    if not isinstance(value, str):
        raise TypeError(f"{option.name}: expected a string, got {checks.describe(value)}")
    return value
