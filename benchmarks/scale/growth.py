"""Slopes on log axes, the size at which memory is full, and the share of a step that is this project's operations."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.harness.tables import rounded
from benchmarks.scale.points import METHODS, OPS

Rows = dict[str, dict[str, Any]]  # of an axis: by value, the row of each method

_POINTS = 3  # the largest: at small sizes what does not grow hides what does


def slopes(axis: str, rows: Rows) -> dict[str, dict[str, float | None]]:
    """By method and operation, of time and of memory; None where a number is missing."""
    found = {}
    for name in (*METHODS, *OPS):
        time, memory = series(rows, name, "ms"), series(rows, name, "peak_bytes")
        found[name] = {"time": rounded(slope(time)), "memory": rounded(slope(memory))}
    return {name: each for name, each in found.items() if each != {"time": None, "memory": None}}


def series(rows: Rows, name: str, column: str) -> dict[int, float]:
    """By size, the least time in ms, or the peak bytes, where there is a number."""
    found: dict[int, float] = {}
    for size, methods in rows.items():
        value = methods.get(name, {}).get(column)
        value = value["least"] if isinstance(value, dict) else value
        if value is not None and value > 0:
            found[int(size)] = value
    return dict(sorted(found.items()))


def slope(values: dict[int, float]) -> float | None:
    """Least squares of log value over log size, over the three largest sizes."""
    last = list(values.items())[-_POINTS:]
    if len(last) < 2:
        return None
    xs, ys = [math.log(size) for size, _ in last], [math.log(value) for _, value in last]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def breaking(rows: Rows, memory: int) -> dict[str, Any]:
    """By method, the size at which it fills ``memory`` bytes, by the line through its two largest sizes.

    In sizes to the power that makes memory proportional: pixels of a picture are its side squared, so a line in the
    side's power; None where memory does not grow. ``first`` is the method with the smallest.
    """
    found: dict[str, float | None] = {}
    for name in METHODS:
        values = list(series(rows, name, "peak_bytes").items())[-2:]
        power = 1.0 if len(values) < 2 else max(1.0, round(slope(dict(values)) or 0.0))
        if len(values) < 2 or values[1][1] <= values[0][1]:
            found[name] = None
            continue
        (a, low), (b, high) = ((size**power, value) for size, value in values)
        found[name] = rounded((b + (memory - high) * (b - a) / (high - low)) ** (1 / power)) if memory > high else b
    there = {name: size for name, size in found.items() if size is not None}
    return {"at": found, "first": min(there, key=lambda name: there[name]) if there else None}


def shares(rows: Rows) -> dict[str, dict[str, float]]:
    """By size, the part of a packed ELLE-A step that pack_points and elle_loss take alone."""
    found: dict[str, dict[str, float]] = {}
    for size, methods in rows.items():
        whole = methods.get("elle-a", {}).get("ms")
        if whole is not None:
            parts = {name: methods[name]["ms"]["least"] / whole["least"] for name in OPS if name in methods}
            found[size] = {name: float(f"{part:.3g}") for name, part in parts.items()}
    return found
