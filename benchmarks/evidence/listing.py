"""What of the queue is done, begun and missing."""

from __future__ import annotations

from pathlib import Path

from benchmarks.evidence.entries import Entry
from benchmarks.paper.cells import Cell
from benchmarks.paper.tables import Run
from elle_fast.recipes.train import CHECKPOINT

DONE, NOT_ATTACKED, BEGUN, FAILED, MISSING = "done", "trained, not attacked", "begun", "failed", "missing"


def state(cell: Cell, kept: dict[Path, Run]) -> str:
    """Of a row: how far it is here, or where the kept run of its folder is from."""
    if cell.failure() is not None:
        return FAILED
    if cell.is_done():
        return DONE if cell.is_whole({"strong": cell.strong()}) else NOT_ATTACKED
    if cell.folder in kept:
        return DONE if cell.is_whole(kept[cell.folder]) else NOT_ATTACKED
    return BEGUN if (cell.folder / CHECKPOINT).exists() else MISSING


def listing(rows: list[tuple[Entry, Cell]], kept: dict[Path, Run]) -> str:
    """A paragraph for each entry that has one of these rows: in each state, the folders of the rows."""
    paragraphs = []
    for entry in dict.fromkeys(entry.name for entry, _ in rows):
        own = [(of, cell, state(cell, kept)) for of, cell in rows if of.name == entry]
        done = sum(each == DONE for *_, each in own)
        lines = [f"{entry} ({own[0][0].result.name}): {done} of {len(own)} rows are done"]
        for each in (DONE, NOT_ATTACKED, BEGUN, FAILED, MISSING):
            names = [cell.folder.name for _, cell, found in own if found == each]
            lines += [f"  {each}: {', '.join(names)}"] * bool(names)
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)
