"""What the guard's numbers say: a pure function of those read so far, on the host."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from elle_fast._core.collapse import least

_FALLS_HORIZON = 10
_FEWEST = 3  # numbers in a mean that can be an alarm


class Finding(NamedTuple):
    """A ``signal`` whose ``value`` is beyond its ``limit``."""

    signal: str
    value: float
    limit: float


class Judge:
    """Averages signals, remembers the best probe, and finds what is beyond its limit.

    Args:
        horizon: numbers over which relative E_lin is averaged.
        threshold: what that mean must not exceed.
        falls: what the mean share of falling losses must not exceed.
    """

    def __init__(self, horizon: int, threshold: float, falls: float) -> None:
        # By signal, over how many numbers it is averaged, and what the mean must not exceed.
        self._averages = {"linearity": (horizon, threshold), "falls": (_FALLS_HORIZON, falls)}
        self._means: dict[str, tuple[float, int]] = {}  # and how many numbers are in it
        self._bests: list[tuple[int, float]] = []  # probes above all earlier ones, and the step of each
        self._lost: dict[str, int] = {}  # by signal, numbers in a row that are not finite, if there are any

    @property
    def best(self) -> float:
        """The best probe so far; 0 before there is one."""
        return self._bests[-1][1] if self._bests else 0.0

    def take_in(self, signal: str, part: float, whole: float, classes: float = 0.0, *, step: int = 0) -> Finding | None:
        """The finding, if there is one, of a number ``part / whole``; one that is not in [0, 1] is left out.

        ``classes`` and ``step`` are for ``"probe"``, whose ``whole`` is the number of samples.
        """
        if not (math.isfinite(part) and math.isfinite(whole)):
            self._lost[signal] = self._lost.get(signal, 0) + 1
            return Finding(signal, math.nan, math.nan) if self._lost[signal] >= _FEWEST else None
        self._lost.pop(signal, None)
        value = part / whole if whole > 0 else math.nan
        if not 0 <= value <= 1:
            return None
        if signal == "probe":
            limit = least(self.best, whole, classes)
            if value > self.best:
                self._bests.append((step, value))
            return Finding(signal, value, limit) if value < limit else None
        horizon, limit = self._averages[signal]
        mean, count = self._means.get(signal, (0.0, 0))
        count += 1
        value = mean + (value - mean) / min(count, horizon)
        self._means[signal] = value, count
        return Finding(signal, value, limit) if value > limit and count >= min(_FEWEST, horizon) else None

    def calm(self, watched: Collection[str]) -> bool:
        """Whether weights are worth going back to: no mean is above half of its limit, and ``watched`` are known."""
        if self._lost or any(self._means.get(signal, (0.0, 0))[1] < _FEWEST for signal in watched):
            return False
        return all(mean <= self._averages[signal][1] / 2 for signal, (mean, _) in self._means.items())

    def forget(self, back_to: int | None = None) -> None:
        """Begin the means anew, as the weights are others; with ``back_to``, those of that step, and its best probe."""
        self._means.clear()
        self._lost.clear()
        if back_to is not None:
            self._bests = [(step, value) for step, value in self._bests if step <= back_to]

    def forget_best(self) -> None:
        """Begin the probes anew, as the radius is another."""
        self._bests.clear()

    def state_dict(self) -> dict[str, Any]:
        """The means, the probes that were the best, and what is not finite."""
        means = {signal: list(mean) for signal, mean in self._means.items()}
        return {"means": means, "bests": [list(each) for each in self._bests], "lost": dict(self._lost)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them from what :meth:`state_dict` gave."""
        self._means = {signal: (mean, count) for signal, (mean, count) in state["means"].items()}
        self._bests, self._lost = [(step, value) for step, value in state["bests"]], dict(state["lost"])
