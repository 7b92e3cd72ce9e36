"""Rows by name in a JSON file that several processes share, and work that only one of them is to do."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.program import write_lines

Row = dict[str, Any]
Rows = dict[str, Row]


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
