"""Detectors of a collapse, each a pure function of a recorded training with a state of O(1).

A detector takes the signals of one step after another, and says at which it would raise lam. Nothing that it says acts
on the training, so these are the alarms of an observer: of a training without ELLE, what would have been detected; of
one with it, what else would have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.detector.traces import COLUMNS, GROUP, GROUPS

Signals = dict[str, NDArray[np.float64]]
Alarms = NDArray[np.bool_]

_LEAST = 1e-30  # keeps logarithms finite; an E_lin of float32 losses is 0 or above it


def signals(rows: NDArray[np.float32], samples: int) -> Signals:
    """What a detector may look at, each [steps], with E_lin estimated on that many samples.

    ``e_lin``; ``spread``, the standard error of that estimate over E_lin, from the mean of r^4; ``relative``, E_lin over
    the mean of (L(x_b) - L(x_a))^2; ``falls``, the share of samples whose loss falls along the attack; ``bent``, one minus
    the rise of the loss along the attack over what the gradient predicts; ``lam``.
    """
    column = dict(zip(COLUMNS, rows.astype(np.float64).T, strict=True))
    groups = np.stack([column[f"group_{i}"] for i in range(GROUPS)])
    of_all = np.nanmean(groups, axis=0)
    e_lin = column["own_pass"] if samples == GROUP else np.nanmean(groups[: samples // GROUP], axis=0)
    variance = np.maximum(column["r4"] - of_all**2, 0)
    return {
        "e_lin": e_lin,
        "spread": np.sqrt(variance / samples) / np.maximum(of_all, _LEAST),
        "relative": e_lin / np.maximum(column["rise"], _LEAST),
        "falls": column["falls"],
        "bent": 1 - (column["adv"] - column["start"]) / np.maximum(column["predicted"], _LEAST),
        "lam": column["lam"],
    }


def paper(
    of: Signals, sensitivity: float, *, window: int | None = None, signal: str = "e_lin", log: bool = False
) -> Alarms:
    """Above mean + sensitivity * std of the history (Algorithm 1, lines 9 to 11), or of its last values."""
    held: list[float] = []  # with a window; without, count, mean and deviations are the state
    found = np.zeros(len(of[signal]), dtype=bool)
    count, mean, deviations = 0, 0.0, 0.0
    for step, value in _finite(of[signal], log):
        if window is not None and held:
            mean, std = float(np.mean(held)), float(np.std(held))
        else:
            std = math.sqrt(deviations / max(count, 1))
        found[step] = count >= 3 and value > mean + sensitivity * std
        count += 1
        if window is not None:
            held.append(value)
            del held[:-window]
        else:
            gap = value - mean
            mean += gap / count
            deviations += gap * (value - mean)
    return found


def weighted(
    of: Signals, sensitivity: float, *, rate: float, log: bool = True, signal: str = "e_lin", floor: float = 0.0
) -> Alarms:
    """Above mean + sensitivity * std, both exponentially weighted; ``floor``: the least std.

    The first 1 / rate steps are averaged evenly. A value above the threshold does not enter: a collapse is not to
    become the measure of itself.
    """
    found = np.zeros(len(of[signal]), dtype=bool)
    count, mean, variance = 0, 0.0, 0.0
    for step, value in _finite(of[signal], log):
        std = max(math.sqrt(variance), floor)
        found[step] = count >= 20 and value > mean + sensitivity * std
        part = max(rate, 1 / (count + 1))
        gap = value - mean if not found[step] else min(value - mean, std)
        mean += part * gap
        variance += part * (gap * (value - mean if not found[step] else gap) - variance)
        count += 1
    return found


def factor(of: Signals, times: float, *, rate: float, signal: str = "e_lin") -> Alarms:
    """Above ``times`` the exponentially weighted geometric mean."""
    return weighted(of, math.log(times), rate=rate, log=True, signal=signal, floor=1.0) if times > 1 else ~_none(of)


def cusum(of: Signals, threshold: float, *, rate: float, drift: float) -> Alarms:
    """CUSUM of log E_lin: the sum of what it exceeds its weighted mean by, less ``drift`` standard deviations a step."""
    found = _none(of)
    count, mean, variance, total = 0, 0.0, 1.0, 0.0
    for step, value in _finite(of["e_lin"], True):
        std = math.sqrt(variance)
        if count >= 20:
            total = max(0.0, total + (value - mean) / std - drift)
            found[step] = total > threshold
            if found[step]:
                total = 0.0
        part = max(rate, 1 / (count + 1))
        gap = value - mean
        mean += part * gap
        variance += part * (gap * (value - mean) - variance)
        count += 1
    return found


def own_spread(of: Signals, sensitivity: float, *, rate: float) -> Alarms:
    """Above the weighted mean by that many of the estimator's own standard errors, which follow from r^4."""
    found = _none(of)
    count, mean = 0, 0.0
    for step, value in _finite(of["e_lin"], False):
        found[step] = count >= 20 and value > mean * (1 + sensitivity * of["spread"][step])
        mean += max(rate, 1 / (count + 1)) * (value - mean)
        count += 1
    return found


