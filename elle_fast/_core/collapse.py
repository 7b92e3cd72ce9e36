"""When a model counts as robust, and when as collapsed: by what it withstood before."""

from __future__ import annotations

import math

# Times chance: a model that never withstood more has nothing to lose.
_ROBUST = 1.5
# It has collapsed if less than half of the best is left, and the fall is of as many standard deviations.
_PART, _DEVIATIONS = 0.5, 3.0


def is_robust(accuracy: float, classes: float) -> bool:
    """Whether an accuracy under attack, in [0, 1], is above 1.5 times chance."""
    return accuracy > _ROBUST / classes


def least(best: float, samples: float, classes: float) -> float:
    """The accuracy under attack below which a model has collapsed that once withstood ``best``; 0 if that was nothing.

    ``min(best / 2, best - 3 sqrt(best (1 - best) / samples))``, so that neither a dip nor the number of samples makes a
    collapse; 0, which nothing is below, unless ``best`` is above 1.5 times chance.
    """
    if not is_robust(best, classes):
        return 0.0
    return min(_PART * best, best - _DEVIATIONS * math.sqrt(best * (1 - best) / samples))
