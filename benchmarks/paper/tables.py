"""The tables of paper.py, each a function of the summary JSON."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.harness.tables import markdown, spread

BASE, DOUBLE = "fgsm", "gradalign"  # times are compared with theirs
# Variants with another name in bench_step.py. A full step is the more expensive one.
_STEPS = {"elle-a fast": "elle-a-fast-full"}

Run = dict[str, Any]


def variant(run: Run) -> str:
    """Its name; older files name the method instead."""
    return str(run["variant"] if "variant" in run else run["method"])


def groups(summary: dict[str, Any]) -> list[tuple[float, str, list[Run]]]:
    """The runs by eps and variant, both in the order in which they come first."""
    found = []
    for eps in dict.fromkeys(run["config"]["eps"] for run in summary["runs"]):
        for name in dict.fromkeys(variant(run) for run in summary["runs"]):
            runs = [run for run in summary["runs"] if variant(run) == name and run["config"]["eps"] == eps]
            if runs:
                found.append((eps, name, runs))
    return found


def table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table: mean and, in brackets, lowest to highest of several seeds, in per cent.

    Time is the median ratio of each run's training time to that of FGSM (and of GradAlign, if there is any) with the
    same eps and seed; if the summary has ``step_times``, it is the ratio of steps, which were all timed in turns.
    """
    attacks = list(summary["runs"][0]["accuracy"])
    bases = [name for name in (BASE, DOUBLE) if name == BASE or any(variant(run) == name for run in summary["runs"])]
    head = ["eps", "variant", "train, own attack", *(f"test {each}" for each in attacks), "collapsed", "full steps"]
    time = "step time" if "step_times" in summary else "time"
    head += [time if name == BASE else f"{time} over {name}" for name in bases]
    rows = []
    for eps, name, runs in groups(summary):
        columns = [[run["train_adv"] for run in runs]]
        columns += [[run["accuracy"][attack]["accuracy"] for run in runs] for attack in attacks]
        shares = [run["full_share"] for run in runs if run.get("full_share") is not None]
        cells = [
            *(spread(column) for column in columns),
            _fallen(runs),
            f"{100 * statistics.mean(shares):.0f} %" if shares else "-",
            *(_ratio(summary, runs, base) for base in bases),
        ]
        rows.append((f"{255 * eps:.3g}/255", name, *cells))
    return markdown(head, rows)


def strong_table(summary: dict[str, Any]) -> str | None:
    """The stronger attacks' accuracies in per cent, one run a line, and the masking check's verdict; None without."""
    runs = [run for run in summary["runs"] if run.get("strong")]
    if not runs:
        return None
    attacks = list(dict.fromkeys(name for run in runs for name in run["strong"]["accuracy"]))
    head = ["eps", "variant", "seed", "samples", *attacks, "worst case", "gradient masking"]
    rows = []
    for run in runs:
        strong = run["strong"]
        found = strong["accuracy"]
        cells = [f"{255 * run['config']['eps']:.3g}/255", variant(run), str(run["seed"])]
        cells.append(str(strong["worst_case"]["samples"]))
        cells += [f"{100 * found[name]['accuracy']:.1f}" if name in found else "-" for name in attacks]
        cells += [f"{100 * strong['worst_case']['accuracy']:.1f}", strong.get("masking", {}).get("verdict", "-")]
        rows.append(cells)
    return markdown(head, rows)


def models_table(summary: dict[str, Any]) -> str | None:
    """Accuracy in per cent of the weights of each run, last, best and averaged, one run a line; None of old files.

    Behind the last accuracy of each model is the epoch that it is from.
    """
    runs = [run for run in summary["runs"] if run.get("models")]
    if not runs:
        return None
    names = list(dict.fromkeys(name for run in runs for name in run["models"]))
    rows = []
    for run in runs:
        cells = [f"{255 * run['config']['eps']:.3g}/255", variant(run), str(run["seed"])]
        stronger = {"last": (run.get("strong") or {}).get("accuracy"), **(run.get("strong") or {}).get("models", {})}
        for name in names:
            model = run["models"].get(name)
            found = {} if model is None else {**model["accuracy"], **(stronger.get(name) or {})}
            numbers = "  ".join(f"{attack} {100 * each['accuracy']:.1f}" for attack, each in found.items())
            cells.append("-" if model is None else f"{numbers} (epoch {model['epoch']})")
        rows.append(cells)
    return markdown(["eps", "variant", "seed", *names], rows)


def agreement(summary: dict[str, Any]) -> str | None:
    """Agreement of E_lin with gradient misalignment and collapse, over all epochs of all runs; None without them."""
    from scipy import stats

    rows = [(variant(run), row) for run in summary["runs"] for row in run["epochs"] if "misalignment" in row]
    fallen, healthy = ([row["val_e_lin"] for _, row in rows if row["collapsed"] is each] for each in (True, False))
    if not fallen or not healthy:
        return None
    parts = []
    for what, chosen in (("all runs", rows), (BASE, [pair for pair in rows if pair[0] == BASE])):
        if len(chosen) > 1:
            e_lin, misalignment = ([row[name] for _, row in chosen] for name in ("val_e_lin", "misalignment"))
            rank = stats.spearmanr(e_lin, misalignment).statistic
            parts.append(f"{what}: {rank:.2f} ({len(chosen)} epochs)")
    medians = (
        f"{statistics.median(fallen):.1e} in {len(fallen)} collapsed epochs, {statistics.median(healthy):.1e} else"
    )
    return f"Rank correlation of E_lin and gradient misalignment, {', '.join(parts)}. Median E_lin: {medians}."


def step_ms(summary: dict[str, Any], name: str) -> float | None:
    """Milliseconds of a variant's step in ``step_times``, if it is there."""
    ms: float | None = summary["step_times"]["ms"].get(_STEPS.get(name, name))
    return ms


def _ratio(summary: dict[str, Any], runs: list[Run], base: str) -> str:
    if "step_times" in summary:
        ms = [step_ms(summary, name) for name in (variant(runs[0]), base)]
        return f"{ms[0] / ms[1]:.2f}x" if ms[0] is not None and ms[1] is not None else "-"
    times = {
        (run["config"]["eps"], run["seed"]): run["training_seconds"] for run in summary["runs"] if variant(run) == base
    }
    keys = [(run["config"]["eps"], run["seed"]) for run in runs]
    ratios = [run["training_seconds"] / times[key] for run, key in zip(runs, keys, strict=True) if key in times]
    return f"{statistics.median(ratios):.2f}x" if ratios else "-"


def _fallen(runs: list[Run]) -> str:
    never = sum(run.get("never_robust") or False for run in runs)
    return f"{sum(run['collapsed'] for run in runs)} of {len(runs)}" + f", {never} never robust" * (never > 0)
