"""What the programs share: how their options are read, and how a result names the command that made it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def parser(module: str, document: str | None) -> argparse.ArgumentParser:
    """For ``python -m module``; ``document``: its docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def command(options_of: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The command line that gives these options, as a result records it: those that differ from their defaults.

    Of a path only its name, as its folder is this machine's. A list is an option given several times, a tuple one
    value with commas.
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
