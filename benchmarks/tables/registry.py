"""All tables by name: those of each folder's doc_tables.py, which is beside the programs that write the JSON files."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.tables.source import source
from benchmarks.tables.table import Table
from elle_fast._core import checks

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
TABLES = "doc_tables"


def tables() -> dict[str, Table]:
    """Every table by name; ValueError if two folders have one of the same name."""
    found: dict[str, Table] = {}
    for path in sorted(BENCHMARKS.glob(f"*/{TABLES}.py")):
        module = importlib.import_module(f"benchmarks.{path.parent.name}.{TABLES}")
        for name, table in module.TABLES.items():
            if name in found:
                raise ValueError(f"{path}: expected tables with names of their own, got a second one called {name!r}")
            found[name] = table
    return found


class Drawn:
    """The tables as text, each JSON file read once.

    Args:
        results: the folder of the JSON files.
    """

    def __init__(self, results: Path = RESULTS) -> None:
        self._results = results
        self._tables = tables()
        self._read: dict[str, dict[str, Any]] = {}

    def __call__(self, name: str) -> str:
        """The table of that name, and below it where it is from.

        Raises:
            ValueError: for a name that is not known, a file that is not JSON or lacks what the table shows.
            FileNotFoundError: if there is no such file.
        """
        table = self._tables[checks.choice("table", name, list(self._tables))]
        content = self._content(name, table.results)
        try:
            drawn = table.draw(content)
        except (KeyError, IndexError) as error:
            path = self._results / table.results
            raise ValueError(f"table {name!r}: expected {path} to have what it shows, got none of {error}") from error
        return f"{drawn}\n\n{source(table.results, content)}"

    def _content(self, name: str, file: str) -> dict[str, Any]:
        if file not in self._read:
            path = self._results / file
            if not path.exists():
                raise FileNotFoundError(f"table {name!r}: expected the file {path}, which is not there")
            try:
                self._read[file] = json.loads(path.read_text())
            except ValueError as error:
                raise ValueError(f"table {name!r}: expected a JSON file, got {path}: {error}") from error
        return self._read[file]
