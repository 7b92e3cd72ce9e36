"""Rows by name in a JSON file that several processes share, and cells of which each is one process's to do."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.program import write_lines

Row = dict[str, Any]
Rows = dict[str, Row]
_Cell = TypeVar("_Cell")


def read_rows(path: Path) -> Rows:
    """The rows of the file, if there is one."""
    rows: Rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    return rows


def add_rows(rows: Rows, path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write the file with these rows beside those that it has, which other processes may have added.

    ``before`` and ``after`` are what it holds above and below the rows.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(path.parent):
        write_lines(path, {**before, "rows": {**read_rows(path), **rows}, **after})


def chosen(cells: Mapping[str, _Cell], names: Sequence[str] | None) -> list[_Cell]:
    """The cells whose names are among these, or fit one of these patterns; ValueError if there is none for one."""
    for name in names or ():
        if not any(fnmatchcase(each, name) for each in cells):
            raise ValueError(f"only: expected names of cells or patterns that fit some, got {name!r}")
    return [cell for each, cell in cells.items() if names is None or any(fnmatchcase(each, name) for name in names)]


def taken(
    cells: Iterable[_Cell], folder_of: Callable[[_Cell], Path], is_left: Callable[[_Cell], bool]
) -> Iterator[_Cell]:
    """The cells that are left, one after the other, each with its folder, while no other process is at it."""
    for cell in cells:
        if not is_left(cell):
            continue
        folder = folder_of(cell)
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder, wait=False) as ours:
            if not ours:
                print(f"{folder.name}: another process is at it", file=sys.stderr)
            elif is_left(cell):  # still: another process may just have ended it
                yield cell


@contextmanager
def alone_in(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Wait until no other process is in here for the same folder, and keep the others waiting.

    Without ``wait`` the value is False if another one is, and this one has not entered.
    """
    # The lock is on the folder, so that no file is left in it.
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)  # gives the lock up