def quantile(of: Signals, times: float, *, rate: float, level: float = 0.9) -> Alarms:
    """Above ``times`` a quantile of the past, followed by stochastic approximation in log E_lin."""
    found = _none(of)
    count, place = 0, 0.0
    for step, value in _finite(of["e_lin"], True):
        place = value if count == 0 else place
        found[step] = count >= 20 and value > place + math.log(times)
        place += max(rate, 1 / (count + 1)) * 4 * (level - (value < place))
        count += 1
    return found


def absolute(of: Signals, threshold: float, *, signal: str, mean_of: int = 1) -> Alarms:
    """Above a fixed number, the exponentially weighted mean over some steps: no history at all."""
    found = np.zeros(len(of[signal]), dtype=bool)
    mean, count = 0.0, 0
    for step, value in _finite(of[signal], False):
        count += 1
        mean += max(1 / mean_of, 1 / count) * (value - mean)
        found[step] = mean > threshold
    return found


def both(of: Signals, threshold: float, *, first: Callable[[Signals], Alarms], signal: str) -> Alarms:
    """Where one detector says so and another signal is above a number."""
    return first(of) & (np.nan_to_num(of[signal]) > threshold)


@dataclass(frozen=True)
class Family:
    """A detector and the thresholds of its curve.

    Attributes:
        name: as the figures and tables have it.
        alarms: of the signals and one threshold.
        thresholds: from sensitive to deaf.
    """

    name: str
    alarms: Callable[[Signals, float], Alarms]
    thresholds: Sequence[float]


_SIGMAS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
_TIMES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0, 100.0)
_RATIOS = tuple(float(x) for x in np.geomspace(0.02, 3, 16))
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35)

FAMILIES: tuple[Family, ...] = (
    Family("paper, all history", paper, _SIGMAS),
    Family("paper, window 500", lambda of, t: paper(of, t, window=500), _SIGMAS),
    Family("paper on log E_lin", lambda of, t: paper(of, t, log=True), _SIGMAS),
    Family("weighted, 1/100", lambda of, t: weighted(of, t, rate=1e-2, log=False), _SIGMAS),
    Family("weighted log, 1/100", lambda of, t: weighted(of, t, rate=1e-2), _SIGMAS),
    Family("weighted log, 1/500", lambda of, t: weighted(of, t, rate=2e-3), _SIGMAS),
    Family("weighted log, 1/2000", lambda of, t: weighted(of, t, rate=5e-4), _SIGMAS),
    Family("factor, 1/100", lambda of, t: factor(of, t, rate=1e-2), _TIMES),
    Family("factor, 1/500", lambda of, t: factor(of, t, rate=2e-3), _TIMES),
    Family("factor, 1/2000", lambda of, t: factor(of, t, rate=5e-4), _TIMES),
    Family("CUSUM, drift 0.5", lambda of, t: cusum(of, t, rate=2e-3, drift=0.5), (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0)),
    Family("CUSUM, drift 1", lambda of, t: cusum(of, t, rate=2e-3, drift=1.0), (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0)),
    Family("own spread", lambda of, t: own_spread(of, t, rate=2e-3), (*_SIGMAS, 20.0, 40.0)),
    Family("quantile", lambda of, t: quantile(of, t, rate=2e-3), _TIMES),
    Family("relative to the slope", lambda of, t: absolute(of, t, signal="relative"), _RATIOS),
    Family("relative, mean of 4", lambda of, t: absolute(of, t, signal="relative", mean_of=4), _RATIOS),
    Family("relative, mean of 10", lambda of, t: absolute(of, t, signal="relative", mean_of=10), _RATIOS),
    Family("relative, weighted log", lambda of, t: weighted(of, t, rate=2e-3, signal="relative"), _SIGMAS),
    Family("share that falls", lambda of, t: absolute(of, t, signal="falls"), _SHARES),
    Family("share that falls, mean of 10", lambda of, t: absolute(of, t, signal="falls", mean_of=10), _SHARES),
    Family("bent along the attack", lambda of, t: absolute(of, t, signal="bent", mean_of=10), (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)),
)


def _none(of: Signals) -> Alarms:
    return np.zeros(len(of["e_lin"]), dtype=bool)


def _finite(values: NDArray[np.float64], log: bool) -> Iterator[tuple[int, float]]:
    """Steps and values; one that is not finite is passed over, as in training."""
    for step, value in enumerate(values.tolist()):
        if math.isfinite(value):
            yield step, math.log(max(value, _LEAST)) if log else value
