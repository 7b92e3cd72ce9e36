"""Curves of one or several runs, with collapses marked; and the style that each method has in every picture."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console

from elle_fast._core import checks
from elle_fast._core.files import write_atomically
from elle_fast.recipes.logs import History

# The methods compared most often have colours of Okabe and Ito's palette, which colour-blind readers can tell apart.
# Red is left to the marks of a collapse.
_TABLE = """
    fgsm #D55E00  rs-fgsm #E69F00  n-fgsm #CC79A7  pgd-at #000000  elle #56B4E9
    elle-a #0072B2  n-fgsm+elle-a #009E73  gradalign #8C6D1F  cure-fgsm #B5A642  llr #7F7F7F
    slat #6A51A3  fast-bat #A6761D  gat #1B7837  nuat #80B1D3  trades-single #542788
    advmixup-single #BF812D  advlc #35978F  zero-grad #F4A582  free-at #4D4D4D  elle-2p #88CCEE
"""
_COLOURS = dict(zip(_TABLE.split()[::2], _TABLE.split()[1::2], strict=True))
_OTHERS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # matplotlib's own, but for its red and grey
_MARKERS = "osD^vP*Xp<>h"


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Colour, line style and marker of each label, as matplotlib's ``plot`` takes them.

    A label begins with the name of its method, which has one colour in every picture. ``X+elle`` and ``X+elle-a``
    without a colour of their own are dashed and dash-dotted lines in that of X. Labels of one method take line styles
    in turn. All labels take markers in turn, which tell similar colours, and prints without colour, apart.
    """
    labels = [*labels] if isinstance(labels, Iterable) else labels
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"labels: expected strings, got {checks.describe(labels)}")
    found: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = {}
    others: dict[str, str] = {}
    for place, label in enumerate(labels):
        method = label.split(" ")[0]
        base, _, added = method.partition("+")
        colour = _COLOURS.get(method) or _COLOURS.get(base)
        if colour is None:
            colour = others.setdefault(method, _OTHERS[len(others) % len(_OTHERS)])
        own = method in _COLOURS or not added
        count[method] = count.get(method, -1) + 1
        line = ("-", "--", "-.", ":")[count[method] % 4] if own else "-." if added == "elle-a" else "--"
        found[label] = {"color": colour, "linestyle": line, "marker": _MARKERS[place % len(_MARKERS)]}
    return found


def plot_curves(runs: Mapping[str, History], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw accuracy in training and under PGD, E_lin (log axis) and lam of each run by epoch (:func:`write_figure`).

    All but the first and the last are of the images watched after each epoch; a run without any has no such curve.
    Histories with gradient misalignment add it, and clean accuracy. Red crosses mark the epochs in which a run is
    collapsed; red words say so of the last, or that a run was never robust. ``runs`` has the histories by label
    (:func:`styles`).
    """
    if not isinstance(runs, Mapping) or not all(isinstance(each, Mapping) for each in runs.values()):
        raise TypeError(f"runs: expected histories by label, got {checks.describe(runs)}")
    misaligned = any("misalignment" in row for history in runs.values() for row in history["epochs"])
    figure = new_figure(figsize=(14.5 if misaligned else 10, 6.4), layout="constrained")
    axes = figure.subplots(2, 3 if misaligned else 2)
    (train, watched), (linearity, weight) = axes[:, :2]
    panels: list[tuple[Any, str, Callable[[dict[str, Any]], Any]]] = [
        (train, "training accuracy,\nown attack (%)", lambda row: 100 * row["train_adv"]),
        (watched, "accuracy on watched images,\nPGD-10 (%)", lambda row: 100 * row.get("val_pgd", math.nan)),
        (linearity, "E_lin on watched images", lambda row: max(row.get("val_e_lin", math.nan), 1e-12)),
    ]
    if misaligned:
        panels += [
            (axes[0, 2], "accuracy on watched images,\nclean (%)", lambda row: 100 * row.get("val_clean", math.nan)),
            (axes[1, 2], "gradient misalignment,\nwatched images", lambda row: row.get("misalignment", math.nan)),
        ]
    linearity.set_yscale("log")
    for label, style in styles(runs).items():
        history = runs[label]
        rows = history["epochs"]
        style |= {"label": label, "linewidth": 1.8, "markevery": 0.25, "markersize": 5}
        for panel, _, value in panels:
            known = [(row["epoch"], number) for row in rows if not math.isnan(number := value(row))]
            if known:
                panel.plot(*zip(*known, strict=True), **style)
        steps = [row for row in history["steps"] if "lam" in row]
        if steps and rows:
            per_epoch = rows[-1]["step"] / rows[-1]["epoch"]
            weight.plot([row["step"] / per_epoch for row in steps], [row["lam"] for row in steps], **style)
        collapsed = [row for row in rows if row.get("collapsed")]
        if collapsed:  # an unclipped line takes room in the layout even if it is empty
            where, marks = [row["epoch"] for row in collapsed], [100 * row["val_pgd"] for row in collapsed]
            watched.plot(where, marks, "x", color="red", markersize=6, zorder=3, clip_on=False)
        last = rows[-1] if rows else {}
        if last.get("collapsed") or last.get("never_robust"):
            watched.annotate(
                f"{label} {'has collapsed' if last.get('collapsed') else 'was never robust'}",
                (last["epoch"], 100 * last["val_pgd"]),
                textcoords="offset points",
                xytext=(0, 14),
                ha="right",
                color="red",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    for panel, label, _ in [*panels, (weight, "lam", None)]:
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.set_xlim(left=0)
    train.set_ylim(0, 100)
    watched.set_ylim(bottom=0)
    if not weight.lines:
        said = "no regulariser" if any(history["steps"] for history in runs.values()) else "lam was not recorded"
        weight.text(0.5, 0.5, said, ha="center", va="center", transform=weight.transAxes)
    train.legend(edgecolor="none", framealpha=0.8)
    figure.suptitle(title)
    write_figure(figure, path)


@contextmanager
def failing_picture_is_a_warning(console: Console, what: str = "picture") -> Iterator[None]:
    """An error inside, likely another library's, is a line on the console: no reason to lose a run."""
    try:
        yield
    except Exception as error:
        said = f"warning: no {what}: {type(error).__name__}: {error}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)


def new_figure(**options: Any) -> Any:
    """A matplotlib figure, not pyplot's: no global state, and no window system is looked for.

    ``MPLBACKEND`` is kept from matplotlib's import, which fails where a notebook's backend is asked for and is not
    installed; it takes effect afterwards if it can.
    """
    if "matplotlib" not in sys.modules:
        backend = os.environ.pop("MPLBACKEND", None)
        try:
            import matplotlib
        finally:
            if backend is not None:
                os.environ["MPLBACKEND"] = backend
        if backend:
            with suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
    from matplotlib.figure import Figure

    return Figure(**options)


def write_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a matplotlib figure as a PNG or SVG file, as the name ends, atomically.

    The SVG of a figure has the same bytes each time: no date, and ids that are no random numbers.

    Raises:
        ValueError: for another ending.
    """
    import matplotlib

    place = checks.path("path", path)
    options: dict[str, Any] = {"format": "svg", "dpi": 150, "metadata": {"Date": None}, "backend": "svg"}
    if checks.choice("the path's ending", place.suffix, (".png", ".svg")) == ".png":
        options = {"format": "png", "dpi": 120, "backend": "agg"}
    with matplotlib.rc_context({"svg.hashsalt": "elle_fast"}):
        write_atomically(place, lambda file: figure.savefig(file, **options))
