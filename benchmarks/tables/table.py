"""A table of README or docs: the JSON file that it is drawn from, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Drawn from one file of benchmarks/results.

    Attributes:
        results: the file's name.
        draw: makes the Markdown table of the file's content; KeyError if the file lacks what it shows.
    """

    results: str
    draw: Callable[[dict[str, Any]], str]
