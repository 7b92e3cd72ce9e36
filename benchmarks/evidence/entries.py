"""The queue's list, a YAML file: which trainings, in which order, attacked how, and where their rows go.

``defaults`` are options of a run, as in a file for ``elle-fast train --config``; ``entries`` is a list, the most
valuable first. An entry has

- ``name``: a word, the folder of its runs under --work;
- ``result``: the file of its rows in --results, which no other entry has;
- ``note``: stands in every picture;
- ``variants``: by name, the options that differ from ``options`` and ``defaults``;
- ``eps``, ``seeds``: lists. All variants are run at the first eps with the first seed, then at the next eps; then all
  of it with the next seed. To run some rows before others, make two entries of them;
- ``recipe`` (none by default): that of ``elle-fast train``, which wins over ``defaults``;
- ``options`` (none by default): options of all its variants, which win over both;
- ``attacks`` (none by default) and ``samples`` (all by default): stronger attacks on the last weights of each run, with
  commas between, and how many test images they get;
- ``models`` (no by default): whether PGD-50-10 is made on as many images against the best weights too, and the averaged
  and best averaged ones of a run that averages.

Or it has a ``name``, a ``result`` and a ``setting``: the cells of that setting of benchmarks/paper/settings.py.

A ``root`` in the options is a path in the folder --root; a setting has that of ``defaults``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, Strong
from benchmarks.paper.settings import SETTINGS
from elle_fast._core import checks
from elle_fast.evaluation import parse_attacks
from elle_fast.recipes import recipe
from elle_fast.recipes.checked import read_yaml, refuse_unknown
from elle_fast.recipes.config import TrainConfig

_NEEDED = ("name", "result", "note", "variants", "eps", "seeds")
_KNOWN = (*_NEEDED, "recipe", "options", "attacks", "samples", "models")
_OF_A_SETTING = ("name", "result", "setting")
_SET_ELSEWHERE = {"eps": "the list 'eps' of the entry", "seed": "the list 'seeds' of the entry"}


@dataclass(frozen=True)
class Entry:
    """One entry: its cells in the order in which they are run, and the JSON file of their rows."""

    name: str
    note: str
    result: Path
    cells: list[Cell]


def read_entries(path: Path, *, root: Path | None, work: Path, results: Path) -> list[Entry]:
    """The entries of a file, all of it checked: names, types, ranges, packages of the attacks, that the data are there.

    Without ``root`` the data are not looked for, and the entries are good for reading what is done.

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
    fields: dict[str, Any], source: str, defaults: dict[str, Any], root: Path | None, work: Path, results: Path
) -> Entry:
    if "setting" in fields:
        return _of_a_setting(fields, source, defaults.get("root"), root, work, results)
    refuse_unknown(fields, _KNOWN, source, "a field of an entry")
    name, result = _needed(fields, _NEEDED, source)
    strong = _strong(fields, source)
    options_of_all = _mapping(fields.get("options", {}), f"{source}: options")
    cells = []
    for seed in _several(fields["seeds"], f"{source}: seeds"):
        for eps in _several(fields["eps"], f"{source}: eps"):
            for variant, own in _mapping(fields["variants"], f"{source}: variants").items():
                where = f"{source}, variant {variant!r}"
                options = options_of_all | _mapping(own, where)
                for each, place in _SET_ELSEWHERE.items():
                    if each in options:
                        raise ValueError(f"{where}: {each}: expected in {place}, got it among the options")
                options |= {"eps": eps, "seed": seed}
                if "recipe" in fields:
                    options = _of_recipe(fields["recipe"], defaults | options, where) | options
                config = _config(defaults | options, where, root)
                cells.append(Cell(work / name, None, _file_name(variant, where), config, strong))
    if len({cell.folder for cell in cells}) < len(cells):
        raise ValueError(f"{source}: expected runs that differ in variant, eps or seed, got two that do not")
    return Entry(name, str(fields["note"]), results / result, cells)


def _of_a_setting(
    fields: dict[str, Any], source: str, of_data: Any, root: Path | None, work: Path, results: Path
) -> Entry:
    """The cells of a setting of the grid, of any commit."""
    refuse_unknown(fields, _OF_A_SETTING, source, "a field of an entry with a setting")
    name, result = _needed(fields, _OF_A_SETTING, source)
    try:
        setting = SETTINGS[checks.choice("setting", fields["setting"], list(SETTINGS))]
        parse_attacks(setting.strong_attacks if setting.strong else "clean")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
    cells = [setting.cell(work / name, None, *cell) for cell in setting.cells(_found(of_data, source, root))]
    return Entry(name, setting.note, results / result, cells)


def _needed(fields: dict[str, Any], names: tuple[str, ...], source: str) -> tuple[str, str]:
    """The name and the result of an entry, none of whose fields are missing."""
    for each in names:
        if each not in fields:
            raise ValueError(f"{source}: {each}: expected a value, got none")
    name, result = (_file_name(fields[each], f"{source}: {each}") for each in ("name", "result"))
    return name, result


def _of_recipe(name: Any, options: dict[str, Any], source: str) -> dict[str, Any]:
    """The options of a recipe, for the data and the method of these options."""
    run = TrainConfig.from_options(options, source)
    try:
        return recipe.options(name, run)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error


def _config(options: dict[str, Any], source: str, root: Path | None) -> TrainConfig:
    config = TrainConfig.from_options(options, source)
    try:
        config.resolved()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
    return replace(config, root=_found(config.root, source, root))


def _found(name: str | None, source: str, root: Path | None) -> str | None:
    """Where the data of that name are."""
    if name is None or root is None:
        return name
    if not (found := root / name).exists():
        raise FileNotFoundError(f"{source}: root: expected a file or folder, got {str(found)!r}, which is not there")
    return str(found)


def _strong(fields: dict[str, Any], source: str) -> Strong | None:
    samples, models = fields.get("samples"), fields.get("models", False)
    if "attacks" not in fields:
        for name in ("samples", "models"):
            if name in fields:
                raise ValueError(f"{source}: {name}: expected none without attacks, got {fields[name]!r}")
        return None
    try:
        parse_attacks(fields["attacks"])
        if samples is not None:
            checks.integer("samples", samples, low=1)
        checks.flag("models", models)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{source}: {error}") from error
    return Strong(fields["attacks"], samples, masking=False, models=models)


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
