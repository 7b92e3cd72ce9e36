"""The figures of paper.py, re-drawn from the paper's; each is a function of the summary JSON alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.paper.metrics import FORM
from benchmarks.paper.tables import Run, groups, step_ms, variant
from elle_fast.recipes.plot import new_figure, plot_curves, styles, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn instead of all variants where those could not be told apart.
CURVES = ("fgsm", "n-fgsm", "gradalign", "elle", "elle-a", "n-fgsm+elle-a", "pgd-at")
_MANY = 12
_ATTACK, _STRONGEST = "pgd-20", "autoattack"


def draw(summary: dict[str, Any], out: Path) -> list[Path]:
    """Draw every figure that the summary has the numbers for, beside ``out`` and named after it; their paths."""
    drawn = [path for eps in _eps(summary) if (path := curves(summary, eps, _beside(out, _which(summary, eps))))]
    figures: list[tuple[str, Callable[[dict[str, Any]], Figure | None]]] = [
        ("robust", accuracy_against_eps),
        ("time", time_against_accuracy),
        ("lam", lam_over_time),
        ("forms", forms_of_e_lin),
    ]
    for name, make in figures:
        figure = make(summary)
        if figure is not None:
            path = _beside(out, f"-{name}")
            write_figure(figure, path)
            drawn.append(path)
    return drawn


def curves(summary: dict[str, Any], eps: float, path: Path) -> Path | None:
    """The paper's Fig. 2: accuracies, E_lin, lam and gradient misalignment by epoch, of the first seed at one eps."""
    runs = _first_seed(summary, eps)
    if not runs:
        return None
    if len(runs) > _MANY:
        runs = [run for run in runs if variant(run) in CURVES] or runs
    seed = runs[0]["seed"]
    histories = {variant(run): {"epochs": run["epochs"], "steps": run.get("steps", [])} for run in runs}
    plot_curves(histories, path, title=f"{summary['note']}; eps {_label(eps)}, seed {seed}")
    return path


