"""The tables of README and docs that are drawn from the files of the studies.

Accuracies are in per cent: mean and, in brackets, lowest to highest over the seeds; of one seed, that one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.harness.tables import markdown, spread
from benchmarks.tables.table import Table

Row = dict[str, Any]


def beyond_images(content: dict[str, Any]) -> str:
    """A line for each kind of data: accuracy under PGD after each method."""
    methods = list(dict.fromkeys(run["method"] for run in content["runs"]))
    lines = []
    for example, label in (("tabular", "table"), ("tokens", "tokens")):
        found = [[run["pgd"] for run in content["runs"] if _has(run, example=example, method=each)] for each in methods]
        lines.append((label, *map(spread, found)))
    return markdown(["", *methods], lines)


_CELLS = {
    "tabular": "table",
    "tokens": "tokens",
    "digits": "digits 0.3",
    "mnist": "MNIST 0.3",
    **{f"cifar10-{eps}": f"CIFAR-10 {eps}/255" for eps in (8, 16, 26)},
}
_LAMS = {"fgsm": "FGSM", "tuned": "ELLE-A, lam tuned", "slope 50": "`auto`, rho 50", "slope 30": "rho 30"}


def auto_lam(content: dict[str, Any]) -> str:
    """A line for each cell: PGD-20 of each way to choose lam; a run that ended in NaN counts as 0."""
    lines = []
    for cell, label in _CELLS.items():
        found = {
            each: [row for row in content["rows"].values() if _has(row, cell=cell, variant=each)] for each in _LAMS
        }
        if not any(found.values()):
            continue
        texts = [spread([row.get("pgd-20", 0.0) for row in rows]) for rows in found.values()]
        texts += [spread([row.get("clean", 0.0) for row in found[each]]) for each in ("tuned", "slope 50")]
        lines.append((label, ", ".join(str(len(rows)) for rows in found.values()), *texts))
    return markdown(["", "seeds", *_LAMS.values(), "clean, tuned", "clean, rho 50"], lines)


_ENDED = {"stands": "stand", "collapsed": "collapsed", "chance": "at chance", "nan": "NaN"}
_ONE = {"stands": "stands"}


def gradient_bound(content: dict[str, Any]) -> str:
    """How the seeds ended at each bound, and PGD-20, lowest to highest, of those that stand."""
    rows = list(content["rows"].values())
    columns = [("elle", 4000.0), ("elle", 20000.0), ("elle-a", 4000.0), ("elle-a", 20000.0)]
    bounds = sorted({row["max_ratio"] for row in rows}, key=lambda each: -float("inf") if each is None else -each)
    lines = []
    for bound in bounds:
        groups = [[row for row in rows if _has(row, method=m, lam=lam, max_ratio=bound)] for m, lam in columns]
        lines.append(("none" if bound is None else f"{bound:g}", *map(_fates, groups)))
    head = [f"{'ELLE-A, lam_max' if method == 'elle-a' else 'ELLE, lam'} {lam:,.0f}" for method, lam in columns]
    return markdown(["`max_ratio`", *head], lines)


def _fates(rows: Sequence[Row]) -> str:
    said = []
    for ended, several in _ENDED.items():
        found = [row for row in rows if row["ended"] == ended]
        text = f"{len(found)} {_ONE.get(ended, several) if len(found) == 1 else several}"
        if found and ended == "stands":
            pgd = sorted({f"{100 * row['pgd-20']:.0f}" for row in found}, key=float)
            text += f" (PGD-20 {' to '.join(dict.fromkeys((pgd[0], pgd[-1])))} %)"
        said += [text] if found else []
    return ", ".join(said) or "-"


_ATTACKS = {
    "pgd-20": ("PGD-20", "foolbox", "foolbox"),
    "pgd-50-10": ("PGD-50-10", "foolbox", "foolbox"),
    "autoattack": ("AutoAttack", "pyautoattack", "pyautoattack, which `autoattack` calls"),
}


def foreign_attacks(content: dict[str, Any]) -> str:
    """Accuracy and time under our attacks over the libraries' own calls."""
    lines = []
    for name, row in content["attacks"].items():
        label, library, called = _ATTACKS[name]
        ours, theirs = (100 * row["accuracy"][each] for each in ("elle_fast", library))
        differing = row["differing_samples"]
        lines.append(
            (label, called, str(row["samples"]), f"{ours:.1f} / {theirs:.1f}", f"{differing}", f"{row['ratio']:.2f}")
        )
    head = ["attack", "library", "images", "accuracy here / there, %", "images that differ", "time here / there"]
    return markdown(head, lines)


