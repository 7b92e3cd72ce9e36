"""Record E_lin and its companions in each step of a training, and when the training collapses.

    python -m benchmarks.detector.traces --root cifar10-jpeg.tar.xz --mnist mnist.npz --work traces

A cell is a method, an eps and a seed. Beside each of its steps, three points of every sample go through the model once
more without a graph; the step is what it would be without them. A cell that was stopped goes on from its last epoch;
one that is done, whose file is in --work, is not run again, and one that another process is at is left to it.

The numbers of a step are those of :data:`~benchmarks.detector.recorder.COLUMNS`, of the weights before it. Every few
steps the model is attacked by PGD-10, in eval mode, on up to 256 samples held out of the training, always the same.
``benchmarks.detector.packed`` then joins all traces into one small file.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from benchmarks.detector.packed import RUNNING
from benchmarks.detector.recorder import COLUMNS, Recorder
from benchmarks.detector.trainings import Cell, Training, cells
from benchmarks.harness.program import listed, parser
from benchmarks.harness.rows import taken
from elle_fast import data
from elle_fast._core.files import write_atomically
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.provenance import commit

ALL_OF_IT = 12  # probes in a row below a third of the best before a collapse is certain


class Trace:
    """The rows of a cell so far, and its probes: step, clean and PGD-10 accuracy."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []
        self.probes: list[tuple[float, float, float]] = []

    def certain_at(self) -> int | None:
        """The step of the first probe at which a collapse is certain, if any.

        The last 12 probes have then all lost two thirds of the best median of five in a row.
        """
        best, robust = 0.0, [probe[2] for probe in self.probes]
        for i in range(4, len(robust)):
            best = max(best, statistics.median(robust[i - 4 : i + 1]))
            if i + 1 >= ALL_OF_IT + 5 and all(each < best / 3 for each in robust[i + 1 - ALL_OF_IT : i + 1]):
                return int(self.probes[i][0])
        return None

    def ended(self, training: Training, after: int | None) -> str | None:
        """How the training ended: "collapsed", "nan" or "stands"; ``None``: it goes on.

        A loss that is not finite is the end, and so are ``after`` steps beyond the certainty of a collapse.
        """
        finite = not self.rows or math.isfinite(self.rows[-1][COLUMNS.index("adv")])
        certain = self.certain_at()
        if certain is not None and after is not None and training.step >= certain + after:
            return "collapsed"
        if finite and training.step < training.steps:
            return None
        return "collapsed" if certain is not None else "stands" if finite else "nan"

    def save(self, path: Path, **more: Any) -> None:
        """Write it as an ``.npz``."""
        arrays: dict[str, Any] = {
            "rows": np.array(self.rows, dtype=np.float32).reshape(-1, len(COLUMNS)),
            "probes": np.array(self.probes),
        }
        texts: dict[str, Any] = {name: np.array(value) for name, value in more.items()}

        def write(file: BinaryIO) -> None:
            np.savez_compressed(file, **arrays, columns=np.array(COLUMNS), **texts)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path, step: int) -> Trace:
        """That of the first steps: what comes later is run again."""
        trace = cls()
        with np.load(path, allow_pickle=False) as found:
            trace.rows = found["rows"][:step].tolist()
            trace.probes = [tuple(probe) for probe in found["probes"].tolist() if probe[0] < step]
        return trace


def record(cell: Cell, folder: Path) -> None:
    """Train a cell, or go on with it, from what is in ``folder / name``; its trace is then ``folder / name.npz``."""
    path, own = folder / f"{cell.name}.npz", folder / cell.name
    own.mkdir(parents=True, exist_ok=True)
    running = own / RUNNING
    with closing(cell.start(own, running.exists())) as training:
        trace = Trace.load(running, training.step) if training.step else Trace()
        recorder = Recorder(training.model, training.eps, training.seed, training.bounds, training.bind)
        while (ended := trace.ended(training, cell.after)) is None:
            in_epoch = training.step % training.steps_per_epoch
            if training.step and not in_epoch:
                # The trace first: one that is ahead of its checkpoint is cut when it is read, one behind has a gap.
                trace.save(running)
                training.save()
                print(f"{cell.name}: step {training.step}, PGD-10 {trace.probes[-1][2]:.1%}", flush=True)
            for x, y in training.upcoming(training.steps_per_epoch - in_epoch):
                if training.step % cell.every == 0:
                    trace.probes.append((training.step, *training.probe()))
                row = recorder.of_triplets(x, y, training.step)
                with recorder.step():
                    training.take_step(x, y)
                row |= recorder.of_attack(y) | {"lam": training.lam()}
                trace.rows.append([row[name] for name in COLUMNS])
                if trace.ended(training, cell.after) is not None:
                    break
        recorder.close()
        trace.save(path, ended=ended, steps=training.steps, commit=str(commit()))
        training.discard()
    running.unlink(missing_ok=True)
    own.rmdir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what is missing; 0."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    roots = {"image-folder": options.root, "mnist": options.mnist}
    datasets: dict[str, data.Dataset] = {}

    def read(config: TrainConfig) -> data.Dataset:
        root = roots.get(config.data)
        if config.data not in datasets:
            datasets[config.data] = replace(config, root=None if root is None else str(root)).read_data()
        return datasets[config.data]

    every = cells(read)
    for part in options.only or ():
        if not any(part in cell.name for cell in every):
            options_of.error(f"--only: expected parts of cells' names, got {part!r}")
    asked = [cell for cell in every if not options.only or any(part in cell.name for part in options.only)]
    work: Path = options.work
    for cell in taken(asked, lambda cell: work / cell.name, lambda cell: not (work / f"{cell.name}.npz").exists()):
        record(cell, work)
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.detector.traces", __doc__)
    options_of.add_argument("--root", type=Path, help="JPEG-compressed CIFAR-10")
    options_of.add_argument("--mnist", type=Path, help="mnist.npz")
    options_of.add_argument("--work", type=Path, required=True, help="folder of the traces")
    options_of.add_argument("--only", type=listed(str), help="cells with one of these in their name")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
