"""The queue's list, a YAML file: which trainings, in which order, attacked how, and where their rows go.

``defaults`` are options of a run, as in a file for ``elle-fast train --config``; ``entries`` is a list, the most
valuable first. An entry has

- ``name``: a word, the folder of its runs under --work;
- ``result``: the file of its rows in --results, which no other entry has;
- ``note``: stands in every picture;
- ``variants``: by name, the options that differ from ``options`` and ``defaults``;
- ``eps``, ``seeds``: lists. All variants are run at the first eps with the first seed, then at the next eps; then all
  of it with the next seed. To run some rows before others, make two entries of them;
- ``options`` (none by default): options of all its variants;
- ``attacks`` (none by default) and ``samples`` (all by default): stronger attacks on the last weights of each run, with
  commas between, and how many test images they get.

A ``root`` in the options is a path in the folder --root.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, Strong
from elle_fast._core import checks
from elle_fast.evaluation import parse_attacks
from elle_fast.recipes.checked import read_yaml, refuse_unknown
from elle_fast.recipes.config import TrainConfig

_NEEDED = ("name", "result", "note", "variants", "eps", "seeds")
_KNOWN = (*_NEEDED, "options", "attacks", "samples")
_SET_ELSEWHERE = {"eps": "the list 'eps' of the entry", "seed": "the list 'seeds' of the entry"}


@dataclass(frozen=True)
class Entry:
    """One entry: its cells in the order in which they are run, and the JSON file of their rows."""

    name: str
    note: str
    result: Path
    cells: list[Cell]


def read_entries(path: Path, *, root: Path, work: Path, results: Path) -> list[Entry]:
    """The entries of a file, all of it checked: names, types, ranges, packages of the attacks, that the data are there.

    Raises:
        OSError: if the file, or the data of a run, cannot be read.
        ImportError: if an attack needs a package that is not installed.
        TypeError, ValueError: naming file, entry and option.
    """
    given = read_yaml(path)
    refuse_unknown(given, ("defaults", "entries"), str(path), "'defaults' or 'entries'")
    defaults = _mapping(given.get("defaults", {}), f"{path}: defaults")
    entries: list[Entry] = []
    for number, fields in enumerate(_several(given.get("entries"), f"{path}: entries"), start=1):
        source = f"{path}: entry {number}"
        fields = _mapping(fields, source)
        if "name" in fields:
            source = f"{path}: entry {fields['name']!r}"
        entry = _entry(fields, source, defaults, root, work, results)
        for name in ("name", "result"):
            if getattr(entry, name) in [getattr(other, name) for other in entries]:
                raise ValueError(f"{source}: {name}: expected one of its own, got that of another entry")
        entries.append(entry)
    return entries


def _entry(
    fields: dict[str, Any], source: str, defaults: dict[str, Any], root: Path, work: Path, results: Path
) -> Entry:
    refuse_unknown(fields, _KNOWN, source, "a field of an entry")
    for name in _NEEDED:
        if name not in fields:
            raise ValueError(f"{source}: {name}: expected a value, got none")
    name, result = (_file_name(fields[each], f"{source}: {each}") for each in ("name", "result"))
    strong = _strong(fields, source)
    base = defaults | _mapping(fields.get("options", {}), f"{source}: options")
    cells = []
    for seed in _several(fields["seeds"], f"{source}: seeds"):
        for eps in _several(fields["eps"], f"{source}: eps"):
            for variant, own in _mapping(fields["variants"], f"{source}: variants").items():
                where = f"{source}, variant {variant!r}"
                options = base | _mapping(own, where)
                for each, place in _SET_ELSEWHERE.items():
                    if each in options:
                        raise ValueError(f"{where}: {each}: expected in {place}, got it among the options")
                config = _config(options | {"eps": eps, "seed": seed}, where, root)
                cells.append(Cell(work / name, None, _file_name(variant, where), config, strong))
    if len({cell.folder for cell in cells}) < len(cells):
        raise ValueError(f"{source}: expected runs that differ in variant, eps or seed, got two that do not")
    return Entry(name, str(fields["note"]), results / result, cells)


def _config(options: dict[str, Any], source: str, root: Path) -> TrainConfig:
    config = TrainConfig.from_options(options, source)
    try:
        config.resolved()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
    if config.root is None:
        return config
    if not (found := root / config.root).exists():
        raise FileNotFoundError(f"{source}: root: expected a file or folder, got {str(found)!r}, which is not there")
    return replace(config, root=str(found))


def _strong(fields: dict[str, Any], source: str) -> Strong | None:
    samples = fields.get("samples")
    if "attacks" not in fields:
        if samples is not None:
            raise ValueError(f"{source}: samples: expected none without attacks, got {samples!r}")
        return None
    try:
        parse_attacks(fields["attacks"])
        if samples is not None:
            checks.integer("samples", samples, low=1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
    return Strong(fields["attacks"], samples, masking=False)


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{source}: expected lines of the form 'option: value', got {checks.describe(value)}")
    return value


def _several(value: Any, source: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise TypeError(f"{source}: expected a list of at least one, got {checks.describe(value)}")
    return value


def _file_name(value: Any, source: str) -> str:
    if not isinstance(value, str) or value in ("", "..") or Path(value).name != value:
        raise ValueError(f"{source}: expected the name of a file or folder, without a path, got {value!r}")
    return value
