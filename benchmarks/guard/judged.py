"""What became of a training with and without the guard: when it collapsed, and whether the alarms were right."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.detector.onset import LASTS, LEARNED, Onset, loss
from benchmarks.harness.rows import Row
from elle_fast.recipes.progress import is_deceived

ROBUST = "pgd-50-10"
SAME = "the same run"  # in place of the run without the guard, if there was no alarm
LEAST = 0.05  # accuracy under PGD-50-10 of a final model that has not collapsed
_CLASSES = 10
_FEWEST = 4  # probes that show a loss at the end of a training
_MEDIAN = 5  # probes
_STEP, _PGD, _TRAIN_ADV = 0, 2, 3  # of a probe


def onset(probes: Sequence[Sequence[float]], ended: str = "whole") -> Onset:
    """That of a training, from its probes: step, clean, PGD-10, and the accuracy at the points trained on before.

    As that of a trace, with 4 probes or more at the end; but a training that was never robust collapses where
    :func:`elle_fast.recipes.progress.is_deceived` first holds for as many probes as a loss.
    """
    robust = np.array([probe[_PGD] for probe in probes])
    lost, best = loss(robust, 1 if ended == "nan" else _FEWEST)
    if lost is not None:
        return Onset("lost", int(probes[lost][_STEP]), best)
    if best >= LEARNED:
        return Onset("stands", None, best)
    for i, probe in enumerate(probes):
        part = probes[i : i + LASTS]
        if len(part) >= _FEWEST and all(is_deceived(each[_TRAIN_ADV], each[_PGD], _CLASSES) for each in part):
            return Onset("never robust", int(probe[_STEP]), best)
    return Onset("never robust", int(probes[-1][_STEP]) if ended == "nan" else None, best)


def has_fallen(run: dict[str, Any]) -> bool:
    """Whether a run's last model is collapsed.

    Its weights are not finite, it has lost two thirds of its best PGD-10, or less than 5 % of the test images are right
    under PGD-50-10. The best is the best median of five probes of the whole run, the end the median of the last five.
    """
    if run["ended"] == "nan":
        return True
    robust = [probe[_PGD] for probe in run["probes"]]
    medians = [statistics.median(robust[max(0, i + 1 - _MEDIAN) : i + 1]) for i in range(len(robust))]
    return medians[-1] < max(medians) / 3 or float(run["accuracy"][ROBUST]) < LEAST


def judged(row: Row) -> dict[str, Any]:
    """Of a row with the runs ``guarded`` and ``alone``; what is not known without the latter is None.

    ``delay`` is from the collapse's beginning in the run without the guard to the first alarm, in steps, so below 0 if
    the alarm came first. Up to that alarm the runs are one. ``false_alarms`` are those of a training that stands
    without the guard, and ends with a model that is not collapsed; ``missed`` is a collapse without an alarm.
    """
    guarded = row["guarded"]
    alone = guarded if row["alone"] == SAME else row["alone"]
    found = {"alarms": len(guarded["alarms"]), "fallen": has_fallen(guarded)}
    unknown = ("fate", "onset", "best", "fallen_alone", "delay", "false_alarms", "missed")
    if alone is None:
        return {**found, **dict.fromkeys(unknown)}
    fate, step, best = onset(alone["probes"], alone["ended"])
    fallen_alone = has_fallen(alone)
    healthy = step is None and not fallen_alone
    first = guarded["alarms"][0]["step"] if guarded["alarms"] else None
    return {
        **found,
        **{"fate": fate, "onset": step, "best": best, "fallen_alone": fallen_alone},
        "delay": None if first is None or step is None else first - step,
        "false_alarms": found["alarms"] if healthy else 0,
        "missed": not healthy and first is None,
    }
