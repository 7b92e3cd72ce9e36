"""The curves of runs against epochs, as SVG, each run in its colour, with collapses and alarms marked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from elle_fast.evaluation.charts import PERCENT, Axes, svg, ticks
from elle_fast.recipes.run_record import Record, finite

COLOURS, DASHES = 7, ("", "6 3", "2 3", "9 3 2 3")
_WITH_SPOTS = 40  # epochs, up to which each is a spot too
_LEAST = 1e-12  # of a logarithmic axis


class Chart(NamedTuple):
    """``column`` of the rows of epochs, what it is, and how it goes upwards: percent, number or log."""

    column: str
    title: str
    scale: str


CHARTS = (
    Chart("val_pgd", "Accuracy under PGD-10, validation images (%)", "percent"),
    Chart("val_clean", "Clean accuracy, validation images (%)", "percent"),
    Chart("train_adv", "Accuracy under the training attack (%)", "percent"),
    Chart("loss", "Loss, mean of each epoch", "number"),
    Chart("lam", "lam, mean of each epoch", "number"),
    Chart("val_e_lin", "E_lin, validation images", "log"),
    Chart("e_lin", "E_lin in training, mean of each epoch", "log"),
)


def look(number: int) -> str:
    """The style attribute of the run of that number, counted from 0: its colour, and dashes from the eighth on."""
    return f'style="--run: var(--run{number % COLOURS}); --dash: {dashes(number)}"'


def dashes(number: int) -> str:
    """The dashes of a run's lines as CSS has them."""
    return DASHES[number // COLOURS % len(DASHES)] or "none"


def turning_points(record: Record) -> Iterator[tuple[dict[str, float], bool]]:
    """The rows of the epochs in which a run collapses (True), and in which it is not collapsed any more (False)."""
    was = False
    for row in record.epochs:
        now = bool(row.get("collapsed"))
        if now != was:
            yield row, now
        was = now


def charts(records: Sequence[Record]) -> list[str]:
    """A ``<figure>`` for each of :data:`CHARTS` of which a run has numbers."""
    most = max((record.epochs[-1]["epoch"] for record in records if record.epochs), default=0)
    if not most:
        return []
    figures = []
    for chart in CHARTS:
        known = [_points(record, chart) for record in records]
        values = [value for points in known for _, value in points]
        if not values:
            continue
        axes, levels = _axes(chart, most, values)
        parts = axes.drawn(levels, "epoch")
        for number, (record, points) in enumerate(zip(records, known, strict=True)):
            if points:
                drawn = "".join(_curve(record, chart, axes, points))
                parts.append(f'<g class="run run-{number}" {look(number)}>{drawn}</g>')
        figures.append(
            f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>{svg(parts, chart.title)}</figure>'
        )
    return figures


def _points(record: Record, chart: Chart) -> list[tuple[float, float]]:
    found = [(row["epoch"], finite(row, chart.column)) for row in record.epochs]
    return [
        (epoch, max(value, _LEAST) if chart.scale == "log" else value) for epoch, value in found if value is not None
    ]


def _axes(chart: Chart, most: float, values: list[float]) -> tuple[Axes, list[tuple[float, str]]]:
    """The frame of a chart, and its levels with their texts."""
    if chart.scale == "percent":
        return Axes(most), PERCENT
    if chart.scale == "log":
        low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        high += low == high
        step = math.ceil((high - low) / 6)
        return Axes(most, 10.0**low, 10.0**high, log=True), [(10.0**k, f"1e{k}") for k in range(low, high + 1, step)]
    largest = max(values) * 1.05 or 1.0
    return Axes(most, min(0.0, *values), largest), [(tick, f"{tick:g}") for tick in ticks(largest)]


def _curve(record: Record, chart: Chart, axes: Axes, points: list[tuple[float, float]]) -> Iterator[str]:
    """A run's line, the crosses where it collapses, and the triangles of its alarms, each with what it says."""
    places = [f"{axes.across(epoch)},{axes.down(value)}" for epoch, value in points]
    yield f'<polyline class="line" points="{" ".join(places)}"><title>{escape(record.name)}</title></polyline>'
    if len(points) <= _WITH_SPOTS:
        for epoch, value in points:
            number = f"{value:.1%}" if chart.scale == "percent" else f"{value:.3g}"
            said = _title(f"{record.name}, epoch {epoch:g}: {number}")
            yield f'<circle class="spot" cx="{axes.across(epoch)}" cy="{axes.down(value)}" r="2.5">{said}</circle>'
    at = dict(points)
    for row, collapsed in turning_points(record):
        if collapsed and row["epoch"] in at:
            x, y = axes.across(row["epoch"]), axes.down(at[row["epoch"]])
            said = _title(f"{record.name} collapses in epoch {row['epoch']:g}, step {row['step']:g}")
            yield f'<path class="collapse" d="M{x - 5},{y - 5}l10,10m0,-10l-10,10">{said}</path>'
    for alarm in record.alarms:
        x, y = axes.across(record.epoch_of(alarm["step"])), axes.down(axes.low)
        said = _title(f"{record.name}: alarm of the guard in step {alarm['step']}, {alarm['signal']}")
        yield f'<path class="alarm" d="M{x},{y - 9}l5,9h-10z">{said}</path>'


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>"
