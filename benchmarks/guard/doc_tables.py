"""The tables of README and docs that are drawn from trainings.py's file."""

from __future__ import annotations

from typing import Any

from benchmarks.guard.tables import table, targets
from benchmarks.tables.table import Table


def _table(content: dict[str, Any]) -> str:
    return table(content["rows"])


def _targets(content: dict[str, Any]) -> str:
    return targets(content["rows"])


TABLES = {"guard": Table("guard_trainings.json", _table), "guard-targets": Table("guard_trainings.json", _targets)}
