"""What is measured: a common point, and along each axis the points that differ from it in one size."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

# Steps of benchmarks/step/compared.py. Of --fast both kinds: light ones, most of a healthy training, and full ones.
METHODS = ("fgsm", "elle-a", "elle-a-fast-light", "elle-a-fast-full", "elle-a-checkpoint")
BASE = "fgsm"
# The two operations of this project, in the sizes that a packed step gives them.
OPS = ("pack", "loss")


@dataclass(frozen=True)
class Point:
    """Sizes of a training step; the batch is that of each rank."""

    batch: int = 8
    side: int = 32
    classes: int = 10
    width: int = 16
    ranks: int = 1

    def name(self) -> str:
        """Such as ``batch=16 side=32 classes=10 width=8 ranks=1``."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())


# Narrow networks, so that all of it takes some minutes on one core; a GPU wants more work in a step. Widths are
# multiples of 16: torch 2.13 on the CPU writes beyond its memory in a 1x1 convolution with stride 2 of 8 channels, in
# channels_last, on pictures of 64 pixels and more.
COMMON = {"cpu": Point(), "cuda": Point(batch=128, width=64)}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {
        "batch": (4, 8, 16, 32, 64),
        "side": (32, 64, 96, 128, 224),
        "classes": (10, 100, 1000, 5000, 21_000),
        "width": (16, 32, 48, 64),
        "ranks": (1, 2),
    },
    "cuda": {
        "batch": (32, 64, 128, 256, 512, 1024),
        "side": (32, 64, 96, 128, 224),
        "classes": (10, 100, 1000, 5000, 21_000),
        "width": (16, 32, 64, 128),
        "ranks": (1, 2),
    },
}
QUICK = Point(batch=2, side=8, classes=3, width=16)
QUICK_AXES: dict[str, tuple[int, ...]] = {
    **{"batch": (2, 4), "side": (8, 16), "classes": (3, 9), "width": (16, 32), "ranks": (1, 2)},
}


def along(common: Point, axes: dict[str, tuple[int, ...]]) -> dict[str, dict[int, Point]]:
    """By axis and value, the point; the common one is on every axis."""
    found = {}
    for axis, values in axes.items():
        change: dict[int, dict[str, Any]] = {value: {axis: value} for value in values}
        found[axis] = {value: replace(common, **change[value]) for value in values}
    return found
