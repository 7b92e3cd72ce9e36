"""How a run is doing: the numbers of its steps, the lines that show them, and when it counts as collapsed."""

from __future__ import annotations

import math
from typing import Any

# By kind of weights, the column of an epoch's row by which the best ones are chosen.
CHOSEN_BY = {"trained": "val_pgd", "averaged": "val_pgd_averaged"}
_FORMATS = {"loss": ".3f", "ce": ".3f", "e_lin": ".1e", "lam": ".4g", "penalty": ".2e", "train_adv": ".1%"}


def describe(row: dict[str, Any]) -> str:
    """The training numbers of a row of steps or epochs, in a line."""
    return "  ".join(f"{name} {row[name]:{layout}}" for name, layout in _FORMATS.items() if name in row)


def describe_epoch(row: dict[str, Any], epochs: int) -> str:
    """The line of a whole epoch."""
    said = f"epoch {row['epoch']}/{epochs}  {describe(row)}  "
    if "val_pgd" in row:
        said += f"validation clean {row['val_clean']:.1%}  FGSM {row['val_fgsm']:.1%}  PGD-10 {row['val_pgd']:.1%}  "
        if "val_pgd_averaged" in row:
            said += f"averaged {row['val_clean_averaged']:.1%}  PGD-10 {row['val_pgd_averaged']:.1%}  "
        said += f"E_lin {row['val_e_lin']:.1e}  "
    return said + f"{row['seconds']:.1f} s"


def is_collapse(train_adv: float, val_pgd: float, classes: int) -> bool:
    """Catastrophic overfitting: accuracy is far above chance under the training attack, and almost gone under PGD."""
    return train_adv > 1.5 / classes and val_pgd < 0.25 * train_adv


def is_robust(val_pgd: float, classes: int) -> bool:
    """Accuracy under PGD is above chance, by the margin of :func:`is_collapse`."""
    return val_pgd > 1.5 / classes


def best_epoch(epochs: list[dict[str, Any]], weights: str) -> int | None:
    """The number of the first epoch in which ``weights`` were most accurate under PGD-10; None if none tells."""
    rows = [row for row in epochs if CHOSEN_BY[weights] in row]
    return int(max(rows, key=lambda row: row[CHOSEN_BY[weights]])["epoch"]) if rows else None


def epochs_without_gain(epochs: list[dict[str, Any]], warmup: float) -> int:
    """The epochs since one of the kinds of weights was last better than ever under PGD-10, after eps' warm-up."""
    best = [epoch for weights in CHOSEN_BY if (epoch := best_epoch(epochs, weights)) is not None]
    return max(0, epochs[-1]["epoch"] - max(*best, math.ceil(warmup))) if best else 0


def was_robust(epochs: list[dict[str, Any]]) -> bool:
    """Whether there was an epoch with a robust model; only then can a run collapse."""
    return any(row.get("robust", True) for row in epochs)  # rows of earlier versions do not tell


def turning_point(row: dict[str, Any], earlier: list[dict[str, Any]]) -> str | None:
    """A line for an epoch in which a run collapses or recovers, given the rows of the epochs before it."""
    if row["collapsed"] == (bool(earlier) and earlier[-1]["collapsed"]):
        return None
    what, why = ("COLLAPSE", "catastrophic overfitting") if was_robust(earlier) else ("NOT ROBUST", "it never was")
    if not row["collapsed"]:
        what = "recovered" if was_robust(earlier) else "robust"
        return f"{what} in epoch {row['epoch']}: {row['val_pgd']:.1%} of the validation images under PGD-10"
    return (
        f"{what} in epoch {row['epoch']}: {row['train_adv']:.1%} of the training attack's points are classified "
        f"right, but only {row['val_pgd']:.1%} of the validation images under PGD-10 ({why})."
    )


def describe_accuracy(accuracy: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each attack of an evaluation."""
    return [
        f"{name:12s} {found['accuracy']:7.2%}  of {found['samples']} test images" for name, found in accuracy.items()
    ]


def describe_result(result: dict[str, Any]) -> list[str]:
    """A line for each attack on the last weights, and one for each other model of the run."""
    others = [
        f"{name:15s} epoch {model['epoch']}: "
        + "  ".join(f"{attack} {found['accuracy']:.2%}" for attack, found in model["accuracy"].items())
        for name, model in result["models"].items()
        if name != "last"
    ]
    return describe_accuracy(result["accuracy"]) + others
