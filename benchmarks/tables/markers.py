"""The places of tables in a Markdown file, and what is between their marks.

A place is two lines, which no reader of the page sees, and what stands between them:

    <!-- table: digits -->

    | ... the table, and the small line under it

    <!-- end -->

Marks begin at the start of a line. Inside of code, fenced or indented, they are an example and no mark.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

_BEGIN = re.compile(r"<!--\s*table\s*:\s*(\S+)\s*-->\s*")
_ALMOST = re.compile(r"<!--\s*table\b")
_END = re.compile(r"<!--\s*end\s*-->\s*")
_FENCE = re.compile(r" {0,3}(```+|~~~+)")


@dataclass(frozen=True)
class Place:
    """Of a table; ``begin`` and ``end`` are the indices of its marks among the lines of the file."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Difference:
    """A table that is not as it is drawn: the number of the first line that differs, as it is and as it should be."""

    name: str
    line: int
    here: str
    drawn: str


def places(text: str, file: str) -> list[Place]:
    """The places in a file, from the top; ValueError, naming file and line, for marks that do not fit together."""
    found: list[Place] = []
    name, begin = None, 0
    for index, line in _outside_code(text):
        where = f"{file}:{index + 1}"
        if (mark := _BEGIN.fullmatch(line)) is not None:
            if name is not None:
                raise ValueError(
                    f"{where}: expected '<!-- end -->' of table {name!r}, which begins in line {begin + 1}, before the "
                    f"next table, got {line.strip()!r}"
                )
            name, begin = mark[1], index
        elif _ALMOST.match(line):
            raise ValueError(f"{where}: expected '<!-- table: NAME -->', got {line.strip()!r}")
        elif _END.fullmatch(line):
            if name is None:
                raise ValueError(f"{where}: expected '<!-- table: NAME -->' before it, got {line.strip()!r} alone")
            found.append(Place(name, begin, index))
            name = None
    if name is not None:
        raise ValueError(f"{file}:{begin + 1}: expected '<!-- end -->' after table {name!r}, got none")
    return found


def filled(text: str, file: str, draw: Callable[[str], str]) -> tuple[str, list[Difference]]:
    """The file with all of its tables drawn, and those that differed.

    Args:
        text: the file's content.
        file: its name, for messages.
        draw: makes what stands between the marks of a name.

    Raises:
        ValueError, FileNotFoundError: what ``draw`` raises, and for marks that do not fit; naming file and line.
    """
    lines = text.split("\n")
    differing = []
    for place in reversed(places(text, file)):  # from the last, so that the indices of the others stay
        here = lines[place.begin + 1 : place.end]
        try:
            drawn = ["", *draw(place.name).split("\n"), ""]
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{file}:{place.begin + 1}: {error}") from error
        if here != drawn:
            differing.append(_difference(place, here, drawn))
            lines[place.begin + 1 : place.end] = drawn
    return "\n".join(lines), differing[::-1]


def _difference(place: Place, here: list[str], drawn: list[str]) -> Difference:
    pairs = enumerate(zip_longest(here, drawn, fillvalue=None), start=place.begin + 2)
    line, (own, other) = next((line, pair) for line, pair in pairs if pair[0] != pair[1])
    own, other = ("nothing" if each is None else repr(each) for each in (own, other))
    return Difference(place.name, line, own, other)


def _outside_code(text: str) -> Iterator[tuple[int, str]]:
    """Index and content of the lines that are in no fenced code."""
    fence = None
    for index, line in enumerate(text.split("\n")):
        mark = _FENCE.match(line)
        if fence is None:
            if mark is None:
                yield index, line
            else:
                fence = mark[1]
        elif mark is not None and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = None
