"""The tables of README and docs that are drawn from the grid's files, and from those of the queue of evidence.

Accuracies are in per cent: mean and, in brackets, lowest to highest over the seeds; of one seed, that one.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.harness.tables import markdown, spread
from benchmarks.paper.tables import BASE, Run, groups, step_ms, variant
from benchmarks.tables.table import Table

_NAMES = {"clean": "clean", "fgsm": "FGSM", "pgd-20": "PGD-20", "pgd-50-10": "PGD-50-10", "autoattack": "AutoAttack"}
_PGD, _STRONG = "pgd-20", ("pgd-50-10", "autoattack")
# How the options of these variants are written in Python.
_LEVERS = {
    "fgsm": "FGSM",
    "elle-a": "ELLE-A, Algorithm 1",
    "skip": "`skip_below=0.01`",
    "eighth": "`triplet_fraction=0.125`",
    "fast": "both: `fast`",
    "split": '`forward="split"`',
    "lagged": "`lagged=True`",
    "checkpoint": '`forward="checkpoint"`',
}


def digits(summary: dict[str, Any]) -> str:
    """A line for each method; with the stronger attacks, if any run has them."""
    attacks = list(summary["runs"][0]["accuracy"])
    stronger = [name for name in _STRONG if any(run.get("strong") for run in summary["runs"])]
    lines = []
    for _, name, runs in groups(summary):
        columns = [[run["train_adv"] for run in runs], *(_accuracies(runs, attack) for attack in attacks)]
        lines.append((name, *map(spread, columns), *(_strong(runs, each) for each in stronger), _collapsed(runs)))
    heads = [f"test {_NAMES.get(each, each)}" for each in (*attacks, *stronger)]
    return markdown(["method", "train, own attack", *heads, "collapsed"], lines)


def robust(summary: dict[str, Any]) -> str:
    """PGD-20 at each eps of the variants that were trained at all of them with several seeds."""
    lines = []
    for name in _variants(summary):
        by_eps = [_runs(summary, name, eps) for eps in summary["eps"]]
        if all(len(runs) > 1 for runs in by_eps):
            cells = [text for runs in by_eps for text in (spread(_accuracies(runs, _PGD)), _collapsed(runs))]
            lines.append((name, *cells))
    head = [text for eps in summary["eps"] for text in (f"{_eps(eps)} {_NAMES[_PGD]}", "collapsed")]
    return markdown(["", *head], lines)


def stronger(summary: dict[str, Any]) -> str:
    """Stronger attacks at each eps; the last column says at which eps gradients look masked."""
    lines = []
    for name in _variants(summary):
        found = {eps: [run for run in _runs(summary, name, eps) if run.get("strong")] for eps in summary["eps"]}
        if any(found.values()):
            cells = [_strong(runs, attack) for runs in found.values() for attack in _STRONG]
            said = {eps: [run["strong"]["masking"]["verdict"] for run in runs] for eps, runs in found.items() if runs}
            masked = [f"{each} at {_eps(eps)}" for eps, verdicts in said.items() for each in verdicts if each != "ok"]
            lines.append((name, *cells, ", ".join(masked) or "ok"))
    head = [f"{_eps(eps)} {_NAMES[attack]}" for eps in summary["eps"] for attack in _STRONG]
    return markdown(["", *head, "gradients"], lines)


def methods(summary: dict[str, Any], eps: float = 16 / 255) -> str:
    """Every variant's first seed at an eps, and the time of its step over FGSM's; in two columns."""
    cells = []
    for name in _variants(summary):
        runs = _runs(summary, name, eps)[:1]
        if runs:
            pgd = spread(_accuracies(runs, _PGD)) + (", collapsed" if runs[0]["collapsed"] else "")
            cells.append((name, spread(_accuracies(runs, "clean")), pgd, _step(summary, name)))
    half = (len(cells) + 1) // 2
    right = [*cells[half:], ("", "", "", "")][:half]
    head = ["", "clean", _NAMES[_PGD], "step"]
    return markdown([*head, *head], [(*one, *other) for one, other in zip(cells[:half], right, strict=True)])


def levers(summary: dict[str, Any]) -> str:
    """Clean and PGD-20 at each eps, for what makes a step cheaper."""
    lines = []
    for name in _variants(summary):
        by_eps = [_runs(summary, name, eps) for eps in summary["eps"]]
        cells = [spread(_accuracies(runs, attack)) for runs in by_eps for attack in ("clean", _PGD)]
        lines.append((_LEVERS[name], *cells, _collapsed(by_eps[-1])))
    head = [f"{_eps(eps)} {_NAMES[attack]}" for eps in summary["eps"] for attack in ("clean", _PGD)]
    return markdown(["", *head, f"collapsed at {_eps(summary['eps'][-1])}"], lines)


def at_eps(summary: dict[str, Any], eps: float) -> str:
    """PGD-20, the stronger attacks, whether gradients look masked, and the epochs that were collapsed; first seed."""
    lines = []
    for name in _variants(summary):
        for run in _runs(summary, name, eps)[:1]:
            strong = [_strong([run], attack) for attack in _STRONG]
            verdict = (run.get("strong") or {}).get("masking", {}).get("verdict", "-")
            fallen = _spans([row["epoch"] for row in run["epochs"] if row["collapsed"]])
            lines.append((name, spread(_accuracies([run], _PGD)), *strong, verdict, fallen))
    head = [f"eps {eps:g}", _NAMES[_PGD], *(_NAMES[attack] for attack in _STRONG), "gradients", "epochs collapsed"]
    return markdown(head, lines)


def trainings(summary: dict[str, Any]) -> str:
    """All that is done of long trainings: the last weights under all attacks, then the best and the averaged ones.

    "best" is the checkpoint with the highest PGD-10 accuracy on validation images, "averaged" the weights' average; of
    both PGD-50-10 is shown where it was made, else PGD-20 in brackets.
    """
    attacks = ("clean", _PGD, *_STRONG)
    lines = []
    for eps, name, runs in groups(summary):
        shares = [run["full_share"] for run in runs if run.get("full_share") is not None]
        seeds = ", ".join(str(run["seed"]) for run in runs)
        cells = [spread(_accuracies(runs, attack)) for attack in attacks[:2]]
        cells += [_strong(runs, attack) for attack in _STRONG]
        cells += [_other(runs, model) for model in ("best", "averaged")]
        cells.append(f"{100 * statistics.mean(shares):.0f} %" if shares else "-")
        lines.append((_eps(eps), name, seeds, *cells, _collapsed(runs)))
    head = ["eps", "", "seeds", *(_NAMES[attack] for attack in attacks), "best", "averaged", "full steps", "collapsed"]
    return markdown(head, lines)


# ---- Cells


def _variants(summary: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(variant(run) for run in summary["runs"]))


def _runs(summary: dict[str, Any], name: str, eps: float) -> list[Run]:
    return [run for run in summary["runs"] if variant(run) == name and abs(run["config"]["eps"] - eps) < 1e-9]


def _eps(eps: float) -> str:
    return f"{255 * eps:.3g}/255"


def _accuracies(runs: Sequence[Run], attack: str) -> list[float]:
    return [run["accuracy"][attack]["accuracy"] for run in runs]


def _strong(runs: Sequence[Run], attack: str) -> str:
    """Of those that were attacked."""
    found = [(run.get("strong") or {}).get("accuracy", {}).get(attack) for run in runs]
    return spread([each["accuracy"] for each in found if each is not None])


def _other(runs: Sequence[Run], model: str) -> str:
    """The accuracy of other weights of the runs than the last."""
    strong = [(run.get("strong") or {}).get("models", {}).get(model) for run in runs]
    if all(strong):
        return spread([each[_STRONG[0]]["accuracy"] for each in strong])
    weak = [run["models"][model]["accuracy"][_PGD]["accuracy"] for run in runs if model in run.get("models", {})]
    return f"({spread(weak)})" if weak else "-"


def _collapsed(runs: Sequence[Run]) -> str:
    return f"{sum(run['collapsed'] for run in runs)} of {len(runs)}" if runs else "-"


def _step(summary: dict[str, Any], name: str) -> str:
    ms = [step_ms(summary, each) for each in (name, BASE)]
    return "-" if ms[0] is None or ms[1] is None else f"{ms[0] / ms[1]:.2f}"


def _spans(epochs: Sequence[int]) -> str:
    """As "2 to 4, 7"."""
    spans: list[list[int]] = []
    for epoch in epochs:
        if spans and spans[-1][1] == epoch - 1:
            spans[-1][1] = epoch
        else:
            spans.append([epoch, epoch])
    return ", ".join(f"{one}" if one == other else f"{one} to {other}" for one, other in spans) or "none"


TABLES = {
    "digits": Table("digits.json", digits),
    "cifar10-small": Table("cifar10-small.json", robust),
    "cifar10-small-strong": Table("cifar10-small.json", stronger),
    "cifar10-small-methods": Table("cifar10-small.json", methods),
    "cifar10-levers": Table("cifar10-jpeg-levers.json", levers),
    "cifar10-medium": Table("cifar10-medium.json", trainings),
    "mnist": Table("mnist-small.json", partial(at_eps, eps=0.3)),
}