def accuracy_against_eps(summary: dict[str, Any]) -> Figure | None:
    """The paper's Fig. 3, and its Figs. 8 and 18b: PGD-20 against eps, mean and range over the seeds.

    Where a run has collapsed there is a red cross. Variants that have a single eps are left out.
    """
    if len(_eps(summary)) < 2:
        return None
    by_variant: dict[str, list[tuple[float, list[Run]]]] = {}
    for eps, name, runs in groups(summary):
        by_variant.setdefault(name, []).append((eps, runs))
    by_variant = {name: found for name, found in by_variant.items() if len(found) > 1}
    if not by_variant:
        return None
    figure, (axes,) = _figure(summary, 1)
    style = styles(by_variant)
    for name, found in by_variant.items():
        points = [
            (255 * eps, [100 * run["accuracy"][_ATTACK]["accuracy"] for run in runs], runs)
            for eps, runs in sorted(found, key=lambda each: each[0])
        ]
        means = [statistics.mean(values) for _, values, _ in points]
        epsilons = [eps for eps, _, _ in points]
        axes.plot(epsilons, means, **style[name], label=name, linewidth=1.8, markersize=5)
        lows, highs = ([extreme(values) for _, values, _ in points] for extreme in (min, max))
        axes.fill_between(epsilons, lows, highs, color=style[name]["color"], alpha=0.12)
        fallen = [
            (eps, value)
            for eps, values, runs in points
            for value, run in zip(values, runs, strict=True)
            if run["collapsed"]
        ]
        if fallen:  # an unclipped line takes room in the layout even if it is empty
            axes.plot(*_columns(fallen), "x", color="red", markersize=9, markeredgewidth=2, zorder=4, clip_on=False)
    axes.plot([], [], "x", color="red", markeredgewidth=2, label="a run that collapsed")
    axes.set_xticks([255 * eps for eps in _eps(summary)])
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("eps, in 1/255")
    axes.set_ylabel("test accuracy, PGD-20 (%)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def time_against_accuracy(summary: dict[str, Any]) -> Figure | None:
    """The paper's Fig. 1: seconds of an epoch against accuracy at the eps with most variants, of the first seed.

    If the summary has ``step_times``: milliseconds of a step instead, for the variants in it. The accuracy is under
    AutoAttack (filled) if the run has that, else under PGD-20 (hollow), the weaker attack.
    """
    eps = max(_eps(summary), key=lambda eps: len(_first_seed(summary, eps)))
    runs = _first_seed(summary, eps)
    if len(runs) < 2:
        return None
    figure, (axes,) = _figure(summary, 1, title=f"eps {_label(eps)}, seed {runs[0]['seed']}", width=9.5)
    style = styles(variant(run) for run in runs)
    timed = "step_times" in summary
    for run in runs:
        time = step_ms(summary, variant(run)) if timed else statistics.median(row["seconds"] for row in run["epochs"])
        if time is None:
            continue
        look = style[variant(run)]
        strong = (run.get("strong") or {}).get("accuracy", {})
        accuracy = strong.get(_STRONGEST) or run["accuracy"][_ATTACK]
        axes.plot(
            time,
            100 * accuracy["accuracy"],
            linestyle="none",
            marker=look["marker"],
            color=look["color"],
            markersize=9,
            fillstyle="full" if _STRONGEST in strong else "none",
            markeredgecolor="red" if run["collapsed"] else look["color"],
            markeredgewidth=1.8,
            label=variant(run),
            clip_on=False,
            zorder=3,
        )
    axes.set_title("filled: AutoAttack; hollow: PGD-20; red edge: collapsed", fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter("{x:.3g}")
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("milliseconds of a step, median, all in turns" if timed else "seconds of an epoch, median")
    axes.set_ylabel("test accuracy (%)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(runs) // 20)
    return figure


def lam_over_time(summary: dict[str, Any]) -> Figure | None:
    """The paper's Fig. 9: lam of the adaptive variants in training, of the first seed, a panel for each eps.

    Variants that have fewer eps than others are left out.
    """
    panels = [(eps, [run for run in _first_seed(summary, eps) if _adapts(run)]) for eps in _eps(summary)]
    count = Counter(variant(run) for _, runs in panels for run in runs)
    most = max(count.values(), default=0)
    panels = [(eps, [run for run in runs if count[variant(run)] == most]) for eps, runs in panels]
    panels = [(eps, runs) for eps, runs in panels if runs]
    if not panels:
        return None
    figure, every = _figure(summary, len(panels))
    style = styles(dict.fromkeys(variant(run) for _, runs in panels for run in runs))
    for axes, (eps, runs) in zip(every, panels, strict=True):
        for run in runs:
            per_epoch = run["epochs"][-1]["step"] / run["epochs"][-1]["epoch"]
            epochs = [row["step"] / per_epoch for row in run["steps"]]
            look = {**style[variant(run)], "marker": ""}
            axes.plot(epochs, [row["lam"] for row in run["steps"]], **look, label=variant(run), linewidth=1.2)
        axes.set_title(f"eps {_label(eps)}")
        axes.set_xlabel("epoch")
    every[0].set_ylabel("lam")
    every[0].legend(frameon=False, fontsize=8)
    return figure


def forms_of_e_lin(summary: dict[str, Any]) -> Figure | None:
    """The paper's Fig. 18a: E_lin in other forms by epoch of FGSM training, of the first seed, a panel for each eps."""
    panels = [(eps, run) for eps in _eps(summary) for run in _first_seed(summary, eps) if variant(run) == "fgsm"]
    panels = [(eps, run) for eps, run in panels if any(name.startswith(FORM) for name in run["epochs"][-1])]
    if not panels:
        return None
    figure, every = _figure(summary, len(panels), title="FGSM training")
    for axes, (eps, run) in zip(every, panels, strict=True):
        rows = [row for row in run["epochs"] if any(name.startswith(FORM) for name in row)]
        epochs = [row["epoch"] for row in rows]
        for name in (name for name in rows[0] if name.startswith(FORM)):
            axes.semilogy(epochs, [max(row[name], 1e-12) for row in rows], label=name.removeprefix(FORM))
        for row in rows:
            if row["collapsed"]:
                axes.axvspan(row["epoch"] - 0.5, row["epoch"] + 0.5, color="red", alpha=0.1, linewidth=0)
        axes.set_title(f"eps {_label(eps)}; red: collapsed")
        axes.set_xlabel("epoch")
    every[0].set_ylabel("E_lin on watched images")
    every[0].legend(frameon=False, fontsize=8)
    return figure


def _figure(
    summary: dict[str, Any], panels: int, *, title: str | None = None, width: float = 7.5
) -> tuple[Figure, Sequence[Axes]]:
    figure = new_figure(figsize=(width if panels == 1 else 1 + 4 * panels, 5), layout="constrained")
    every = list(figure.subplots(1, panels, squeeze=False, sharey=True)[0])
    for axes in every:
        axes.grid(alpha=0.3)
    figure.suptitle("; ".join(part for part in (summary["note"], title) if part))
    return figure, every


def _eps(summary: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(run["config"]["eps"] for run in summary["runs"]))


def _first_seed(summary: dict[str, Any], eps: float) -> list[Run]:
    first = min((run["seed"] for run in summary["runs"]), default=0)
    return [run for run in summary["runs"] if run["config"]["eps"] == eps and run["seed"] == first]


def _adapts(run: Run) -> bool:
    return bool(run.get("steps")) and (run["method"] == "elle-a" or run["method"].endswith("+elle-a"))


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _beside(out: Path, suffix: str) -> Path:
    return out.with_name(f"{out.stem}{suffix}.svg")


def _which(summary: dict[str, Any], eps: float) -> str:
    # The eps of the whole setting, so that a picture's name does not depend on how much is done.
    return f"-eps{255 * eps:.3g}" if len(summary.get("eps", _eps(summary))) > 1 else ""


def _label(eps: float) -> str:
    return f"{255 * eps:.3g}/255"
