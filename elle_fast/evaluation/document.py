"""The frame of every HTML page: one file with its style and its script, that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from html import escape

from elle_fast._core import checks
from elle_fast._core.files import write_atomically
from elle_fast.evaluation.page_style import STYLE


def document(title: str, sections: Iterable[str], script: str = "") -> str:
    """The HTML of a page; ``sections`` are HTML, of which empty ones are left out, ``title`` is text.

    A browser is told to load nothing: the style, pictures that are in the file, and ``script`` alone, by its digest.
    """
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body>\n</html>\n"
    )


def write_document(path: str | os.PathLike[str], text: str) -> None:
    """Write a page to a file, atomically; raises OSError, naming it, if it cannot be written."""
    # A folder's name need not be UTF-8; Python then has the bytes as surrogates.
    content = text.encode(errors="replace")
    write_atomically(checks.path("path", path), lambda file: file.write(content))


def settings_list(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values as a list; empty if there are none."""
    lines = [
        f'<dt>{escape(name.replace("_", " "))}</dt><dd class="mono">{escape(str(value))}</dd>' for name, value in rows
    ]
    return f"<dl>{''.join(lines)}</dl>" if lines else ""
