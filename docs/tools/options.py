"""The options of the command line as Markdown, read off what ``elle-fast COMMAND --help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
from html import escape
from typing import NamedTuple

_FRAME = str.maketrans("│╭╰╮╯─", "      ")
# A name, with its --no-name or its kind of value; what it does begins after two spaces, or on the next line.
_FLAGS = r"(?:-h, )?--[a-z][\w-]*(?:, --[a-z][\w-]*)*(?: [\w{}|,]+)?|\[?[A-Z]+\]?(?:\.\.\.)?"
_OPTION = re.compile(rf"^ ?(?P<flags>{_FLAGS})(?:  +(?P<about>\S.*))?$")
_DEFAULT = re.compile(r"\s*\(default: (?P<value>[^()]*(?:\([^()]*\))?[^()]*)\)$")


class Option(NamedTuple):
    """``flags`` as they are given, what it does, and its default as printed (``None``: it has none)."""

    flags: str
    about: str
    default: str | None


def printed_help(command: str) -> str:
    """What ``elle-fast COMMAND --help`` prints on a wide terminal."""
    from elle_fast.recipes import cli

    said = io.StringIO()
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM", "FORCE_COLOR")}
    os.environ.update(COLUMNS="160", NO_COLOR="1", TERM="dumb")
    os.environ.pop("FORCE_COLOR", None)
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            cli.read_options(command, ["--help"])
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return said.getvalue()


def options(command: str) -> list[Option]:
    """The options of ``train``, ``report``, ``eval`` or ``export``, in their order.

    Raises:
        ValueError: if the help cannot be read.
    """
    found: list[tuple[str, list[str]]] = []
    for line in printed_help(command).splitlines():
        text = line.translate(_FRAME).rstrip()[1:]  # without the frame that some terminals get
        match = _OPTION.match(text)
        if match is not None:
            found.append((match["flags"], [match["about"] or ""]))
        elif found and text.startswith("     "):
            found[-1][1].append(text.strip())
    if not any(flags == "-h, --help" for flags, _ in found):
        raise ValueError(f"command: expected one whose help can be read, got {command!r}")
    read = []
    for flags, lines in found:
        about = " ".join(line for line in lines if line)
        default = _DEFAULT.search(about)
        read.append(Option(flags, _DEFAULT.sub("", about), None if default is None else default["value"]))
    return [option for option in read if option.flags != "-h, --help"]


def markdown(command: str) -> str:
    """A definition list of the options of a command."""
    parts = []
    for option in options(command):
        name = option.flags.split(",")[0].split(" ")[0].strip("[].")
        default = "" if option.default in (None, "None") else f" Default: `{option.default}`."
        about = escape(option.about, quote=False).replace("*", r"\*").replace("_", r"\_")
        parts.append(f"`{option.flags}`{{ #{command}-{name.lstrip('-').lower()} }}\n:   {about}{default}")
    return "\n\n".join(parts)
