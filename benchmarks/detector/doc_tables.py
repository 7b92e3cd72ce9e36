"""The tables of README and docs that are drawn from the files of curves.py and closed_loop.py."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import markdown
from benchmarks.tables.table import Table

# The detectors that are shown: name, samples behind E_lin and threshold in the file; what it is called here.
_DETECTORS = (
    ("paper, all history", "own 16", "2", "paper, 2 std"),
    ("paper, all history", "128", "2", "paper, 2 std"),
    ("paper, all history", "own 16", "6", "paper, 6 std"),
    ("CUSUM, drift 0.5", "128", "16", "CUSUM of log E_lin, 16 std"),
    ("relative, mean of 8", "own 16", "0.2", "**relative, mean of 8 above 0.2**"),
    (
        *("bent, mean of 10", "128", "0.95"),
        "`1 - rise of the loss along the attack / what its gradient predicts`, mean of 10 above 0.95",
    ),
)
_WITHOUT_E_LIN = "bent"
_MAIN = "cifar10-"
_PER_ROW = ("clean", "pgd-20", "pgd-50-10", "autoattack")


def detectors(content: dict[str, Any]) -> str:
    """False alarms on healthy steps, what they cost, and how long before a collapse the alarm comes.

    The paper's rule keeps lam above 1 % of lam_max for 459 steps after an alarm, the others for 44. Steps from an alarm
    to the collapse are positive if it comes before.
    """
    main = [place for place, name in enumerate(content["collapses"]) if name.startswith(_MAIN)]
    lines = []
    for name, samples, threshold, label in _DETECTORS:
        row = content["curves"][name][samples][threshold]
        full = row["full" if name.startswith("paper") else "full_of_0.9"]
        counts = "none" if name.startswith(_WITHOUT_E_LIN) else f"{samples.removeprefix('own ')} samples"
        before = [row["delays"][place] for place in main]
        steps = ", ".join("missed" if each is None else f"{-each}" for each in before)
        lines.append((label, counts, f"{row['false_per_1000']:.2g}", f"{100 * full:.0f} %", steps))
    head = ["detector", "E_lin on", "false alarms per 1,000 healthy steps"]
    return markdown(
        [*head, "healthy steps with lam above 1 % of lam_max", "steps from the alarm to the collapse"], lines
    )


def closed_loop(content: dict[str, Any]) -> str:
    """Trainings with a rule at work, one a line; FGSM takes 5 units."""
    lines = []
    for row in sorted(content["rows"].values(), key=lambda row: (row["eps"], row["variant"], row["seed"])):
        accuracies = [
            f"{100 * row['accuracy'][name]:.1f}" if name in row.get("accuracy", {}) else "-" for name in _PER_ROW
        ]
        alarms, lam, share, units = (row.get(name) for name in ("alarms", "mean_lam", "full_share", "units"))
        cells = ["-" if alarms is None else f"{len(alarms)}", "-" if lam is None else f"{lam:.3g}"]
        cells += ["-" if share is None else f"{100 * share:.2g} %", "-" if units is None else f"{units / 5:.2f}"]
        lines.append((f"{row['eps']}/255", _called(row), str(row["seed"]), *accuracies, *cells, row["ended"]))
    head = ["eps", "", "seed", "clean", "PGD-20", "PGD-50-10", "AutoAttack", "alarms", "mean lam"]
    return markdown([*head, "full steps", "work, FGSM's is 1", "ended"], lines)


def _called(row: dict[str, Any]) -> str:
    base, added = row["base"].upper(), row["variant"].partition("+")[2]
    if added in ("", "constant"):
        return f"{base} + ELLE" if added else f"{base} alone"
    return f'{base} + `fast`, `rule="{added}"`'


TABLES = {
    "detectors": Table("detector_curves.json", detectors),
    "closed-loop": Table("detector_closed_loop.json", closed_loop),
}
