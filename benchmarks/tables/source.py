"""The small line under a table: file, commits, machines, versions, time and command, as far as the file says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_COMMITS = 4  # that are named; of more, the number
_COMMIT = re.compile(r"[0-9a-f]{7,40}(-dirty)?")
# Long parts of a file in which nothing of this is.
_PASSED = ("config", "curves", "epochs", "steps", "variants", "timings")


def source(file: str, content: dict[str, Any]) -> str:
    """Markdown in one line."""
    parts = [f"From `benchmarks/results/{file}`", *_missing(content), *_commits(content), *_machines(content)]
    parts += [*_duration(content), *_command(content)]
    return f"<sub>{'; '.join(parts)}.</sub>"


def _missing(content: dict[str, Any]) -> list[str]:
    missing, done = content.get("missing", 0), len(content.get("runs", ()))
    failed = len(content.get("failed") or ())
    said = [f"{done} of {done + missing} trainings are done"] if missing else []
    return said + ([f"{failed} failed"] if failed else [])


def _commits(content: dict[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for each in _all(content, "commit", "commits"):
        found |= dict.fromkeys(one for one in (each if isinstance(each, list) else [each]) if isinstance(one, str))
    known = [each for each in found if _COMMIT.fullmatch(each)]
    if len(known) > _COMMITS:
        return [f"{len(known)} commits, which the file names"]
    return [f"commit{'s' * (len(known) > 1)} {', '.join(known)}"] if known else []


def _machines(content: dict[str, Any]) -> list[str]:
    found: dict[str, dict[int, None]] = {}
    for machine in _all(content, "machine"):
        place = machine.get("accelerator") or f"{machine['processor']}, {machine['cores']} cores"
        found.setdefault(place, {})[machine["torch_threads"]] = None
    places = [
        f"{place}, {' or '.join(map(str, each))} thread{'s' * (each.keys() != {1})}" for place, each in found.items()
    ]
    torch = dict.fromkeys(each["torch"] for each in _all(content, "versions"))
    said = [" and ".join(places)] if places else []
    return said + ([f"torch {' and '.join(torch)}"] if torch else [])


def _duration(content: dict[str, Any]) -> list[str]:
    """Of the program, or of its rows together."""
    if _is_number(content.get("seconds")):
        return [_time(content["seconds"])]
    rows = content.get("runs", content.get("rows", []))
    of_rows = [
        row[name]
        for row in (rows.values() if isinstance(rows, dict) else rows)
        if isinstance(row, dict)
        for name in ("training_seconds", "seconds")
        if _is_number(row.get(name))
    ]
    return [f"{_time(sum(of_rows))} for all trainings"] if of_rows else []


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _command(content: dict[str, Any]) -> list[str]:
    command = content.get("command")
    return [] if command is None else [f"`{command if isinstance(command, str) else ' '.join(command)}`"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _all(content: Any, *names: str) -> Iterator[Any]:
    """The values of these keys at any depth, in order."""
    if isinstance(content, list):
        for each in content:
            yield from _all(each, *names)
    elif isinstance(content, dict):
        for name, value in content.items():
            if name in names:
                yield value
            elif name not in _PASSED:
                yield from _all(value, *names)
