"""When a recorded training collapsed, by its probes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.detector.packed import UNFINISHED, Column, Recorded
from benchmarks.detector.rules import mean_of

LEARNED = 0.1  # of ten classes: the robust accuracy of who always answers the same
LASTS, AT_THE_END = 12, 3  # probes below, and as many if the training ends there
_MANY, _SMOOTHED, _HOLDS = 0.05, 10, 100  # share of falling losses, its mean over steps, and steps that it stays above


@dataclass(frozen=True)
class Onset:
    """What became of a training.

    Attributes:
        fate: ``"stands"``; ``"lost"``: PGD-10 was above a tenth, lost a third for good, and half at least;
            ``"never robust"``: PGD-10 never was above a tenth, so that it had nothing to lose.
        step: of a loss, the first probe of those that stay below two thirds of the best: 12, or the last ones of a
            finished training, at least 3. Of a training that was never robust, the first step at which many losses
            begin to fall along the attack: more than 5 % in the mean of ten steps, and for 100 steps on end. No healthy
            training on CIFAR-10 shows that, but some on digits and with the tokens do. ``None`` if there is none.
        best: PGD-10, the best median of five probes, before the loss.
    """

    fate: str
    step: int | None
    best: float


def onset(trace: Recorded) -> Onset:
    """That of a trace."""
    robust = trace.probes[:, 2]
    medians = [float(np.median(robust[max(0, i - 4) : i + 1])) if i >= 2 else 0.0 for i in range(len(robust))]
    best = np.maximum.accumulate(medians) if medians else np.zeros(0)
    if not medians or best[-1] < LEARNED:
        return Onset("never robust", _distorted(trace), float(best[-1]) if medians else 0.0)
    for i in range(1, len(robust)):
        following = robust[i : i + LASTS]
        enough = len(following) >= {"nan": 1, UNFINISHED: LASTS}.get(trace.ended, AT_THE_END)
        if best[i - 1] >= LEARNED and enough and _lost(following, float(best[i - 1])):
            return Onset("lost", int(trace.probes[i, 0]), float(best[i - 1]))
    return Onset("stands", None, float(best[-1]))


def _lost(following: Column, best: float) -> bool:
    """Whether these probes stay below two thirds of the best, and half of them below half."""
    return bool((following < 2 / 3 * best).all() and np.median(following) < best / 2)


def _distorted(trace: Recorded) -> int | None:
    above = mean_of(
        {"e_lin": trace.columns["falls"], "falls": trace.columns["falls"]}, signal="falls", horizon=_SMOOTHED
    )
    run = 0
    for step, value in enumerate(above.tolist()):
        run = run + 1 if value > _MANY else 0
        if run == _HOLDS:
            return step - _HOLDS + 1
    return None
