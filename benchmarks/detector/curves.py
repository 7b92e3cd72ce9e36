"""What each detector costs on healthy steps, and how early it sees a collapse, on recorded trainings.

    python -m benchmarks.detector.curves    (or make detector-curves)

For each detector, threshold and number of samples behind E_lin, over all traces:

- false alarms per 1,000 healthy steps, where one counts for 20 steps, so that a detector that never is silent has 48;
  and the part of those steps that would be full ones: lam is at its highest at an alarm, and above 1 % of it for 459
  steps if it decays by 0.99 (paper), for 44 if by 0.9. Healthy are all steps of a training that stands, and those more
  than 150 before the onset of a collapse;
- for each collapse, the delay from the onset (:mod:`benchmarks.detector.onset`) to the first alarm at most 150 steps
  before it, and E_lin, its relative size and PGD-10 there. Without any within 300 steps, it is missed.

Trainings on CIFAR-10 make the numbers; the others (digits, MNIST, tokens) have columns of their own. Figures are drawn
beside the JSON file, which holds them all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detector import figures
from benchmarks.detector.alarms import Alarms, counted
from benchmarks.detector.onset import Onset, onset
from benchmarks.detector.packed import SAMPLES, Column, Recorded, unpack
from benchmarks.detector.rules import FAMILIES, OWN_PASS, PAPER, PRODUCT, SENSITIVITY, THRESHOLD, Family, find, signals
from benchmarks.harness.program import ROOT, command, parser, write_lines
from benchmarks.harness.tables import markdown
from elle_fast.recipes.provenance import provenance

MARGIN, WITHIN = 150, 300
FULL = {"full": 459, "full_of_0.9": 44}  # steps in which lam is above 1 % of its highest, from an alarm on
DEFAULTS = {PAPER: (f"{SENSITIVITY:g}",), PRODUCT: (f"{THRESHOLD:g}",)}  # as AdaptiveLambda has them
MAIN = "cifar10"


@dataclass(frozen=True)
class Case:
    """A trace and what became of it; ``healthy``: its first steps in which an alarm is false."""

    trace: Recorded
    onset: Onset
    healthy: int

    @property
    def main(self) -> bool:
        """Whether it counts for the numbers, not for the breadth."""
        return self.trace.name.startswith(f"{MAIN}-")


def case(trace: Recorded) -> Case:
    """What became of a trace."""
    found = onset(trace)
    if found.step is not None:
        return Case(trace, found, max(0, found.step - MARGIN))
    return Case(trace, found, trace.steps if found.fate == "stands" else 0)


def full_steps(alarms: Alarms, of_one: int) -> int:
    """Steps in which lam is above 1 % of lam_max, if it is so for ``of_one`` from an alarm on."""
    steps = np.flatnonzero(alarms)
    return int(np.minimum(np.diff(steps, append=len(alarms)), of_one).sum())


def detection(alarms: Alarms, onset_at: int) -> int | None:
    """The step of the alarm that the collapse is seen by; ``None``: it is missed."""
    first = max(0, onset_at - MARGIN)
    near = np.flatnonzero(alarms[first : onset_at + WITHIN + 1])
    return first + int(near[0]) if len(near) else None


def row(cases: Sequence[Case], scores: Sequence[Column], count: int, threshold: float) -> dict[str, Any]:
    """The numbers of one point of a curve; ``delays`` and what follows it are in the order of the collapses."""
    found: dict[str, Any] = {}
    alarms = [score > threshold for score in scores]
    for name, main in (("false_per_1000", True), ("elsewhere", False)):
        chosen = [(each, of[: each.healthy]) for each, of in zip(cases, alarms, strict=True) if each.main is main]
        healthy = sum(each.healthy for each, _ in chosen)
        found[name] = _rounded(1000 * sum(len(counted(of)) for _, of in chosen) / healthy if healthy else None)
        if main:
            for key, of_one in FULL.items():
                found[key] = _rounded(sum(full_steps(of, of_one) for _, of in chosen) / healthy if healthy else None)
    found |= {name: [] for name in ("delays", "e_lin", "relative", "pgd")}
    for each, of in zip(cases, alarms, strict=True):
        if each.onset.step is None:
            continue
        step = detection(of, each.onset.step)
        shown = signals(each.trace.columns, count)
        found["delays"].append(None if step is None else step - each.onset.step)
        for name in ("e_lin", "relative"):
            found[name].append(None if step is None else _rounded(float(shown[name][step])))
        found["pgd"].append(None if step is None else _rounded(_probed(each.trace, step)))
    return found


def _probed(trace: Recorded, step: int) -> float:
    """PGD-10 at the last probe that is not after the step."""
    return float(trace.probes[np.searchsorted(trace.probes[:, 0], step, side="right") - 1, 2])


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.3g}")


def curve(family: Family, cases: Sequence[Case], count: int) -> dict[str, dict[str, Any]]:
    """A detector's rows by threshold."""
    scores = [family.score(signals(each.trace.columns, count)) for each in cases]
    return {f"{threshold:g}": row(cases, scores, count, threshold) for threshold in family.thresholds}


