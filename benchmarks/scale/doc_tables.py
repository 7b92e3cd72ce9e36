"""The tables of README and docs that are drawn from bench_scale.py's file."""

from __future__ import annotations

from benchmarks.scale.scale_tables import breaking, slopes
from benchmarks.tables.table import Table

TABLES = {"scale": Table("bench_scale.json", slopes), "scale-memory": Table("bench_scale.json", breaking)}
