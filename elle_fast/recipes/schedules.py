"""Learning-rate schedules: pure functions of the step, so a resumed run needs no state.

The first three are the ELLE paper's (section 4 and appendix B.5).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from elle_fast._core import checks

# OneCycleLR's: the part of the highest rate at the beginning, and of that at the end.
_FIRST, _LAST = 1 / 25, 1e-4 / 25
MILESTONES = (1 / 2, 3 / 4)  # Long's


@dataclass(frozen=True)
class Schedule:
    """The defaults of a schedule for a data set.

    ``peak`` is the part of the run after which the rate is highest, ``None`` for a schedule that does not rise.
    ``eps_warmup`` is in epochs.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    peak: float | None = None
    eps_warmup: float = 0.0

    @property
    def length(self) -> str:
        """That of the two schedules of the paper, short and long, whose lam it takes."""
        return "long" if self.epochs >= 200 else "short"


SCHEDULES = {
    "short": Schedule(epochs=30, learning_rate=0.2, batch_size=128, peak=0.5),
    "long": Schedule(epochs=200, learning_rate=0.1, batch_size=128),
    "long-cos": Schedule(epochs=200, learning_rate=0.1, batch_size=256, peak=0.025),
    "constant": Schedule(epochs=30, learning_rate=0.1, batch_size=128),
    # FastAT Benchmark, arXiv 2604.22853; the peak is OneCycleLR's own.
    "onecycle": Schedule(epochs=100, learning_rate=0.1, batch_size=128, peak=0.3),
    # Rice et al., arXiv 2002.11569.
    "cosine": Schedule(epochs=200, learning_rate=0.1, batch_size=128),
    "piecewise": Schedule(epochs=200, learning_rate=0.1, batch_size=128),
    # Wong et al., arXiv 2001.03994, for ImageNet; its knots are those of the recipe imagenet.
    "linear": Schedule(epochs=15, learning_rate=0.4, batch_size=256),
}
# Section 4.1 of the paper; peak and eps warm-up are those of its authors' trainer.
_SVHN = {"short": {"epochs": 15, "peak": 0.4, "eps_warmup": 5.0}, "long": {"learning_rate": 0.01}}


def find(schedule: str, data: str) -> Schedule:
    """The schedule's defaults for a data set.

    Raises:
        TypeError, ValueError: for an unknown schedule.
    """
    usual = SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)]
    return replace(usual, **_SVHN.get(schedule, {})) if data == "svhn" else usual  # type: ignore[arg-type]


def at(
    schedule: str,
    step: int,
    steps: int,
    *,
    peak: float | None = None,
    milestones: Sequence[float] = MILESTONES,
    warmup: float = 0.0,
    within: float = 0.5,
) -> tuple[float, float]:
    """The rate of ``step`` (from 0) of ``steps`` as a part of the highest one, and how far the cycle has risen.

    - ``short``: torch's CyclicLR, one cycle from 0 to 1 at ``peak`` and back to 0.
    - ``onecycle``: torch's OneCycleLR: half a cosine from 1/25 up to 1 at ``peak``, another one down to 4e-6.
    - ``long-cos``: the same with another peak.
    - ``piecewise``: 1, divided by 10 at each of ``milestones``.
    - ``long``: the same, at 1/2 and 3/4 (epochs 100 and 150 of 200).
    - ``cosine``: torch's CosineAnnealingLR over the run: half a cosine from 1 to 0.
    - ``constant``: 1.

    All but the first three are multiplied by ``min(1, (step + 1) / warmup)``, torch's LinearLR. ``linear`` is none of
    these: it goes between points, as :func:`between`.

    Args:
        schedule: one of :data:`SCHEDULES`.
        step, steps: steps, or epochs for a rate that changes with the epoch.
        peak: part of the run, in (0, 1); ``None``: the schedule's own.
        milestones: parts of the run.
        warmup: in the unit of ``step``.
        within: the point of the step, in [0, 1], at which Short's rate is taken. CyclicLR's is 0, and has a first step
            of rate 0.

    Returns:
        the rate, and the height: 0 where a cycle begins or ends and 1 at its peak, between which momentum cycles with
        the rate; 0 for schedules without a cycle.

    Raises:
        TypeError, ValueError: for another schedule, or a step outside ``[0, steps)``.
    """
    if peak is None:
        peak = SCHEDULES[checks.choice("schedule", schedule, SCHEDULES)].peak
    checks.integer("step", step, low=0, high=checks.integer("steps", steps, low=1, high=2**63 - 1) - 1)
    if schedule == "linear":
        raise ValueError("schedule: expected one that is a function of the part of the run, got 'linear'")
    done = (step + 0.5) / steps
    if peak is not None and schedule == "short":
        done = (step + within) / steps
        height = min(done / peak, (1 - done) / (1 - peak))
        return height, height
    if peak is not None:
        top = peak * steps - 1  # OneCycleLR's step of the highest rate, which need not be whole, and may be before 0
        first = step < top
        part = step / top if first else 1 - (step - top) / (steps - 1 - top)
        height = (1 - math.cos(math.pi * part)) / 2
        return (_FIRST if first else _LAST) * (1 - height) + height, height
    rising = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if schedule == "cosine":
        return rising * (1 + math.cos(math.pi * step / steps)) / 2, 0.0
    if schedule == "constant":
        return rising, 0.0
    passed = sum(done >= milestone for milestone in (MILESTONES if schedule == "long" else milestones))
    return rising * 0.1**passed, 0.0


def between(knots: Sequence[tuple[float, float]], epoch: float) -> float:
    """Linear between points (epoch, part of the highest rate), whose epochs rise; constant before and behind them."""
    for (first, low), (last, high) in pairwise(knots):
        if epoch <= last:
            part = max(0.0, epoch - first) / (last - first)
            return low + part * (high - low)
    return knots[-1][1]


def learning_rate(schedule: str, highest: float, step: int, steps: int, **options: object) -> float:
    """``highest``, >= 0, times the part that :func:`at` gives, which explains arguments, ``options`` and errors."""
    return checks.real("highest", highest, low=0) * at(schedule, step, steps, **options)[0]  # type: ignore[arg-type]
