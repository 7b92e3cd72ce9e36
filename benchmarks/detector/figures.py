"""The figures of the detectors: their curves, and one collapse and one healthy training with two detectors' alarms."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.detector.packed import Column, Recorded
from benchmarks.detector.rules import HORIZON, OWN_PASS, PAPER, PRODUCT, SENSITIVITY, THRESHOLD, find, mean_of, signals
from elle_fast.recipes.plot import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAMMAS = {"paper": 0.99, "relative": 0.9}  # the defaults of AdaptiveLambda's rules
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_SHOWN = {
    PRODUCT: "#0072B2",
    "bent, mean of 10": "#000000",
    "share that falls, mean of 10": "#009E73",
    "CUSUM, drift 0.5": "#CC79A7",
    "weighted log, 1/500": "#E69F00",
    "paper on log E_lin, window 500": "#56B4E9",
    "paper, window 500": "#8C6D1F",
    PAPER: "#D55E00",
}
_RULES = {"paper": "#D55E00", "relative": "#0072B2"}
_GREY = "#777777"
_DENSE = 1500  # steps; of more, single ones are pixels in an SVG


def draw(summary: dict[str, Any], traces: Mapping[str, Recorded], out: Path) -> list[Path]:
    """Draw what there are traces for, beside ``out`` and named after it; their paths."""
    made = {"": of_curves(summary)}
    names = [name for name in summary["traces"] if name.startswith("cifar10-")]
    collapses = [name for name in names if summary["traces"][name]["step"] is not None]
    healthy = [name for name in names if summary["traces"][name]["fate"] == "stands" and "-n-fgsm-" in name]
    if collapses:
        # A model that was robust before shows more than one that never was.
        name = max(collapses, key=lambda each: (summary["traces"][each]["best"], each))
        made["-collapse"] = of_trace(traces[name], summary["traces"][name]["step"])
    if healthy:
        made["-healthy"] = of_trace(traces[max(healthy, key=lambda each: traces[each].steps)], None)
    paths = []
    for kind, figure in made.items():
        paths.append(out.with_name(f"{out.stem}{kind}.svg"))
        write_figure(figure, paths[-1])
    return paths


def of_curves(summary: dict[str, Any]) -> Figure:
    """Collapses on CIFAR-10 caught in time, and the median delay, against the price; and the number of samples."""
    counts = [name.startswith("cifar10-") for name in summary["collapses"]]
    figure: Figure = new_figure(figsize=(13, 4.8), layout="constrained")
    caught, delay, samples = figure.subplots(1, 3)
    for name, colour in _SHOWN.items():
        by_samples = summary["curves"][name]
        rows = [*by_samples.get("own 16", next(iter(by_samples.values()))).values()]
        _line(caught, rows, "full", [_share(row, counts) for row in rows], colour, name)
        _line(delay, rows, "false_per_1000", [_delay(row, counts) for row in rows], colour, name)
    for (label, by_threshold), colour in zip(summary["curves"][PRODUCT].items(), _SHOWN.values(), strict=False):
        rows = [*by_threshold.values()]
        label = f"{label} samples" if label.isdecimal() else "16 in a pass of their own"
        _line(samples, rows, "false_per_1000", [_delay(row, counts) for row in rows], colour, label)
    caught.set_xlabel("healthy steps with lam above 1 % of its highest (%)")
    caught.set_ylabel("collapses with an alarm before the onset (%)")
    caught.set_ylim(-4, 104)
    caught.set_title("Caught in time; E_lin on 16 samples", loc="left", fontsize=11)
    delay.set_title("Delay; E_lin on 16 samples", loc="left", fontsize=11)
    samples.set_title(f"Delay; {PRODUCT}", loc="left", fontsize=11)
    for axes in (delay, samples):
        axes.set_xscale("symlog", linthresh=0.1)
        axes.set_xlim(-0.01, 60)
        axes.set_xlabel("false alarms per 1,000 healthy steps")
        axes.axhline(0, color=_GREY, linewidth=0.8)
        axes.set_ylabel("median steps from the onset to the alarm")
    for axes in (caught, delay, samples):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    samples.legend(fontsize=8, frameon=False)
    figure.legend(*caught.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _line(
    axes: Axes, rows: Sequence[dict[str, Any]], price: str, values: Sequence[float], colour: str, label: str
) -> None:
    prices = [(100 if price == "full" else 1) * (row[price] or 0.0) for row in rows]
    axes.plot(prices, values, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)


def _share(row: dict[str, Any], counts: Sequence[bool]) -> float:
    delays = [each for each, main in zip(row["delays"], counts, strict=True) if main]
    caught: int = sum(each is not None and each < 0 for each in delays)
    return 100 * caught / max(len(delays), 1)


def _delay(row: dict[str, Any], counts: Sequence[bool]) -> float:
    """The median over the collapses; one that is missed counts as 300 steps late."""
    delays = [300 if each is None else each for each, main in zip(row["delays"], counts, strict=True) if main]
    return float(statistics.median(delays)) if delays else math.nan


def of_trace(trace: Recorded, onset_at: int | None) -> Figure:
    """E_lin, its relative size, PGD-10, and what either rule would make of lam."""
    of = signals(trace.columns, OWN_PASS)
    last = trace.steps if onset_at is None else min(trace.steps, onset_at + 400)
    first = 0 if onset_at is None else max(0, onset_at - 600)
    steps = np.arange(first, last)
    shown = slice(first, last)
    relative = mean_of(of, signal="relative", horizon=HORIZON)
    alarms = {"paper": find(PAPER).score(of) > SENSITIVITY, "relative": relative > THRESHOLD}
    labels = {"paper": f"paper's rule, {SENSITIVITY:g} std", "relative": f"relative, mean of {HORIZON} > {THRESHOLD:g}"}

    # As paths, what has a point for each step of a whole training makes an SVG of 700 kB.
    many = last - first > _DENSE
    figure: Figure = new_figure(figsize=(9, 8), layout="constrained")
    e_lin, ratio, robust, weight = figure.subplots(4, 1, sharex=True, height_ratios=(1.2, 1.2, 1, 1))
    figure.suptitle(_titled(trace.name), x=0.01, ha="left", fontsize=11)
    e_lin.semilogy(steps, of["e_lin"][shown], color=_GREY, linewidth=0.5, rasterized=many)
    e_lin.set_ylabel("E_lin, 16 samples")
    at = np.flatnonzero(alarms["paper"][shown])
    e_lin.plot(
        steps[at],
        of["e_lin"][shown][at],
        "x",
        color=_RULES["paper"],
        markersize=5,
        label=f"alarm of the {labels['paper']}",
    )
    each = {"color": _GREY, "linewidth": 0.3, "alpha": 0.7, "rasterized": many, "label": "each step"}
    ratio.plot(steps, of["relative"][shown], **each)
    mean = {"color": _RULES["relative"], "linewidth": 1.2, "rasterized": many, "label": f"mean of {HORIZON}"}
    ratio.plot(steps, relative[shown], **mean)
    ratio.axhline(THRESHOLD, color=_RULES["relative"], linestyle="--", linewidth=0.9, label="threshold")
    ratio.fill_between(
        steps, 0, 1, where=alarms["relative"][shown], step="mid", color=_RULES["relative"], alpha=0.15, label="alarm"
    )
    ratio.set_ylim(0, 1)
    ratio.set_ylabel("E_lin / (E_lin + slope²)")
    probes = trace.probes[(trace.probes[:, 0] >= first) & (trace.probes[:, 0] < last)]
    robust.plot(probes[:, 0], 100 * probes[:, 2], color="black", marker="o", markersize=2.5, linewidth=1)
    robust.set_ylim(bottom=0)
    robust.set_ylabel("PGD-10 (%)")
    for name, colour in _RULES.items():
        lam = simulated(alarms[name], GAMMAS[name])[shown]
        weight.plot(steps, lam, color=colour, linewidth=1.2, label=labels[name])
    weight.set_ylim(-0.03, 1.05)
    weight.set_ylabel("lam / lam_max,\nsimulated")
    weight.set_xlabel("step")
    for axes in (e_lin, ratio, robust, weight):
        axes.set_xlim(first, last)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if onset_at is not None:
            axes.axvline(
                onset_at, color="#C00000", linewidth=1, label="onset of the collapse" if axes is robust else None
            )
        if axes is not robust or onset_at is not None:
            axes.legend(fontsize=8, loc="best", framealpha=0.85, edgecolor="none")
    return figure


def simulated(alarms: NDArray[np.bool_], gamma: float) -> Column:
    """lam over lam_max at each step, if the alarms were to come as they are."""
    found, lam = np.zeros(len(alarms)), 0.0
    for step, alarm in enumerate(alarms.tolist()):
        lam = 1.0 if alarm else gamma * lam
        found[step] = lam
    return found


def _titled(name: str) -> str:
    """A trace's name as a figure has it."""
    data, *method, eps, _, seed = name.split("-")
    kind = {"cifar10": "CIFAR-10", "mnist": "MNIST"}.get(data, data)
    return f"{'-'.join(method).upper()} on {kind}, eps {eps.removeprefix('eps')}/255, seed {seed.removeprefix('seed')}"
