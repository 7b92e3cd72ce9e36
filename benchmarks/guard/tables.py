"""The table of trainings.py's rows, and what of the targets is met."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.guard.judged import ROBUST, SAME
from benchmarks.harness.rows import Row, Rows
from benchmarks.harness.tables import VERDICTS, markdown, met

LATEST, FALSE = 50, 1 / 20  # steps to the alarm; healthy trainings with one


def table(rows: Rows) -> str:
    """Markdown: a line for each eps and method; accuracies in per cent; what is of several seeds has commas."""
    lines = []
    for eps, method, group in _groups(rows):
        judged = [row["judged"] for row in group]
        lines.append(
            (
                f"{eps}/255",
                method,
                ", ".join(str(row["seed"]) for row in group),
                _counts([each["fallen_alone"] for each in judged]),
                _counts([each["fallen"] for each in judged]),
                ", ".join(_fate(each) for each in judged),
                ", ".join(_alarms(row) for row in group),
                ", ".join("missed" if each["missed"] else _text(each["delay"], "+d") for each in judged),
                ", ".join(_text(each["false_alarms"], "d") for each in judged),
                *(_both(group, attack) for attack in (ROBUST, "clean")),
            )
        )
    head = ["eps", "method", "seeds", "collapsed without", "collapsed with", "collapse begins", "alarms", "delay"]
    return markdown([*head, "false alarms", "PGD-50-10 without / with", "clean without / with"], lines)


def targets(rows: Rows) -> str:
    """Markdown: what the issue asks for, and whether it is so, of the rows that are known."""
    known = [row["judged"] for row in rows.values() if row["alone"] is not None]
    collapses = [each for each in known if each["onset"] is not None or each["missed"]]  # whose onset nobody saw
    healthy = [each for each in known if each["onset"] is None and not each["fallen_alone"]]
    fallen, fallen_alone, missed, false = (
        sum(bool(each[name]) for each in known) for name in ("fallen", "fallen_alone", "missed", "false_alarms")
    )
    delays = [each["delay"] for each in collapses if each["delay"] is not None]
    late = sum(each > LATEST for each in delays) + missed if collapses else None
    share = false / len(healthy) if healthy else None
    lines = [
        (
            "collapsed final models with the guard",
            f"{fallen} of {len(known)} (without: {fallen_alone})",
            "0",
            VERDICTS[met(fallen if known else None, 0, at_most=True)],
        ),
        (
            "healthy trainings with an alarm",
            f"{false} of {len(healthy)}",
            "at most 1 in 20",
            VERDICTS[met(share, FALSE, at_most=True)],
        ),
        (
            "collapses without an alarm by 50 steps after their beginning",
            "-" if late is None else f"{late} of {len(collapses)}{_range(delays)}",
            "0",
            VERDICTS[met(late, 0, at_most=True)],
        ),
    ]
    return markdown([f"of {len(known)} trainings", "measured", "target", "verdict"], lines)


def _range(delays: list[int]) -> str:
    return (
        f"; delays {min(delays):+d} to {max(delays):+d}, median {sorted(delays)[len(delays) // 2]:+d}" if delays else ""
    )


def _groups(rows: Rows) -> Iterator[tuple[int, str, list[Row]]]:
    """By eps, sorted, and method; the rows of a group by seed."""
    keys = dict.fromkeys((row["eps"], row["method"]) for row in rows.values())
    for eps, method in sorted(keys, key=lambda key: key[0]):
        found = [row for row in rows.values() if (row["eps"], row["method"]) == (eps, method)]
        yield eps, method, sorted(found, key=lambda row: int(row["seed"]))


def _counts(values: list[bool | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known)} of {len(known)}" if known else "-"


def _fate(judged: dict[str, Any]) -> str:
    if judged["onset"] is None:
        return str(judged["fate"] or "-")
    return f"{judged['onset']}" if judged["fate"] == "lost" else f"{judged['onset']} (never robust)"


def _alarms(row: Row) -> str:
    found = [f"{each['signal']} {each['step']}" for each in row["guarded"]["alarms"]]
    return " + ".join(found) or "none"


def _both(group: list[Row], attack: str) -> str:
    """Without and with the guard; what is no number is a dash."""
    return " / ".join(
        ", ".join(_text(_accuracy(row, run, attack), ".1f") for row in group) for run in ("alone", "guarded")
    )


def _accuracy(row: Row, run: str, attack: str) -> float | None:
    found = row["guarded"] if row[run] == SAME else row[run]
    value = None if found is None else found["accuracy"].get(attack)
    return None if value is None else 100 * value


def _text(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)
