"""The options of `elle-fast report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class ReportOptions:
    """One HTML page that compares runs of elle-fast train: table, curves with collapses marked, options that differ.

    Unfinished runs are shown as far as they are. The page of an evaluation is that of elle-fast eval --report.
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN...", help_behavior_hint="")]
    """Folders of runs: runs/*."""
    out: Path = Path("report.html")
    """The file to write."""
