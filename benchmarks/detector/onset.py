"""When a recorded training collapsed, by its probes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from benchmarks.detector.packed import UNFINISHED, Column, Recorded
from benchmarks.detector.rules import mean_of

LEARNED = 0.1  # of ten classes: the robust accuracy of who always answers the same
LASTS, AT_THE_END = 12, 3  # probes below, and as many if the training ends there
_MANY, _SMOOTHED, _HOLDS = 0.05, 10, 100  # share of falling losses, its mean over steps, and steps that it stays above


class Onset(NamedTuple):
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
    lost, best = loss(trace.probes[:, 2], {"nan": 1, UNFINISHED: LASTS}.get(trace.ended, AT_THE_END))
    if lost is not None:
        return Onset("lost", int(trace.probes[lost, 0]), best)
    return Onset("stands", None, best) if best >= LEARNED else Onset("never robust", _distorted(trace), best)


def loss(robust: Column, fewest: int) -> tuple[int | None, float]:
    """Of PGD-10 accuracies: the first probe of a loss, if there is one, and the best median of five before, or of all.

    From a loss on, 12 probes, or at the end ``fewest`` or more, stay below two thirds of the best, and half of them
    below half. The best is above a tenth.
    """
    best = 0.0
    for i in range(len(robust)):
        following = robust[i : i + LASTS]
        falls = (following < 2 / 3 * best).all() and np.median(following) < best / 2
        if best >= LEARNED and len(following) >= fewest and falls:
            return i, best
        if i >= 2:
            best = max(best, float(np.median(robust[max(0, i - 4) : i + 1])))
    return None, best


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
