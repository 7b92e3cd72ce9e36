"""Write the tables of README, docs and CONTRIBUTING from the JSON files of benchmarks/results.

    make tables                    # writes them
    make tables ARGS=--check       # writes nothing, says which differ; exit status 1 if one does
    make tables ARGS=--list        # the names, and the files that they are drawn from

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` (markers.py). NAME is a key of ``TABLES`` in a
folder's doc_tables.py, beside the program that writes the JSON file. What is between the marks is written anew, with a
small line below it that says where the numbers are from; all else in the file stays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.program import ROOT, parser
from benchmarks.tables.markers import filled
from benchmarks.tables.registry import RESULTS, Drawn, tables
from elle_fast._core.files import write_atomically


def pages(root: Path = ROOT) -> list[Path]:
    """The Markdown files that may hold tables."""
    alone = [root / name for name in ("README.md", "CONTRIBUTING.md")]
    return [*(path for path in alone if path.exists()), *sorted((root / "docs").glob("**/*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, check or list; 1 if a check finds a table that differs."""
    options_of = parser("benchmarks.tables.write", __doc__)
    options_of.add_argument("files", nargs="*", type=Path, help="Markdown files; by default README, docs, CONTRIBUTING")
    options_of.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    only = options_of.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="write nothing, and say what differs")
    only.add_argument("--list", action="store_true", help="the names of the tables, and their files")
    options = options_of.parse_args(arguments)
    if options.list:
        for name, table in tables().items():
            there = "" if (options.results / table.results).exists() else " (not there)"
            print(f"{name}: {table.results}{there}")
        return 0
    draw = Drawn(options.results)
    made = {path: filled(_read(path), _name(path), draw) for path in options.files or pages()}
    for path, (text, differing) in made.items():
        for each in differing:
            where = f"{_name(path)}:{each.line}: table {each.name!r}"
            if options.check:
                print(f"{where}: here {each.here}, from its JSON file {each.drawn}; make tables writes it")
            else:
                print(where)
        if differing and not options.check:
            content = text.encode()
            write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return int(options.check and any(differing for _, differing in made.values()))


def _read(path: Path) -> str:
    return path.read_bytes().decode()


def _name(path: Path) -> str:
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as problem:
        sys.exit(f"tables: {problem}")
