"""One row of the queue: the first of the list that is not done is trained, attacked and written.

The queue (queue.py) starts it, in a process of its own. It ends as SIGTERM asks it to: a training after the current
step; and in the same way when its standard input ends, that is when the queue is gone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.entries import Entry, read_entries
from benchmarks.evidence.listing import DONE, FAILED, listing, state
from benchmarks.evidence.queue import GRACE, NOTHING_LEFT, SOME_FAILED, options_of
from benchmarks.paper.cells import Cell, read_json
from benchmarks.paper.figures import draw
from benchmarks.paper.summary import kept_runs, summarize
from benchmarks.paper.tables import Run
from elle_fast._core import checks
from elle_fast._core.files import write_json
from elle_fast.recipes.train import InterruptedRunError

_Kept = dict[Path, Run]
_OF_DATA = ("data", "root", "limit", "test_limit", "image_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one row, or list all; the exit status."""
    options = options_of(__doc__).parse_args(arguments)
    root = None if options.list else options.root  # the data are not needed for a look
    entries = read_entries(options.queue, root=root, work=options.work, results=options.results)
    # Look at everything that is there before the training.
    kept = {folder: run for entry in entries for folder, run in _kept(entry).items()}
    chosen = _chosen(entries, options.only)
    if options.list:
        print(listing(chosen, kept))
        return 0
    states = [state(cell, kept) for _, cell in chosen]
    left = [row for row, of in zip(chosen, states, strict=True) if of not in (DONE, FAILED)]
    failed = states.count(FAILED)
    print(f"{len(chosen) - len(left) - failed} of {len(chosen)} rows are done, {failed} failed", flush=True)
    if not left:
        return SOME_FAILED if failed else NOTHING_LEFT
    _do(*left[0], kept, options)
    return 0


def _kept(entry: Entry) -> _Kept:
    """The rows in an entry's file whose folders are not here; ValueError if one is not of the list."""
    if not entry.result.exists():
        return {}
    listed = {(cell.name, cell.config.eps, cell.config.seed) for cell in entry.cells}
    for run in read_json(entry.result)["runs"]:
        if (of := (run["variant"], run["config"]["eps"], run["seed"])) not in listed:
            raise ValueError(
                f"results: expected rows of entry {entry.name!r}, got {str(entry.result)!r} with {of[0]!r}, eps "
                f"{of[1]:.4g}, seed {of[2]}, which the list no longer has; move that row away, or choose another result"
            )
    return kept_runs(entry.result, entry.cells)


def _chosen(entries: list[Entry], only: str) -> list[tuple[Entry, Cell]]:
    every = [(entry, cell) for entry in entries for cell in entry.cells]
    if not only:
        return every
    known = [*dict.fromkeys([entry.name for entry in entries] + [cell.name for _, cell in every])]
    names = [checks.choice("only", name, known) for name in only.split(",")]
    return [(entry, cell) for entry, cell in every if entry.name in names or cell.name in names]


def _do(entry: Entry, cell: Cell, kept: _Kept, options: argparse.Namespace) -> None:
    """Train and attack a cell, as far as that is not done, and write the entry's file after each."""
    dataset = cell.config.read_data()
    digest = dataset.digest()
    for other in entry.cells:
        if other.is_done() and all(getattr(other.config, name) == getattr(cell.config, name) for name in _OF_DATA):
            other.check_data(digest)
    if not cell.is_done():
        print(f"{entry.name}: {cell.text}", flush=True)
        trained = cell.train(dataset)
        _write(entry, kept, options.plot)
        if not trained:
            print(f"failed: {cell.failure()}", flush=True)
            return
    if cell.asked is not None and cell.strong() is None:
        print(f"{cell.asked.attacks}: {cell.text}", flush=True)
        cell.attack(dataset)
        _write(entry, kept, options.plot)


def _write(entry: Entry, kept: _Kept, plot: bool) -> None:
    command = f'make evidence ARGS="--root DATA --only {entry.name}"'
    found = {"entry": entry.name, "command": command, **summarize(entry.cells, kept, entry.note)}
    write_json(entry.result, found)
    if plot and found["runs"]:
        draw(found, entry.result)


def _stop_with_the_queue() -> None:
    """Ask this process to stop when its standard input ends; make it, if it does not."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_the_queue, daemon=True).start()
    try:
        sys.exit(main())
    except InterruptedRunError as stop:
        print(stop, flush=True)
        sys.exit(130)
    except (TypeError, ValueError, ImportError, OSError) as problem:
        sys.exit(f"evidence: {problem}")
