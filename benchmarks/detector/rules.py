"""Detectors of a collapse, each a pure function of a recorded training, with a state of O(1) or of a window.

A detector gives each step a score; there is an alarm where the score exceeds a threshold, which never feeds back into
the score, so that one pass serves a whole curve. A score depends on its step and those before it alone. Nothing of it
acts on the training, so these are the alarms of an observer: of a training without ELLE, what would have been detected;
of one with it, what else would have been. A value that is not finite is passed over, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from benchmarks.detector.packed import SAMPLES, Column
from benchmarks.detector.recorder import GROUP

Signals = Mapping[str, Column]

OWN_PASS = 0  # in place of a number of samples: the first 16 in a pass of their own
LEAST_HISTORY = 3  # AdaptiveLambda's min_history
SETTLING = 20  # steps without an alarm at the beginning of what follows a mean over many steps
_LEAST = 1e-30  # keeps logarithms finite; an E_lin of float32 losses is 0 or above it


def signals(columns: Mapping[str, Column], samples: int) -> Signals:
    """What a detector may look at, each [steps], with E_lin estimated on so many samples, or in a pass of their own.

    - ``e_lin``;
    - ``relative``: E_lin / (E_lin + the mean of (L(x_b) - L(x_a))^2 + 1e-12), in [0, 1], as ELLE-A has it but for the
      floor, which there grows with the losses (E_lin is 1e-9 and above here). The squared
      slope is that of all samples, as no other was recorded;
    - ``of_loss``: E_lin over the squared loss at x_adv;
    - ``spread``: the standard error of the estimate of E_lin, from r^4, over E_lin;
    - ``falls``: the share of samples whose loss falls along the attack;
    - ``bent``: one minus the rise of the loss along the attack over what its gradient predicts;
    - ``lam``: over the highest of the trace.

    Raises:
        ValueError: for a number of samples that was not recorded.
    """
    if samples not in (OWN_PASS, *SAMPLES):
        raise ValueError(f"samples: expected {OWN_PASS} (a pass of their own) or one of {SAMPLES}, got {samples!r}")
    e_lin = columns["own_pass"] if samples == OWN_PASS else columns[f"first_{samples}"]
    of_all = columns["first_128"]
    variance = np.maximum(columns["r4"] - of_all**2, 0)
    predicted = np.maximum(columns["predicted"], _LEAST)
    return {
        "e_lin": e_lin,
        "relative": e_lin / (e_lin + columns["rise"] + 1e-12),
        "of_loss": e_lin / np.maximum(columns["adv"] ** 2, _LEAST),
        "spread": np.sqrt(variance / (samples or GROUP)) / np.maximum(of_all, _LEAST),
        "falls": columns["falls"],
        "bent": 1 - (columns["adv"] - columns["start"]) / predicted,
        "lam": columns["lam"] / max(float(np.nanmax(columns["lam"], initial=0.0)), _LEAST),
    }


def paper(
    of: Signals, *, signal: str = "e_lin", log: bool = False, window: int | None = None, below: float | None = None
) -> Column:
    """Standard deviations above the mean of the history: Algorithm 1, lines 9 to 11, once three values are in it.

    Args:
        of: the signals.
        signal: whose history it is; ``log``: of its logarithm.
        window: of the last values only.
        below: only of steps whose lam is at most this part of its highest, so that no regularised step enters.
    """
    if window is not None:
        return _windowed(_taken(of[signal], log), window)
    scores = _silent(of)
    count, mean, deviations = 0, 0.0, 0.0
    for step, value in _finite(_taken(of[signal], log)):
        if count >= LEAST_HISTORY:
            scores[step] = _over(value - mean, math.sqrt(deviations / count))
        if below is None or of["lam"][step] <= below:
            count += 1
            gap = value - mean
            mean += gap / count
            deviations += gap * (value - mean)
    return scores


def at_its_lam(of: Signals, *, edges: Sequence[float] = (0.01, 0.1, 0.5)) -> Column:
    """The paper's rule with a history for each range of lam, which knows that lam lowers E_lin."""
    scores = _silent(of)
    place = np.searchsorted(edges, of["lam"])
    for each in range(len(edges) + 1):
        within = place == each
        scores[within] = paper({"e_lin": of["e_lin"][within]})
    return scores


