"""The results of benchmarks/ops/bench_ops.py: targets and whether they are met, tables, JSON and the plot."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.tables import VERDICTS, met, rounded, terminal
from benchmarks.harness.timing import NOT_MEASURED, Samples
from benchmarks.ops.loss_cases import CALL_US, FIXED, LOSSES, fixed_name, loss_name
from benchmarks.ops.pack_cases import FLOORS, into_out, name_of
from benchmarks.ops.sides import Case, kernels
from benchmarks.ops.sizes import LARGE, SMALL
from elle_fast._core.files import write_json
from elle_fast.backends import extension
from elle_fast.recipes.plot import new_figure, write_figure
from elle_fast.recipes.provenance import provenance

EAGER, COMPILED = ("eager-plain", "eager-reference"), ("compiled-plain", "compiled-reference")
ABOUT = {
    "turns": "in each round every side of a case has a sample; a sample is the mean of calls in a row, after a "
    "millisecond of such calls; a ratio is one of medians; low and high: a fifth of the samples lies below and above",
    "checked": "before a case is timed its results are compared: pack_points with the reference bit for bit (8 "
    "roundings where compiled or normalised; of a large batch three parts of 16 samples), elle_loss with float64",
    "eager": "-reference is the backend of that name; -plain is what a user writes in plain torch, with torch's own "
    "random numbers (plain_torch.py); targets are judged against the faster of the two, compiled likewise",
    "memory": "each call allocates its results, on every side but -out, a call with out=, and the floor, which write "
    "to memory that is there; malloc returns large results to the system, so times at the large size hold the page "
    "faults of new memory, which are counted, unless the variables under 'malloc' keep it; there -out is judged",
    "floor": "benchmarks/ops/floor.c with torch's threads: two arrays read, four of the same size written, past the "
    "caches or through them; the faster of the two is the floor",
}


@dataclass(frozen=True)
class Target:
    """``side`` of a case against the fastest of ``against``; without any, its own microseconds."""

    case: str
    side: str
    against: tuple[str, ...]
    wanted: float
    at_most: bool = False
    beside: str = ""  # a side that is reported as well

    @property
    def text(self) -> str:
        """As in the table."""
        if not self.against:
            return f"at most {self.wanted:g} us"
        if self.at_most:
            return f"at most {self.wanted:g}x floor"
        return f"at least {self.wanted:g}x {self.against[0].partition('-')[0]}"


def targets() -> list[Target]:
    """The CPU's targets, for the instruction set that this machine would use and for AVX2."""
    kernel = (kernels() or ["cpp"])[0]
    small, large = name_of(SMALL), name_of(LARGE)
    ten, thousand = ([loss_name(form) for form in LOSSES if form.classes == classes] for classes in (10, 1000))
    return [
        # With out= at the large size: without, a call mostly waits for the system to clear 600 MB of new memory.
        Target(large, into_out(kernel), FLOORS, 1.25, at_most=True, beside=kernel),
        Target(small, kernel, EAGER, 12, beside=into_out(kernel)),
        Target(small, kernel, COMPILED, 15, beside=into_out(kernel)),
        Target(large, into_out(kernel), EAGER, 30, beside=kernel),
        Target(large, into_out(kernel), COMPILED, 12, beside=kernel),
        Target(small, "cpp-avx2", EAGER, 6, beside=into_out("cpp-avx2")),
        Target(large, into_out("cpp-avx2"), EAGER, 6, beside="cpp-avx2"),
        *(Target(name, kernel, against, by) for name in ten for against, by in ((EAGER, 3), (COMPILED, 2))),
        *(Target(name, kernel, EAGER, 2) for name in thousand),
        # A seed comes from torch's generator, whatever the backend.
        *(Target(fixed_name(n), "torch" if n == "draw_seed" else kernel, (), CALL_US, at_most=True) for n in FIXED),
    ]


def judge(target: Target, cases: dict[str, dict[str, Any]], *, dry: bool) -> dict[str, Any]:
    """Both sides, their ratio and whether that is enough; None for what was not measured."""
    timings = {} if dry else cases.get(target.case, {}).get("timings", {})
    times: dict[str, float] = {name: timings[name]["median_us"] for name in timings}
    others = {name: times[name] for name in target.against if name in times}
    rival = min(others, key=lambda name: others[name], default=None)

    def ratio(side: str) -> float | None:
        if side not in times or (target.against and rival is None):
            return None
        if rival is None:
            return times[side]
        return times[side] / times[rival] if target.at_most else times[rival] / times[side]

    value = ratio(target.side)
    row: dict[str, Any] = {"case": target.case, "target": target.text, "wanted": target.wanted, "side": target.side}
    row |= {"side_us": times.get(target.side), "against": rival, "against_us": others.get(rival or "")}
    row |= {"all_against_us": others, "measured": rounded(value)}
    row["met"] = met(value, target.wanted, at_most=target.at_most)
    if target.beside in times:
        row["beside"] = {
            "side": target.beside,
            "side_us": times[target.beside],
            "measured": rounded(ratio(target.beside)),
        }
    return row


