"""The paper's schedules (section 4 and appendix B.5): pure functions of the step, so a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from elle_fast._core import checks

# OneCycleLR's: the part of the highest rate at the beginning, and of that at the end.
_FIRST, _LAST, _WARM_UP = 1 / 25, 1e-4 / 25, 0.025


@dataclass(frozen=True)
class Schedule:
    """The defaults of a schedule for a data set.

    ``peak`` is the part of the run after which Short's rate is highest.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    peak: float = 0.5


SCHEDULES = {
    "short": Schedule(epochs=30, learning_rate=0.2, batch_size=128),
    "long": Schedule(epochs=200, learning_rate=0.1, batch_size=128),
    "long-cos": Schedule(epochs=200, learning_rate=0.1, batch_size=256),
    "constant": Schedule(epochs=30, learning_rate=0.1, batch_size=128),
}
# Section 4.1 of the paper; the peak is that of its authors' trainer.
_SVHN = {"short": {"epochs": 15, "peak": 0.4}, "long": {"learning_rate": 0.01}}


def find(schedule: str, data: str) -> Schedule:
    """The schedule as the paper has it for a data set.

    Raises:
        TypeError, ValueError: for an unknown schedule.
    """
    usual = SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)]
    return replace(usual, **_SVHN.get(schedule, {})) if data == "svhn" else usual  # type: ignore[arg-type]


def learning_rate(schedule: str, highest: float, step: int, steps: int, data: str = "cifar10") -> float:
    """The learning rate of ``step`` (from 0) of ``steps``.

    - ``short``: linear from 0 to ``highest`` at half time (SVHN: two fifths) and back to 0; no step has a rate of 0.
    - ``long``: ``highest``, a tenth from half time, a hundredth from three quarters (epochs 100 and 150 of 200).
    - ``long-cos``: torch's OneCycleLR with 2.5 % of warm-up: half a cosine from ``highest`` / 25 up, another one down
      to 4e-6 of ``highest``.
    - ``constant``: ``highest``.

    Raises:
        TypeError, ValueError: for another schedule, a rate below 0, or a step outside ``[0, steps)``.
    """
    peak = find(schedule, data).peak
    highest = checks.real("highest", highest, low=0)
    checks.integer("step", step, low=0, high=checks.integer("steps", steps, low=1, high=2**63 - 1) - 1)
    done = (step + 0.5) / steps
    if schedule == "short":
        return highest * min(done / peak, (1 - done) / (1 - peak))
    if schedule == "long":
        return highest * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
    if schedule == "long-cos":
        warm = _WARM_UP * steps - 1
        if step < warm:
            return highest * _between(_FIRST, 1.0, step / warm)
        return highest * _between(1.0, _LAST, (step - warm) / (steps - 1 - warm))
    return highest


def _between(start: float, end: float, part: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))
