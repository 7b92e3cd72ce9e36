"""The paper's schedules (section 4 and appendix B.5): pure functions of the step, so a resumed run needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elle_fast._core import checks


@dataclass(frozen=True)
class Schedule:
    """The defaults of a schedule."""

    epochs: int
    learning_rate: float
    batch_size: int


# Short is 15 epochs on SVHN in the paper; Long starts from 0.01 there.
SCHEDULES = {
    "short": Schedule(epochs=30, learning_rate=0.2, batch_size=128),
    "long": Schedule(epochs=200, learning_rate=0.1, batch_size=128),
    "long-cos": Schedule(epochs=200, learning_rate=0.1, batch_size=256),
    "constant": Schedule(epochs=30, learning_rate=0.1, batch_size=128),
}


def learning_rate(schedule: str, peak: float, step: int, steps: int) -> float:
    """The learning rate of ``step`` (from 0) of ``steps``.

    - ``short``: linear from 0 to ``peak`` at half time and back to 0; no step has a rate of exactly 0.
    - ``long``: ``peak``, a tenth from half time, a hundredth from three quarters (epochs 100 and 150 of 200).
    - ``long-cos``: half a cosine from ``peak`` to 0.
    - ``constant``: ``peak``.

    Raises:
        TypeError, ValueError: for another schedule, a peak below 0, or a step outside ``[0, steps)``.
    """
    checks.choice("schedule", schedule, SCHEDULES)
    peak = checks.real("peak", peak, low=0)
    checks.integer("step", step, low=0, high=checks.integer("steps", steps, low=1, high=2**63 - 1) - 1)
    done = (step + 0.5) / steps
    if schedule == "short":
        return peak * (1 - abs(2 * done - 1))
    if schedule == "long":
        return peak * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
    if schedule == "long-cos":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
