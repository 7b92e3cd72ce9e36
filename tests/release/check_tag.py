"""Whether a tag is this checkout's version, and what CHANGELOG.md says of it.

``python tests/release/check_tag.py v1.2.3`` prints the section of 1.2.3. The version is a constant of
``elle_fast/__init__.py``: it is the same in a checkout without tags, in an sdist and in a wheel. The tag has to agree.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = re.compile(r'^__version__ = "(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)"$', re.MULTILINE)
HEADING = re.compile(r"^## \[(?P<version>[^\]]+)\](?: - (?P<date>\d{4}-\d\d-\d\d))?$", re.MULTILINE)


def version_of(package: str) -> str:
    """The version in the text of ``elle_fast/__init__.py``."""
    found = VERSION.findall(package)
    if len(found) != 1:
        raise ValueError(f'__version__: expected one line such as __version__ = "1.2.3", got {len(found)}')
    return str(found[0])


def notes_of(changelog: str, version: str) -> str:
    """The section of a release, without its heading.

    Raises:
        ValueError: if there is none, or it has no date.
    """
    headings = list(HEADING.finditer(changelog))
    for place, heading in enumerate(headings):
        if heading["version"] == version and heading["date"]:
            end = headings[place + 1].start() if place + 1 < len(headings) else len(changelog)
            return changelog[heading.end() : end].strip()
    raise ValueError(f"CHANGELOG.md: expected a section '## [{version}] - YYYY-MM-DD', got {[h[0] for h in headings]}")


def check(tag: str, package: str, changelog: str) -> str:
    """The release's notes.

    Raises:
        ValueError: if the tag is not the version's, or the changelog has no dated section of it.
    """
    version = version_of(package)
    if tag != f"v{version}":
        raise ValueError(f"tag: expected 'v{version}' of elle_fast/__init__.py, got {tag!r}")
    return notes_of(changelog, version)


if __name__ == "__main__":
    try:
        package, changelog = (ROOT / name for name in ("elle_fast/__init__.py", "CHANGELOG.md"))
        print(check(sys.argv[1], package.read_text(encoding="utf-8"), changelog.read_text(encoding="utf-8")))
    except ValueError as error:
        sys.exit(str(error))
