"""How a run is doing: the numbers of its steps, the lines that show them, and when it counts as collapsed."""

from __future__ import annotations

import math
from typing import Any

from elle_fast._core.collapse import is_robust, least

# By kind of weights, the column of an epoch's row by which the best ones are chosen.
CHOSEN_BY = {"trained": "val_pgd", "averaged": "val_pgd_averaged"}
_DECEIVED = 0.25  # of the accuracy under the training attack, below which PGD's says that the attack is no measure
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


def is_deceived(train_adv: float, val_pgd: float, classes: int) -> bool:
    """Whether accuracy is above 1.5 times chance under the training attack, and less than a quarter of it under PGD."""
    return is_robust(train_adv, classes) and val_pgd < _DECEIVED * train_adv


def verdict(row: dict[str, Any], earlier: list[dict[str, Any]], samples: int, classes: int) -> dict[str, bool]:
    """What an epoch's row says of the model, given those before it and the number of validation images.

    ``robust``: PGD-10's accuracy is above 1.5 times chance. ``collapsed``: it has fallen below
    :func:`~elle_fast._core.collapse.least` of the best so far. ``never_robust``: no epoch was robust, and the training
    attack deceives, as in :func:`is_deceived`.

    All follow from the rows, so a resumed run judges as one that was not interrupted.
    """
    train_adv, val_pgd = row["train_adv"], row["val_pgd"]
    best = max((each["val_pgd"] for each in _measured(earlier, "val_pgd")), default=0.0)
    deceived = is_deceived(train_adv, val_pgd, classes)
    return {
        "robust": is_robust(val_pgd, classes),
        "collapsed": val_pgd < least(best, samples, classes),
        "never_robust": deceived and not is_robust(max(best, val_pgd), classes),
    }


def best_epoch(epochs: list[dict[str, Any]], weights: str) -> int | None:
    """The number of the first epoch in which ``weights`` were most accurate under PGD-10; None if none tells."""
    rows = _measured(epochs, CHOSEN_BY[weights])
    return int(max(rows, key=lambda row: row[CHOSEN_BY[weights]])["epoch"]) if rows else None


def _measured(epochs: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows with that accuracy; it is NaN of weights that are not finite."""
    return [row for row in epochs if not math.isnan(row.get(name, math.nan))]


def epochs_without_gain(epochs: list[dict[str, Any]], warmup: float) -> int:
    """The epochs since one of the kinds of weights was last better than ever under PGD-10, after eps' warm-up."""
    best = [epoch for weights in CHOSEN_BY if (epoch := best_epoch(epochs, weights)) is not None]
    return max(0, epochs[-1]["epoch"] - max(*best, math.ceil(warmup))) if best else 0


def turning_point(row: dict[str, Any], earlier: list[dict[str, Any]]) -> str | None:
    """A line for an epoch in which a run collapses, recovers, or turns out robust or not, given the rows before it."""
    was_collapsed = bool(earlier) and earlier[-1]["collapsed"]
    deceived, robust = (any(each.get(name) for each in earlier) for name in ("never_robust", "robust"))
    epoch, left = f"in epoch {row['epoch']}", f"{row['val_pgd']:.1%} of the validation images"
    own = f"{row['train_adv']:.1%} of the training attack's points are classified right"
    if row["collapsed"] and not was_collapsed:
        best = max(_measured(earlier, "val_pgd"), key=lambda each: each["val_pgd"])
        why = f", while {own} (catastrophic overfitting)" if row["val_pgd"] < _DECEIVED * row["train_adv"] else ""
        was = f"{best['val_pgd']:.1%} in epoch {best['epoch']}"
        return f"COLLAPSE {epoch}: {left} withstand PGD-10, after {was}{why}."
    if row["never_robust"] and not deceived:
        return f"NOT ROBUST {epoch}: {own}, but only {left} withstand PGD-10, and never more than chance."
    if was_collapsed and not row["collapsed"]:
        return f"recovered {epoch}: {left} withstand PGD-10"
    if row["robust"] and deceived and not robust:
        return f"robust {epoch}: {left} withstand PGD-10"
    return None


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