@dataclass
class Report:
    """Fills up case by case."""

    dry: bool
    command: list[str]
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    begin: float = field(default_factory=time.monotonic)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, case: Case, found: dict[str, Samples], skipped: dict[str, str]) -> None:
        """Add the times of a case whose results were right."""
        timings = {name: samples.microseconds() for name, samples in found.items()}
        threads = case.threads or torch.get_num_threads()
        row: dict[str, Any] = {"threads": threads, "plotted": case.plotted, "bytes": case.bytes}
        floors = [timings[name]["median_us"] for name in FLOORS if name in timings]
        row["floor_us"] = min(floors, default=None)
        if case.bytes is not None and floors:
            row["floor_gb_per_s"] = rounded(case.bytes / min(floors) / 1e3)
        self.cases[case.name] = {**row, "timings": timings, "skipped": skipped}

    def content(self) -> dict[str, Any]:
        """For JSON."""
        module = extension.load()
        return {
            "note": NOT_MEASURED if self.dry else None,
            "dry_run": self.dry,
            "about": ABOUT,
            "load_before": self.load,
            "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
            "seconds": round(time.monotonic() - self.begin, 1),
            "backends": kernels(),
            "extension": None if module is None else module.facts(),
            "cases": self.cases,
            "targets": [judge(target, self.cases, dry=self.dry) for target in targets()],
            "problems": self.problems,
            **provenance(self.command),
        }

    def write(self, path: Path) -> dict[str, Any]:
        """JSON, and the plot beside it; returns what is in them."""
        content = self.content()
        write_json(path, content)
        plot(content, path.with_suffix(".svg"))
        return content


# ---- For people


def tables(content: dict[str, Any]) -> str:
    """Every case, and last the targets."""
    head = ("case", "side", "median", "low", "high", "faults", "ratio")
    groups = [_rows(name, case) for name, case in content["cases"].items()]
    text = terminal("microseconds of a call, and times the fastest backend's", head, groups, words=2)
    columns = ("case", "side", "target", "measured", "", "for comparison")
    rows = []
    for row in content["targets"]:
        measured = "-" if row["measured"] is None else f"{row['measured']:g}"
        beside = row.get("beside", {"measured": None})
        more = "" if beside["measured"] is None else f"{beside['side']} {beside['measured']:g}"
        rows.append((row["case"], row["side"], row["target"], measured, VERDICTS[row["met"]], more))
    text += terminal("targets", columns, [rows], words=len(columns))
    text += "".join(f"problem: {line}\n" for line in content["problems"])
    return text + (f"{NOT_MEASURED}\n" if content["dry_run"] else "")


def _rows(name: str, case: dict[str, Any]) -> list[tuple[str, ...]]:
    base = _base(case)
    rows = []
    for side, row in case["timings"].items():
        times = (f"{row[key]:,.1f}" for key in ("median_us", "low_us", "high_us"))
        rows.append((side, *times, f"{row['page_faults']:,.0f}", f"{row['median_us'] / base:.2f}"))
    rows += [(side, reason) for side, reason in case["skipped"].items()]
    return [("" if i else name, *row) for i, row in enumerate(rows)]


def _base(case: dict[str, Any]) -> float:
    """The base of the ratios: the first kernel that is timed, else the first side."""
    timings = case["timings"]
    found = [name for name in timings if name in kernels()] or list(timings)
    base: float = timings[found[0]]["median_us"]
    return base


# Okabe and Ito, as in the recipes' plots.
_COLOURS = {"eager": "#D55E00", "compiled": "#E69F00", "cpp": "#0072B2"}


def plot(content: dict[str, Any], path: Path) -> None:
    """A picture for each case, with the floor as a line, and one for the fixed costs."""
    shown = _pictures(content["cases"])
    columns = min(3, max(1, len(shown)))
    lines = max(1, math.ceil(len(shown) / columns))
    figure = new_figure(figsize=(5.2 * columns, 3.8 * lines), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (name, case) in zip(grid, shown.items(), strict=False):
        _bars(axes, case)
        axes.set_title(name, fontsize=9)
    for axes in grid[len(shown) :]:
        axes.set_visible(False)
    machine = content["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['torch_threads']} threads, torch {content['versions']['torch']}")
    write_figure(figure, path)


def _pictures(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cases that are plotted; those of the fixed cost, whose bars are few, together."""
    shown = {name: case for name, case in cases.items() if case["plotted"]}
    together: dict[str, Any] = {}
    for name in [name for name in shown if name.startswith(fixed_name(""))]:
        for side, row in shown.pop(name)["timings"].items():
            together[f"{side} {name.removeprefix(fixed_name(''))}"] = row
    if together:
        shown["fixed cost of a call"] = {"timings": dict(sorted(together.items())), "floor_us": None}
    return shown


def _bars(axes: Any, case: dict[str, Any]) -> None:
    bars = {side: row for side, row in case["timings"].items() if side not in FLOORS}
    colours = [_COLOURS.get(side.partition("-")[0], "#999999") for side in bars]
    heights = [row["median_us"] for row in bars.values()]
    reach = [[row["median_us"] - row["low_us"] for row in bars.values()]]
    reach += [[row["high_us"] - row["median_us"] for row in bars.values()]]
    axes.bar(range(len(bars)), heights, yerr=reach, color=colours, error_kw={"linewidth": 0.8})
    above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    for place, row in enumerate(bars.values()):
        height = row["median_us"]
        text = f"{height:,.3g}" if height < 100 else f"{height:,.0f}"
        axes.annotate(text, (place, row["high_us"]), **above)
    axes.margins(y=0.15)
    if case["floor_us"] is not None:
        axes.axhline(case["floor_us"], color="black", linestyle="--", linewidth=1, label="floor: the same bytes")
        axes.legend(frameon=False, fontsize=8)
    # A log axis has no zero, so it is for what differs by more than its beginning hides.
    if max(heights) > 3 * min(heights):
        axes.set_yscale("log")
        axes.set_ylim(bottom=10 ** math.floor(math.log10(0.5 * min([*heights, case["floor_us"] or math.inf]))))
    axes.set_xticks(range(len(bars)), list(bars), rotation=40, ha="right", fontsize=8)
    axes.set_ylabel("us a call")
