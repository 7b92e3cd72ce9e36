"""Accuracy as the radius grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from elle_fast._core import checks
from elle_fast.evaluation.accuracy import outcomes
from elle_fast.evaluation.chunks import Chunks
from elle_fast.evaluation.names import BOUNDS, radius
from elle_fast.evaluation.samples import Batches

ATTACK = "pgd-20"
SAMPLES = 1000
# The default radii, as parts of eps: below it, and so far above that an attack that works leaves nothing.
PARTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)


def default_radii(eps: float, norm: str = "linf") -> list[float]:
    """Eight radii from 0 to four times eps; in linf none above 1, and around 8/255 if eps is 0."""
    eps = radius(eps, norm) or 8 / 255
    most = BOUNDS[1] if norm == "linf" else 4 * eps
    return sorted({min(part * eps, most) for part in PARTS})


def accuracy_curve(
    model: nn.Module,
    batches: Callable[[], Batches],
    radii: Sequence[float],
    *,
    norm: str = "linf",
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
    chunks: Chunks | None = None,
) -> dict[str, Any]:
    """Accuracy under PGD-20 at each radius; at 0 it is the clean one.

    Each radius is attacked for itself. So a curve that rises is a sign of masked gradients: a larger ball has all
    points of a smaller one.

    Args:
        model, norm, seed, advance, chunks: as in :func:`~elle_fast.evaluation.outcomes`.
        batches: gives the same batches each time it is called, once for a radius; :data:`SAMPLES` samples are enough.
        radii: at least one, in units of x.

    Returns:
        ``attack``, ``samples``, and ``points``: for each radius ``eps``, ``accuracy``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`~elle_fast.evaluation.outcomes`.
    """
    if not callable(batches):
        raise TypeError(f"batches: expected a function that gives batches, got {checks.describe(batches)}")
    given = [radius(each, norm) for each in radii]
    if not given:
        raise ValueError("radii: expected at least one, got none")
    points, samples = [], 0
    for eps in given:
        attack = ATTACK if eps > 0 else "clean"
        found = outcomes(model, batches(), attack, eps=eps, norm=norm, seed=seed, advance=advance, chunks=chunks)[
            attack
        ].summary()
        samples = found["samples"]
        points.append({"eps": eps, "accuracy": found["accuracy"]})
    return {"attack": ATTACK, "samples": samples, "points": points}