def curves(cases: Sequence[Case]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """By detector, samples ("own 16": in a pass of their own) and threshold."""
    found = {}
    for family in FAMILIES:
        print(family.name, file=sys.stderr, flush=True)
        counts = (OWN_PASS, *SAMPLES) if family.sampled else (SAMPLES[-1],)
        found[family.name] = {_label(count): curve(family, cases, count) for count in counts}
    return found


def level(each: Case, count: int) -> dict[str, float | None]:
    """The product's score on healthy steps and at the onset; and how many of the healthy steps' alarms count."""
    of = signals(each.trace.columns, count)
    scores = {name: find(name).score(of) for name in (PRODUCT, PAPER)}
    healthy, at = scores[PRODUCT][: each.healthy], each.onset.step
    found: dict[str, Any] = {"median": np.median, "q99": lambda values: np.quantile(values, 0.99), "max": np.max}
    shown = {name: _rounded(float(of(healthy))) if len(healthy) else None for name, of in found.items()}
    shown["at_onset"] = None if at is None else _rounded(float(scores[PRODUCT][at]))
    for name, threshold in ((PRODUCT, THRESHOLD), (PAPER, SENSITIVITY)):
        shown[f"alarms, {name}"] = len(counted(scores[name][: each.healthy] > threshold)) if each.healthy else None
    return shown


def _label(count: int) -> str:
    return "own 16" if count == OWN_PASS else str(count)


def best(rows: dict[str, dict[str, Any]], main: Sequence[bool]) -> str:
    """The threshold that catches most collapses of CIFAR-10 in time; of those, the one with the fewest false alarms."""

    def merit(threshold: str) -> tuple[float, ...]:
        of = rows[threshold]
        return -in_time(of["delays"], main), of["false_per_1000"] or 0.0, of["full"] or 0.0

    return min(rows, key=merit)


def in_time(delays: Sequence[int | None], main: Sequence[bool]) -> int:
    """Collapses with an alarm before the onset."""
    return sum(each is not None and each < 0 for each, counts in zip(delays, main, strict=True) if counts)


def tables(summary: dict[str, Any]) -> str:
    """Markdown: the traces, and each detector at its best threshold and its default, for two numbers of samples."""
    head = ["trace", "ended", "fate", "onset", "steps", "healthy", f"{PRODUCT}: median", "q99", "max", "at onset"]
    head += ["false alarms", "paper's"]
    lines = [
        (
            name,
            *(_shown(of[key]) for key in ("ended", "fate", "step", "steps", "healthy")),
            *map(_shown, of["level"].values()),
        )
        for name, of in summary["traces"].items()
    ]
    return f"{markdown(head, lines)}\n\n{_of_detectors(summary)}"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _of_detectors(summary: dict[str, Any]) -> str:
    main = [name.startswith(f"{MAIN}-") for name in summary["collapses"]]
    head = [
        "detector",
        "samples",
        "threshold",
        "false per 1,000",
        "full steps",
        "if 0.9",
        "in time",
        "missed",
        "median delay",
    ]
    lines = []
    for name, by_samples in summary["curves"].items():
        for samples, rows in by_samples.items():
            if samples not in ("own 16", "128"):
                continue
            for threshold in dict.fromkeys([*DEFAULTS.get(name, ()), best(rows, main)]):
                of = rows[threshold]
                delays = [each for each, counts in zip(of["delays"], main, strict=True) if counts]
                seen = [each for each in delays if each is not None]
                prices = [f"{of['false_per_1000']}", *(f"{100 * (of[key] or 0):.1f} %" for key in FULL)]
                caught = [f"{in_time(of['delays'], main)} of {len(delays)}", str(len(delays) - len(seen))]
                median = f"{statistics.median(seen):.0f}" if seen else "-"
                lines.append((name, samples, threshold, *prices, *caught, median))
    return markdown(head, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge every detector, write the JSON file, draw the figures, print the table."""
    options_of = _parser()
    options = options_of.parse_args(arguments)
    if not options.traces.exists():
        options_of.error(f"argument --traces: no file {options.traces}")
    try:
        cases = [case(trace) for trace in unpack(options.traces).values()]
    except ValueError as error:
        options_of.error(f"argument --traces: {error}")
    about = {
        each.trace.name: {
            **each.onset._asdict(),
            "ended": each.trace.ended,
            "steps": each.trace.steps,
            "healthy": each.healthy,
            "level": level(each, OWN_PASS),
            "commit": each.trace.commit,
        }
        for each in cases
    }
    collapses = [each.trace.name for each in cases if each.onset.step is not None]
    summary = {
        **provenance(command(options_of, options)),
        "traces": about,
        "collapses": collapses,
        "curves": curves(cases),
    }
    write_lines(options.out, summary, depth=4)
    figures.draw(summary, {each.trace.name: each.trace for each in cases}, options.out)
    print(tables(summary))
    return 0


def _parser() -> argparse.ArgumentParser:
    options_of = parser("benchmarks.detector.curves", __doc__)
    results = ROOT / "benchmarks" / "results"
    traces = results / "detector_traces.npz"
    options_of.add_argument("--traces", type=Path, default=traces, help="what benchmarks.detector.packed has written")
    options_of.add_argument("--out", type=Path, default=results / "detector_curves.json", help="the JSON file")
    return options_of


if __name__ == "__main__":
    sys.exit(main())
