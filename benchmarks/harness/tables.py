"""Tables for a terminal and in Markdown, and whether a target is met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

VERDICTS = {None: "not measured", True: "met", False: "MISSED"}


def met(value: float | None, wanted: float, *, at_most: bool) -> bool | None:
    """Whether a target is met; None if it was not measured."""
    if value is None:
        return None
    return value <= wanted if at_most else value >= wanted


def rounded(value: float | None) -> float | None:
    """To four digits."""
    return None if value is None else float(f"{value:.4g}")


def spread(values: Sequence[float], layout: str = ".1f", scale: float = 100.0) -> str:
    """Mean and, in brackets, lowest to highest of several; the only one; or a dash. In per cent, if they are shares."""
    if not values:
        return "-"
    scaled = [scale * each for each in values]
    mean = f"{statistics.mean(scaled):{layout}}"
    return mean if len(scaled) == 1 else f"{mean} ({min(scaled):{layout}} to {max(scaled):{layout}})"


def terminal(title: str, head: Sequence[str], groups: Iterable[Iterable[Sequence[str]]], *, words: int = 1) -> str:
    """A table with a line between groups of rows; the first ``words`` columns are text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, heading in enumerate(head):
        table.add_column(heading, justify="left" if i < words else "right", overflow="fold")
    for group in groups:
        for row in group:
            table.add_row(*row)
        table.add_section()
    console = Console(width=118, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in rows)])