def weighted(of: Signals, *, rate: float, log: bool = True, signal: str = "e_lin", widest: float = 3.0) -> Column:
    """Standard deviations above the mean, both exponentially weighted, evenly over the first 1 / rate steps.

    A value further than ``widest`` deviations off enters as if it were there: a collapse is not to become its own
    measure.
    """
    scores = _silent(of)
    mean, variance = 0.0, 0.0
    for count, (step, value) in enumerate(_finite(_taken(of[signal], log))):
        std = math.sqrt(variance)
        gap = value - mean
        if count >= SETTLING:
            scores[step] = _over(gap, std)
            gap = min(max(gap, -widest * std), widest * std)
        part = max(rate, 1 / (count + 1))
        mean += part * gap
        variance += part * ((1 - part) * gap * gap - variance)
    return scores


def factor(of: Signals, *, rate: float, signal: str = "e_lin") -> Column:
    """How many times its exponentially weighted geometric mean a value is."""
    scores = _silent(of)
    mean = 0.0
    for count, (step, value) in enumerate(_finite(_taken(of[signal], True))):
        if count >= SETTLING:
            scores[step] = math.exp(min(value - mean, 700.0))
        mean += max(rate, 1 / (count + 1)) * (value - mean)
    return scores


def cusum(of: Signals, *, rate: float, drift: float, most: float = 100.0) -> Column:
    """Page's CUSUM of log E_lin: the sum of its standard deviations above the weighted mean, less ``drift`` a step.

    At least 0, and at most ``most``, so that it comes back.
    """
    each = weighted(of, rate=rate)
    scores, total = _silent(of), 0.0
    for step, value in _finite(each):
        total = min(max(0.0, total + value - drift), most)
        scores[step] = total
    return scores


def own_spread(of: Signals, *, rate: float) -> Column:
    """How many of the estimator's own standard errors, from r^4, E_lin is above its weighted mean."""
    scores = _silent(of)
    mean = 0.0
    for count, (step, value) in enumerate(_finite(of["e_lin"])):
        if count >= SETTLING:
            scores[step] = _over(value - mean, mean * float(of["spread"][step]))
        mean += max(rate, 1 / (count + 1)) * (value - mean)
    return scores


def quantile(of: Signals, *, rate: float, level: float = 0.9) -> Column:
    """How many times a quantile of its past E_lin is; the quantile follows log E_lin by stochastic approximation."""
    scores = _silent(of)
    place = 0.0
    for count, (step, value) in enumerate(_finite(_taken(of["e_lin"], True))):
        if count == 0:
            place = value
            continue
        if count >= SETTLING:
            scores[step] = math.exp(min(value - place, 700.0))
        place += max(rate, 1 / (count + 1)) * 4 * (level - (value < place))
    return scores


def mean_of(of: Signals, *, signal: str, horizon: int = 1) -> Column:
    """The exponentially weighted mean over so many steps, evenly over the first ones, once three are over.

    Of ``relative`` it is what ``AdaptiveLambda(rule="relative")`` compares with its threshold.
    """
    scores = _silent(of)
    mean = 0.0
    for count, (step, value) in enumerate(_finite(of[signal])):
        mean += max(1 / horizon, 1 / (count + 1)) * (value - mean)
        if count >= LEAST_HISTORY:
            scores[step] = mean
    return scores


def both(of: Signals, first: Callable[[Signals], Column], second: Callable[[Signals], Column], least: float) -> Column:
    """The first score, where the second one exceeds ``least``."""
    return np.where(second(of) > least, first(of), -math.inf)


@dataclass(frozen=True)
class Family:
    """A detector and the thresholds of its curve.

    Attributes:
        name: as the figures and tables have it.
        score: of the signals, [steps].
        thresholds: from sensitive to deaf.
        sampled: whether it looks at E_lin, so that the number of samples matters.
    """

    name: str
    score: Callable[[Signals], Column]
    thresholds: Sequence[float]
    sampled: bool = True


_SIGMAS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 40.0)
_TIMES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 40.0, 100.0)
_SUMS = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 40.0, 80.0)
_RATIOS = (0.03, 0.05, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.22, 0.25, 0.28, 0.3, 0.35, 0.4, 0.45, 0.5)
_SHARES = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35)
_PARTS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.99)
_OF_LOSS = tuple(float(f"{each:.2g}") for each in np.geomspace(1e-6, 1e-2, 13))
_relative = partial(mean_of, signal="relative")

