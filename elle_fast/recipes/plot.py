"""Curves of one or several runs: in which a collapse is plain to see."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from elle_fast.recipes.files import write_atomically
from elle_fast.recipes.logs import History

# One colour per method in every picture, from a palette that colour-blind readers can tell apart (Okabe and Ito).
_COLOURS = {
    "fgsm": "#D55E00",
    "rs-fgsm": "#E69F00",
    "n-fgsm": "#CC79A7",
    "pgd": "#000000",
    "elle": "#56B4E9",
    "elle-a": "#0072B2",
    "n-fgsm+elle-a": "#009E73",
}


def plot_curves(runs: Mapping[str, History], path: Path, *, title: str) -> None:
    """Draw accuracy in training and under PGD, E_lin (log axis) and lam against epochs, and write a PNG.

    Epochs in which a run is collapsed are marked with red crosses.

    Args:
        runs: histories by label; a label that names a method has that method's colour.
        path: of the picture.
        title: above it.
    """
    # Figure, not pyplot: no global state, and no window system is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (train, test), (linearity, weight) = figure.subplots(2, 2)
    for label, history in runs.items():
        rows = history["epochs"]
        epochs = [row["epoch"] for row in rows]
        style = {"color": _COLOURS.get(label), "label": label, "linewidth": 1.8}
        train.plot(epochs, [100 * row["train_adv"] for row in rows], **style)
        test.plot(epochs, [100 * row["test_pgd"] for row in rows], **style)
        linearity.semilogy(epochs, [max(row["test_e_lin"], 1e-12) for row in rows], **style)
        steps = [row for row in history["steps"] if "lam" in row]
        if steps and rows:
            per_epoch = rows[-1]["step"] / rows[-1]["epoch"]
            weight.plot([row["step"] / per_epoch for row in steps], [row["lam"] for row in steps], **style)
        collapsed = [row for row in rows if row["collapsed"]]
        marks = [100 * row["test_pgd"] for row in collapsed]
        test.plot([row["epoch"] for row in collapsed], marks, "x", color="red", markersize=4, zorder=3)
        if rows and rows[-1]["collapsed"]:
            test.annotate(
                f"{label} has collapsed",
                (rows[-1]["epoch"], marks[-1]),
                textcoords="offset points",
                xytext=(0, 14),
                ha="right",
                color="red",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    labels = (
        (train, "training accuracy, own attack (%)"),
        (test, "test accuracy, PGD-10 (%)"),
        (linearity, "E_lin on test images"),
        (weight, "lam"),
    )
    for axes, label in labels:
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    train.set_ylim(0, 100)
    test.set_ylim(bottom=0)
    if not weight.lines:
        weight.text(0.5, 0.5, "no regulariser", ha="center", va="center", transform=weight.transAxes)
    train.legend(frameon=False)
    figure.suptitle(title)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