# By the way's name in the file, what README calls it. With triplets in fp32 inside bf16 the numbers are fp32's.
_WAYS = {
    "bf16, triplets fp32": 'fp32, also inside bf16 (`triplet_precision="fp32"`)',
    "bf16, triplets fp16": "bf16 with triplets in fp16",
    "bf16": "bf16",
    "bf16, points too": "bf16, points in bf16 too",
    "bf16, last layer fp32": "bf16, but the last layer in fp32",
    "bf16, products of differences": "bf16 products of the points' differences",
    "bf16, twice the ball": "bf16, x_a and x_b from twice the ball",
    "bf16, two triplets": "bf16, two triplets a sample",
    "bf16, two roundings": "bf16, the product of two passes' residuals",
}
_MODELS = (
    ("n-fgsm+elle-a, eps 8/255, seed 0", "N-FGSM+ELLE-A"),
    ("elle-a, eps 16/255, seed 0", "ELLE-A"),
    ("fgsm, eps 16/255, seed 0", "FGSM"),
)


def precision(content: dict[str, Any], samples: int = 128) -> str:
    """What rounding makes of E_lin where it is 0, and the smallest rise that is seen, on so many samples a batch."""
    found = {(row["run"], row["precision"]): row for row in content["rows"] if row["samples"] == samples}
    lines = []
    for way, label in _WAYS.items():
        rows = [found[run, way] for run, _ in _MODELS]
        cells = [text for row in rows for text in (_short(row["floor"]), _seen(row))]
        times = [f"{row['e_lin'] / found[row['run'], 'fp32']['e_lin']:.0f}" for row in rows[:-1]]
        larger = f" (E_lin {' and '.join(times)} times as large)" if way.endswith("the ball") else ""
        lines.append((label + larger, *cells[:-1]))  # of FGSM, which has collapsed, no rise is meant to be seen
    head = [text for _, name in _MODELS for text in (f"floor, {name}", "seen")]
    return markdown(["triplets' forward pass", *head[:-1]], lines)


def _seen(row: Row) -> str:
    return "never" if row["seen"] is None else _short(row["seen"])


def precision_training(content: dict[str, Any]) -> str:
    """A line for each precision, with the number of each seed."""
    rows = list(content["rows"].values())
    shown: dict[str, Callable[[Row], str]] = {
        "clean": lambda row: f"{100 * row['accuracy']['last']['clean']:.1f}",
        "PGD-20": lambda row: f"{100 * row['accuracy']['last']['pgd-20']:.1f}",
        "median E_lin as measured": lambda row: _short(row["e_lin"]),
        "full steps, %": lambda row: f"{100 * row['full_share']:.0f}",
    }
    lines = []
    for name in content["precisions"]:
        group = sorted((row for row in rows if row["precision"] == name), key=lambda row: int(row["seed"]))
        cells = [", ".join("NaN" if row["ended"] == "nan" else text(row) for row in group) for text in shown.values()]
        robust = [100 * row["accuracy"]["last"]["pgd-20"] for row in group if row["ended"] != "nan"]
        cells.append(f"{statistics.mean(robust):.1f}" if robust else "-")
        lines.append((name, *cells))
    return markdown(["", *shown, "mean PGD-20"], lines)


def _short(value: float) -> str:
    """As 5.2e-7."""
    return f"{value:.1e}".replace("e-0", "e-")


def _has(row: Row, **wanted: Any) -> bool:
    return all(row[name] == value for name, value in wanted.items())


TABLES = {
    "beyond-images": Table("beyond_images.json", beyond_images),
    "auto-lam": Table("auto_lam.json", auto_lam),
    "gradient-bound": Table("gradient_bound_mnist.json", gradient_bound),
    "foreign-attacks": Table("foreign_attacks.json", foreign_attacks),
    "precision": Table("precision.json", precision),
    "precision-training": Table("precision_training.json", precision_training),
}
