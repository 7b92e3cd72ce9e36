"""The picture of one rescued training: PGD-10 on validation images over its steps, with and without the guard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.guard.judged import ROBUST
from benchmarks.harness.rows import Row, Rows
from elle_fast.recipes.plot import new_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_GUARDED, _ALONE, _GREY = "#0072B2", "#D55E00", "#777777"
_NAMES = {"fgsm": "FGSM", "rs-fgsm": "RS-FGSM", "n-fgsm": "N-FGSM", "zero-grad": "ZeroGrad", "slat": "SLAT"}


def draw(rows: Rows, out: Path) -> Path | None:
    """Draw the training that the guard gains most, beside ``out`` and named after it; its path, if there is one."""
    if (row := chosen(rows)) is None:
        return None
    path = out.with_suffix(".svg")
    write_figure(of_rescue(row), path)
    return path


def chosen(rows: Rows) -> Row | None:
    """The training, collapsed without the guard and standing with it, with the largest gain under PGD-50-10.

    One that was robust before it collapsed comes first.
    """
    rescued = [
        row
        for row in rows.values()
        if row["judged"]["fallen_alone"] and not row["judged"]["fallen"] and isinstance(row["alone"], dict)
    ]
    return max(rescued, key=lambda row: (row["judged"]["fate"] == "lost", _gain(row)), default=None)


def _gain(row: Row) -> float:
    after: float = row["guarded"]["accuracy"][ROBUST]
    return after - float(row["alone"]["accuracy"].get(ROBUST, 0.0))


def of_rescue(row: Row) -> Figure:
    """Both runs, the alarms, and what was gone back to."""
    figure: Figure = new_figure(figsize=(8, 4.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    first = row["guarded"]["alarms"][0]["step"]
    for name, run, colour in (
        ("without the guard", row["alone"], _ALONE),
        ("with the guard", row["guarded"], _GUARDED),
    ):
        label = f"{name}: {100 * run['accuracy'].get(ROBUST, 0.0):.1f} % under PGD-50-10 at the end"
        steps, robust = _series(run)
        axes.plot(steps, robust, color=colour, linewidth=2, label=label)
    steps, robust = _series(row["guarded"])
    shared = [(step, value) for step, value in zip(steps, robust, strict=True) if step <= first]
    if shared:  # until then there is one training
        axes.plot(*zip(*shared, strict=True), color=_GREY, linewidth=2.4, label="until the first alarm")
    top = 1.12 * max([*robust, *_series(row["alone"])[1]])
    for number, alarm in enumerate(row["guarded"]["alarms"]):
        axes.axvline(alarm["step"], color=_GUARDED, linewidth=1, linestyle="--", label=None if number else "alarm")
        if alarm["back_to"] is not None and number == 0:
            text = f"alarm in step {alarm['step']}:\nback to step {alarm['back_to']}"
            place = (alarm["step"], top)
            axes.annotate(text, place, xytext=(6, -4), textcoords="offset points", va="top", fontsize=9, color=_GUARDED)
    axes.set_ylim(0, 1.02 * top)
    axes.set_xlim(0, steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("PGD-10 on validation images (%)")
    axes.set_title(f"{_NAMES.get(row['method'], row['method'])}, {row['eps']}/255, seed {row['seed']}", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def _series(run: dict[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    return [probe[0] for probe in run["probes"]], [100 * probe[2] for probe in run["probes"]]
