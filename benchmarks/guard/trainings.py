"""Trainings with and without CollapseGuard: what collapses, when the guard says so, and what its rescues are worth.

    python -m benchmarks.guard.trainings --root cifar10-jpeg.tar.xz --work runs/guard

A cell is a method, an eps and a seed in the setting cifar10-medium of benchmarks/paper (narrow PreActResNet, all images
with crop and flip, bf16), for --epochs epochs; trained as by `elle-fast train --guard`, and, if there was an alarm,
without --guard as well. A training without an alarm is that without the guard to the bit, so one run stands for both;
and one with an alarm is so up to there, where the other one begins. The final models are attacked, in fp32, on 512
test images.

Cells are run in order of worth, and a row is written as soon as it is known. What was stopped goes on from its last
probe; a cell whose row is whole is not run again. --only chooses cells by name, or by patterns such as "fgsm-eps*".
Several processes may share --work and --out, on one machine: each takes the next cell that no other one is at. The
picture of one rescued training is drawn beside --out.

In a row: "guarded" and "alone" are the two runs, the latter "the same run" if there was no alarm. "probes" are, every
25 steps, [step, clean, PGD-10, train_adv]: accuracy on 256 validation images that the guard does not see, in bf16, and
at the points trained on since the probe before. "linearity" is the guard's mean of relative E_lin at these steps.
"seconds" are the processor's, of the steps and the guard alone. "judged" is as benchmarks/guard/judged.py says: "onset"
is the step at which the run without the guard begins to collapse, "delay" the steps from there to the first alarm;
"fallen" and "fallen_alone" tell whether the final models are collapsed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.guard.figure import draw
from benchmarks.guard.judged import SAME, judged
from benchmarks.guard.tables import table, targets
from benchmarks.guard.watched import Watched
from benchmarks.harness.program import ROOT, command, listed, number, parser
from benchmarks.harness.rows import Row, add_rows, chosen, read_rows, taken
from benchmarks.paper.cells import read_json
from benchmarks.paper.settings import SETTINGS
from elle_fast import data
from elle_fast._core.files import write_json
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import provenance, versions
from elle_fast.recipes.stopping import stop_requests
from elle_fast.recipes.train import InterruptedRunError

METHODS = ("fgsm", "rs-fgsm", "n-fgsm", "zero-grad", "slat", "advmixup-single")
EPS, SEEDS, EPOCHS = (16, 26, 8), (0, 1), 5
CONFIG = replace(
    SETTINGS["cifar10-medium"].config,
    average=None,
    test_limit=512,
    eval_attacks="clean,pgd-20,pgd-50-10",
    checkpoint_every=0,
)


@dataclass(frozen=True)
class Cell:
    """A training, with the guard; its folder is in ``work``."""

    method: str
    eps: int
    seed: int
    epochs: int
    work: Path
    root: str | None

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        return f"{self.method}-eps{self.eps}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return self.work / self.name

    def config(self, *, guard: bool) -> TrainConfig:
        """That of one of its two runs, resolved."""
        own: dict[str, Any] = {"method": self.method, "eps": self.eps / 255, "seed": self.seed, "epochs": self.epochs}
        return replace(CONFIG, root=self.root, device="cpu", guard=guard, **own).resolved()

    def done(self, *, guard: bool) -> dict[str, Any] | None:
        """The result of one of its runs, if it is there; ValueError if it is one of another setting."""
        path = self._path(guard=guard)
        if not path.exists():
            return None
        found: dict[str, Any] = read_json(path)
        self._check(found, guard=guard)
        return found

    def row(self) -> Row | None:
        """What is known of it."""
        guarded = self.done(guard=True)
        if guarded is None:
            return None
        alone = self.done(guard=False) if guarded["alarms"] else SAME
        found: Row = {"method": self.method, "eps": self.eps, "seed": self.seed, "guarded": guarded, "alone": alone}
        return {**found, "judged": judged(found)}

    def is_whole(self, row: Row | None) -> bool:
        """Whether a row leaves nothing to do; ValueError if it is one of another setting."""
        if row is None:
            return False
        self._check(row["guarded"], guard=True)
        if isinstance(row["alone"], dict):
            self._check(row["alone"], guard=False)
        return row["alone"] is not None

    def run(self, read: Callable[[TrainConfig], data.Dataset], stop_asked: Callable[[], bool]) -> None:
        """Train what is missing of its next run; raises InterruptedRunError if asked to stop."""
        guard = self.done(guard=True) is None
        config = self.config(guard=guard)
        watched = Watched(config, self.folder, stop_asked)
        result = watched.result(read(config))
        write_json(self._path(guard=guard), result)
        if not guard or not result["alarms"]:
            watched.discard()

    def _path(self, *, guard: bool) -> Path:
        return self.folder / ("guarded.json" if guard else "alone.json")

    def _check(self, run: dict[str, Any], *, guard: bool) -> None:
        asked = {name: value for name, value in asdict(self.config(guard=guard)).items() if name != "root"}
        asked["elle_fast"], made = versions()["elle_fast"], {**run["config"], "elle_fast": run["versions"]["elle_fast"]}
        listed_ = [
            f"{name} = {made.get(name)!r} (now: {asked[name]!r})" for name in asked if made.get(name) != asked[name]
        ]
        if listed_:
            raise ValueError(
                f"work, out: expected runs of this setting, got {self.name} of another: {'; '.join(listed_)}"
            )


def cells(work: Path, root: str | None, epochs: int) -> list[Cell]:
    """All, the most telling ones first."""
    return [Cell(name, eps, seed, epochs, work, root) for eps in EPS for seed in SEEDS for name in METHODS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, writing a row after each run, and print the table; 130 if asked to stop."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    root = None if options.root is None else str(options.root)
    dataset: list[data.Dataset] = []

    def read(config: TrainConfig) -> data.Dataset:
        dataset[:] = dataset or [config.read_data()]
        return dataset[0]

    def is_left(cell: Cell) -> bool:
        return not cell.is_whole(read_rows(options.out).get(cell.name))

    def write(rows: dict[str, Row]) -> None:
        add_rows(rows, options.out, {"about": _about()}, provenance(command(options_of, options)))

    try:
        asked = chosen({cell.name: cell for cell in cells(options.work, root, options.epochs)}, options.only)
    except ValueError as error:
        options_of.error(str(error))
    with stop_requests() as stop_asked:
        for cell in taken([] if options.table else asked, lambda cell: cell.folder, is_left):
            while is_left(cell):
                row = cell.row()
                if row is None or row["alone"] is None:
                    print(cell.name, "with the guard" if row is None else "without it", file=sys.stderr, flush=True)
                    try:
                        cell.run(read, stop_asked)
                    except InterruptedRunError as error:
                        print(f"{cell.name}: {error}", file=sys.stderr)
                        return 130
                    row = cell.row()
                assert row is not None
                write({cell.name: row})
    rows = {name: {**row, "judged": judged(row)} for name, row in read_rows(options.out).items()}
    if rows != read_rows(options.out):  # judged by an earlier rule
        write(rows)
    print(table(rows), "", targets(rows), sep="\n")
    draw(rows, options.out)
    return 0


def _about() -> str:
    return " ".join((__doc__ or "").split("\n\n")[-1].split())


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.guard.trainings", __doc__)
    options_of.add_argument("--root", type=Path, help="JPEG-compressed CIFAR-10")
    options_of.add_argument("--work", type=Path, default=Path("runs") / "guard", help="folder of the runs")
    options_of.add_argument("--epochs", type=number, default=EPOCHS, help="of each training")
    out = ROOT / "benchmarks" / "results" / "guard_trainings.json"
    options_of.add_argument("--out", type=Path, default=out, help="the JSON file")
    options_of.add_argument("--only", type=listed(str), help="NAME,...: these cells")
    options_of.add_argument("--table", action="store_true", help="train nothing: print the table and draw the picture")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
