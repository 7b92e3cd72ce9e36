"""What is done of some cells, as the JSON file that tables and figures are made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, read_json
from benchmarks.paper.tables import Run


def kept_runs(out: Path, cells: list[Cell]) -> dict[Path, Run]:
    """By folder, the runs in ``out`` of the cells whose folder is not done, as on another machine."""
    runs = read_json(out).get("runs", [])
    return {cell.folder: run for cell in cells if not cell.is_done() for run in runs if cell.kept(run)}


def summarize(cells: list[Cell], kept: dict[Path, Run], note: str) -> dict[str, Any]:
    """All cells that are done, in their folders or among ``kept``; ``note`` stands in every picture."""
    runs = [cell.read() if cell.is_done() else kept[cell.folder] for cell in cells if is_done(cell, kept)]
    return {
        "note": note,
        "eps": sorted({cell.config.eps for cell in cells}),
        "missing": len(cells) - len(runs),
        "failed": [
            {"variant": cell.name, "eps": cell.config.eps, "seed": cell.config.seed, "error": error}
            for cell in cells
            if (error := cell.failure()) is not None
        ],
        "missing_strong": sum(cell.asked is not None for cell in cells)
        - sum(run.get("strong") is not None for run in runs),
        "runs": runs,
    }


def is_done(cell: Cell, kept: dict[Path, Run]) -> bool:
    """Whether it is trained, here or where the kept run is from."""
    return cell.folder in kept or cell.is_done()


def renamed(summary: dict[str, Any]) -> dict[str, Any]:
    """A copy with the epochs' columns as they are called now: earlier runs watched test images after each epoch."""
    runs = []
    for run in summary["runs"]:
        epochs = [{re.sub("^test_", "val_", name): value for name, value in row.items()} for row in run["epochs"]]
        runs.append({**run, "epochs": epochs})
    return {**summary, "runs": runs}
