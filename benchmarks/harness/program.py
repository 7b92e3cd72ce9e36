"""Shared by the programs: reading options, recording the command in a result, and writing JSON by the line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from elle_fast._core.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]


def parser(module: str, document: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module``, whose docstring ``document`` is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def number(text: str, low: int = 1) -> int:
    """An option's type: an integer >= ``low``."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"expected an integer >= {low}, got {text!r}")
    return int(text)


def listed(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """An option's type: values separated by commas."""

    def several(text: str) -> tuple[Any, ...]:
        try:
            return tuple(read(each) for each in text.split(","))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return several


def command(options_of: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The command line that a result records: the options that differ from their defaults; of a path, its name.

    A list is an option given several times, a tuple one value with commas.
    """
    words = options_of.prog.split()
    for name, value in vars(options).items():
        flag = f"--{name.replace('_', '-')}"
        if value == options_of.get_default(name):
            continue
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [f"{flag}={_text(each)}" for each in value]
        else:
            words.append(f"{flag}={_text(value)}")
    return words


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value.name if isinstance(value, Path) else str(value)


def write_lines(path: Path, content: dict[str, Any], *, depth: int = 2) -> None:
    """Write JSON with one line for each value at that depth, so that the diff of one changed value is one line."""
    text = _lines(content, depth, "") + "\n"

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, write)


def _lines(value: Any, depth: int, indent: str) -> str:
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value)
    within = indent + "  "
    entries = [f"{within}{json.dumps(name)}: {_lines(each, depth - 1, within)}" for name, each in value.items()]
    return "{\n" + ",\n".join(entries) + "\n" + indent + "}"
