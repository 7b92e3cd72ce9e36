"""The tables of README and docs that are drawn from the files of the queue: one for each entry, evidence-NAME."""

from __future__ import annotations

from pathlib import Path

from benchmarks.paper.doc_tables import trainings
from benchmarks.tables.table import Table
from elle_fast.recipes.checked import read_yaml

_ENTRIES = read_yaml(Path(__file__).with_name("queue.yaml"))["entries"]
TABLES = {f"evidence-{entry['name']}": Table(entry["result"], trainings) for entry in _ENTRIES}
