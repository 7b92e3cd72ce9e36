"""One training, watched: a run of `elle-fast train` that is probed every few steps, and goes on from its last probe.

Probes look at the model alone: they draw from a generator of their own, and leave its mode and its statistics as they
are. So a run has the bits that it would have without them.

A run with the guard is the run without it up to its first alarm. Its last state before that is kept, and the run
without the guard begins there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from elle_fast import data
from elle_fast.evaluation import evaluate, in_precision
from elle_fast.recipes import checkpoint
from elle_fast.recipes.config import TrainConfig
from elle_fast.recipes.distributed import Ranks
from elle_fast.recipes.guarding import HELD_OUT
from elle_fast.recipes.meter import ruined
from elle_fast.recipes.provenance import commit, machine, versions
from elle_fast.recipes.result import accuracy_of
from elle_fast.recipes.run import Run
from elle_fast.recipes.train import InterruptedRunError

EVERY, SAMPLES = 25, 256  # steps between probes, and validation images that are none of the guard's
_PROBE = "clean,pgd-10"
# The last state without an alarm, of either run; and those of the run with the guard after its alarm, and of the other.
_UNTOUCHED, _GUARDED, _ALONE = "untouched.pt", "guarded.pt", "alone.pt"
_UNMEASURED = ("train_adv", "val_clean", "val_pgd", "val_e_lin")


@dataclass
class Watched:
    """Trains one run to its end and tells what was seen of it; :meth:`result`.

    Attributes:
        config: resolved; ``config.guard`` decides which of the two runs it is.
        folder: of both.
        stop_asked: whether to stop at the next probe.
    """

    config: TrainConfig
    folder: Path
    stop_asked: Callable[[], bool]
    _right: float = field(init=False, default=0.0)  # of the points trained on since the last probe
    _points: int = field(init=False, default=0)
    _ended: str = field(init=False, default="whole")

    def result(self, dataset: data.Dataset) -> dict[str, Any]:
        """Train, or go on, and attack what it ends with; as JSON types.

        Raises:
            InterruptedRunError: if asked to stop; the run goes on at its last probe.
        """
        with closing(Ranks(120.0)) as ranks:
            run = Run(self.config, dataset, self._path(alarmed=False), ranks)
            self._restore(run)
            self._train(run)
            accuracy = {}
            if self._ended == "whole":
                found = accuracy_of(run.model, run.test_split, self.config.eval_attacks, self.config)
                accuracy = {name: each["accuracy"] for name, each in found.items()}
        rows = run.history["steps"]
        return {
            "ended": self._ended,
            "accuracy": accuracy,
            "alarms": [] if run.guard is None else [asdict(alarm) for alarm in run.guard.alarms],
            "seconds": round(rows[-1]["seconds"], 1),
            "probes": [[row["step"], *(round(row[name], 4) for name in ("clean", "pgd", "train_adv"))] for row in rows],
            "linearity": [round(row["linearity"], 4) if "linearity" in row else None for row in rows],
            "config": {name: value for name, value in asdict(self.config).items() if name != "root"},
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
        }

    def discard(self) -> None:
        """Remove the states of both runs: their results are there."""
        for name in (_UNTOUCHED, _GUARDED, _ALONE):
            (self.folder / name).unlink(missing_ok=True)

    def _path(self, *, alarmed: bool) -> Path:
        own = _UNTOUCHED if not alarmed else _GUARDED
        return self.folder / (own if self.config.guard else _ALONE)

    def _restore(self, run: Run) -> None:
        for name in (_GUARDED if self.config.guard else _ALONE, _UNTOUCHED):
            if (self.folder / name).exists():
                saved = checkpoint.load(self.folder / name)
                kept, own = TrainConfig(**saved["config"]), run.config
                before, now = (replace(each, guard=False).identity() for each in (kept, own))
                checkpoint.check_same_run(before, now, self.folder / name)
                run.restore(saved)
                return

    def _train(self, run: Run) -> None:
        run.model.train()
        taken = run.history["steps"][-1]["seconds"] if run.history["steps"] else 0.0
        while run.step < run.steps and self._ended == "whole":
            epoch, within = run.plan.place(run.step)
            for x, y in run.upcoming(run.plan.epoch_steps(run.step) - within):
                begin = time.process_time()
                run.take_step(x, y)
                taken += time.process_time() - begin
                run.step += 1
                self._right += float(run.meter.last[-1])
                self._points += len(y)
                if run.plan.place(run.step)[0] > epoch:
                    self._end_epoch(run)
                if run.step % EVERY == 0 or run.step == run.steps:
                    self._probe(run, taken)
                if self._ended != "whole":
                    break

    def _end_epoch(self, run: Run) -> None:
        """What a checkpoint needs to hold of an epoch."""
        row = {"step": run.step, "epoch": run.plan.place(run.step)[0], "seconds": 0.0, "collapsed": False}
        run.history["epochs"].append({**row, **dict.fromkeys(_UNMEASURED, math.nan)})
        run.meter.clear()

    def _probe(self, run: Run, seconds: float) -> None:
        assert run.validation is not None
        whole = not float(ruined(run.model.state_dict().values(), run.meter.dtype))
        found = {"clean": 0.0, "pgd": 0.0}  # of a model whose weights are not finite
        if whole:
            split = run.validation[HELD_OUT : HELD_OUT + SAMPLES]
            model = in_precision(run.model, self.config.precision)
            clean, robust = evaluate(model, data.in_order(split), _PROBE, eps=self.config.eps, check=False).values()
            found = {"clean": clean["accuracy"], "pgd": robust["accuracy"]}
        row = {"step": run.step, **found, "train_adv": self._right / self._points, "seconds": seconds}
        if run.guard is not None:
            means = run.guard.state_dict()["judge"]["means"]
            row |= {signal: mean for signal, (mean, _) in means.items()}
        self._right, self._points = 0.0, 0
        run.history["steps"].append(row)
        if whole:  # else it could not be read back, and the last state before is kept
            run.path = self._path(alarmed=run.guard is not None and bool(run.guard.alarms))
            run.save()
        elif run.guard is None or run.step == run.steps:  # the guard goes back
            self._ended = "nan"
        if self.stop_asked() and run.step < run.steps:
            raise InterruptedRunError(f"stopped after step {run.step} of {run.steps}; the same command goes on")
