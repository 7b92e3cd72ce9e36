"""Which steps of a detector that is above its threshold are alarms of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Alarms = NDArray[np.bool_]  # by step
APART = 20  # steps


def counted(alarms: Alarms) -> list[int]:
    """The steps of the alarms that count: none in the 20 steps after another one that does."""
    found: list[int] = []
    for step in np.flatnonzero(alarms).tolist():
        if not found or step - found[-1] > APART:
            found.append(step)
    return found
