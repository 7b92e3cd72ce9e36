"""What bench_scale.py prints and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.tables import markdown
from benchmarks.scale.growth import series
from benchmarks.scale.points import METHODS, OPS
from elle_fast.recipes.plot import new_figure, write_figure

# Okabe and Ito, as in the other pictures.
_COLOURS = {
    "fgsm": "#000000",
    "elle-a": "#0072B2",
    "elle-a-fast-light": "#56B4E9",
    "elle-a-fast-full": "#009E73",
    "elle-a-checkpoint": "#D55E00",
    "pack": "#CC79A7",
    "loss": "#E69F00",
}
_UNITS = {"batch": "images", "side": "pixels a side", "classes": "classes", "width": "channels", "ranks": "ranks"}


def tables(content: dict[str, Any]) -> str:
    """Slopes, what breaks first, the share of our operations, and what failed, in Markdown."""
    head = f"A step of narrow PreActResNets on {content['setting']['device']}; common point: " + ", ".join(
        f"{name} {value}" for name, value in content["common"].items()
    )
    said = [head, "", "Slopes on log axes, time / memory:", "", slopes(content), ""]
    said += ["Where memory is full:", "", breaking(content), "", *_shares(content), "", _noise(content)]
    said += [f"failed: {reason}" for reason in content["failures"].values()]
    return "\n".join(said)


def slopes(content: dict[str, Any]) -> str:
    """Slopes on log axes, time / memory, in Markdown."""
    spans = [f"{axis} {_span(rows)}" for axis, rows in content["axes"].items()]
    rows = [[name, *(_slope(content, axis, name) for axis in content["axes"])] for name in (*METHODS, *OPS)]
    return markdown(["", *spans], rows)


def _span(rows: dict[str, Any]) -> str:
    sizes = sorted(map(int, rows))
    return f"{sizes[0]} to {sizes[-1]}" if sizes else "-"


def _slope(content: dict[str, Any], axis: str, name: str) -> str:
    found = content["slopes"][axis].get(name)
    if found is None:
        return "-"
    return " / ".join("-" if found[what] is None else f"{found[what]:.2f}" for what in ("time", "memory"))


def breaking(content: dict[str, Any]) -> str:
    """The size of each axis at which memory is full, by the line through the last two, in Markdown."""
    gigabytes = content["memory_bytes"] / 2**30
    rows = []
    for axis, found in content["breaking"].items():
        sizes = ["-" if found["at"][name] is None else f"{found['at'][name]:,.0f}" for name in METHODS]
        rows.append([f"{axis} ({_UNITS[axis]})", *sizes, found["first"] or "-"])
    return markdown([f"{gigabytes:.0f} GiB at", *METHODS, "first"], rows)


def _shares(content: dict[str, Any]) -> list[str]:
    said = []
    for axis, name, words in (("side", "pack", "pack_points"), ("classes", "loss", "elle_loss")):
        parts = [f"{size}: {each[name]:.1%}" for size, each in content["shares"].get(axis, {}).items() if name in each]
        said.append(f"Share of {words} in a packed step by {axis}: {', '.join(parts) or '-'}")
    return said


def _noise(content: dict[str, Any]) -> str:
    spreads = sorted(
        (row["ms"]["q3"] - row["ms"]["q1"]) / row["ms"]["median"]
        for rows in content["axes"].values()
        for methods in rows.values()
        for row in methods.values()
    )
    middle = f"{spreads[len(spreads) // 2]:.0%} in the middle, {spreads[-1]:.0%} at most" if spreads else "-"
    return (
        f"Noise: quartiles {middle} apart; load {content['load_before']:.1f} before, {content['load_after']:.1f} after"
    )


def plot(content: dict[str, Any], path: Path) -> None:
    """Time above, memory below, a column for each axis, on log axes."""
    axes = {axis: rows for axis, rows in content["axes"].items() if len(rows) > 1}
    if not axes:
        return
    figure = new_figure(figsize=(3.4 * len(axes), 7), layout="constrained")
    grid = figure.subplots(2, len(axes), squeeze=False)
    for column, (axis, rows) in enumerate(axes.items()):
        for row, (kind, unit, scale) in enumerate((("ms", "ms a step", 1.0), ("peak_bytes", "peak memory, MB", 1e-6))):
            place = grid[row][column]
            for name in (*METHODS, *(OPS if kind == "ms" else ())):
                values = series(rows, name, kind)
                if values:
                    style = "o--" if name in OPS else "o-"
                    scaled = [scale * value for value in values.values()]
                    place.loglog(list(values), scaled, style, color=_COLOURS[name], label=name, markersize=4)
            sizes = sorted(map(int, rows))
            place.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8, rotation=30)
            place.set_xticks([], minor=True)
            place.set_xlabel(f"{axis} ({_UNITS[axis]})" if axis != _UNITS[axis] else axis)
            place.grid(alpha=0.3)
            if column == 0:
                place.set_ylabel(unit)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * len(axes)), frameon=False, fontsize=9
    )
    common = ", ".join(f"{name} {value}" for name, value in content["common"].items())
    figure.suptitle(f"A training step against its sizes, on {content['setting']['device']}\nfrom {common}", fontsize=11)
    write_figure(figure, path)
