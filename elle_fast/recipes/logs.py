"""The log of a run: a progress bar, lines on the console, and its numbers in TensorBoard and CSV files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from elle_fast._core.files import naming, write_csv

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

History = dict[str, list[dict[str, Any]]]


class RunLog:
    """The log of one run, in its folder; a context manager.

    ``history`` holds every number so far, ``{"steps": rows, "epochs": rows}``. It is part of the checkpoint and the
    source of the CSV files, so those of a resumed run have no gap and no row twice. Without a folder, as in all
    processes but number 0, numbers are kept, and nothing is written or printed.
    """

    def __init__(self, folder: Path | None, title: str, total_steps: int, history: History, console: Console) -> None:
        self.folder, self.history, self.console = folder, history, console
        self._writer: SummaryWriter | None = None
        if folder is None:
            self.console = Console(quiet=True)
        else:
            # TensorBoard takes long to import, and only a run needs it.
            from torch.utils.tensorboard.writer import SummaryWriter

            done = history["steps"][-1]["step"] if history["steps"] else 0
            with self._tensorboard_files():
                self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=folder is None or not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total_steps, status="")

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        if self._writer is not None:
            with suppress(OSError) if error[0] else nullcontext(), self._tensorboard_files():
                self._writer.close()

    def advance(self, step: int) -> None:
        """Show that ``step`` steps are done."""
        self._bar.update(self._task, completed=step)

    def step(self, row: dict[str, Any], status: str) -> None:
        """Add the numbers of one step, and show ``status`` beside the bar."""
        self.history["steps"].append(row)
        self._tensorboard("step", row)
        self._bar.update(self._task, status=status)

    def epoch(self, row: dict[str, Any], line: str) -> None:
        """Add the numbers of one epoch, and print a line."""
        self.history["epochs"].append(row)
        self._tensorboard("epoch", row)
        self.say(line)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def write(self) -> None:
        """Write steps.csv and epochs.csv."""
        if self.folder is None:
            return
        for name, rows in self.history.items():
            write_csv(self.folder / f"{name}.csv", rows)

    def _tensorboard(self, group: str, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        with self._tensorboard_files():
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    @contextmanager
    def _tensorboard_files(self) -> Iterator[None]:
        """An OSError of TensorBoard's names the folder; its thread, which fails first, prints no traceback."""
        assert self.folder is not None
        before = threading.excepthook
        threading.excepthook = lambda args: None if isinstance(args.exc_value, OSError) else before(args)
        try:
            with naming(self.folder / "tensorboard"):
                yield
        finally:
            threading.excepthook = before