PAPER, PRODUCT = "paper, all history", "relative, mean of 8"  # the rules of AdaptiveLambda
SENSITIVITY, THRESHOLD, HORIZON = 2.0, 0.2, 8  # and their defaults
FAMILIES: tuple[Family, ...] = (
    Family(PAPER, paper, _SIGMAS),
    Family("paper, window 500", partial(paper, window=500), _SIGMAS),
    Family("paper, unregularised history", partial(paper, below=0.01), _SIGMAS),
    Family("paper, at its lam", at_its_lam, _SIGMAS),
    Family("paper on log E_lin", partial(paper, log=True), _SIGMAS),
    Family("paper on log E_lin, window 500", partial(paper, log=True, window=500), _SIGMAS),
    Family("weighted, 1/100", partial(weighted, rate=1e-2, log=False), _SIGMAS),
    Family("weighted log, 1/100", partial(weighted, rate=1e-2), _SIGMAS),
    Family("weighted log, 1/500", partial(weighted, rate=2e-3), _SIGMAS),
    Family("weighted log, 1/2000", partial(weighted, rate=5e-4), _SIGMAS),
    Family("factor, 1/100", partial(factor, rate=1e-2), _TIMES),
    Family("factor, 1/500", partial(factor, rate=2e-3), _TIMES),
    Family("CUSUM, drift 0.5", partial(cusum, rate=2e-3, drift=0.5), _SUMS),
    Family("CUSUM, drift 1", partial(cusum, rate=2e-3, drift=1.0), _SUMS),
    Family("own spread", partial(own_spread, rate=2e-3), _SIGMAS),
    Family("quantile", partial(quantile, rate=2e-3), _TIMES),
    Family("relative", _relative, _RATIOS),
    Family("relative, mean of 4", partial(_relative, horizon=4), _RATIOS),
    Family(PRODUCT, partial(_relative, horizon=HORIZON), _RATIOS),
    Family("relative, mean of 10", partial(_relative, horizon=10), _RATIOS),
    Family("relative, mean of 20", partial(_relative, horizon=20), _RATIOS),
    Family("of the squared loss, mean of 8", partial(mean_of, signal="of_loss", horizon=HORIZON), _OF_LOSS),
    Family("paper on log relative", partial(paper, signal="relative", log=True), _SIGMAS),
    Family("share that falls", partial(mean_of, signal="falls"), _SHARES, sampled=False),
    Family("share that falls, mean of 10", partial(mean_of, signal="falls", horizon=10), _SHARES, sampled=False),
    Family("bent, mean of 10", partial(mean_of, signal="bent", horizon=10), _PARTS, sampled=False),
    Family(
        "paper, where relative > 0.1",
        partial(both, first=paper, second=partial(_relative, horizon=HORIZON), least=0.1),
        _SIGMAS,
    ),
    Family(
        "relative, where 2 % fall",
        partial(
            both,
            first=partial(_relative, horizon=HORIZON),
            second=partial(mean_of, signal="falls", horizon=10),
            least=0.02,
        ),
        _RATIOS,
    ),
)


def find(name: str) -> Family:
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)


def _windowed(values: Column, window: int) -> Column:
    """Standard deviations above the mean of the last finite values, once three are there."""
    scores = np.full(len(values), -math.inf)
    finite = np.flatnonzero(np.isfinite(values))
    kept = values[finite]
    for i in range(LEAST_HISTORY, min(window, len(kept))):
        scores[finite[i]] = _over(kept[i] - kept[:i].mean(), float(kept[:i].std()))
    if len(kept) > window:
        past = sliding_window_view(kept[:-1], window)
        gaps, stds = kept[window:] - past.mean(1), past.std(1)
        scores[finite[window:]] = [_over(gap, std) for gap, std in zip(gaps.tolist(), stds.tolist(), strict=True)]
    return scores


def _over(gap: float, std: float) -> float:
    """gap / std; with a std of 0, any rise is beyond every threshold."""
    return gap / std if std > 0 else math.inf if gap > 0 else -math.inf


def _silent(of: Signals) -> Column:
    return np.full(len(of["e_lin"]), -math.inf)


def _taken(values: Column, log: bool) -> Column:
    return np.log(np.maximum(values, _LEAST)) if log else values


def _finite(values: Column) -> Iterator[tuple[int, float]]:
    """Steps and values; one that is not finite is passed over."""
    for step, value in enumerate(values.tolist()):
        if math.isfinite(value):
            yield step, value
