"""The results of gpu_report.py's parts: problems, targets, the table and the plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.gpu.trainings import FASTEST
from benchmarks.harness.tables import VERDICTS, met
from benchmarks.ops.sizes import BACKENDS, LARGE, PACK_CASES
from elle_fast.recipes.plot import new_figure, write_figure


def problems_of(part: dict[str, Any]) -> list[str]:
    """Everything that went wrong in a part, a line each."""
    found = [part["status"]] if part["status"].endswith("out of time") or part["status"] == "interrupted" else []
    steps = [{"case": name, **row} for name, row in part.get("rows", {}).items()]
    jobs = [{"case": f"{job['kind']} {job['name']}", **job} for job in part.get("jobs", ())]
    for place in (part, *part.get("cases", ()), *steps, *jobs):
        where = f"{place['case']}: " if "case" in place else ""
        for name, text in place.items():
            if name.startswith("error"):
                found.append(f"{where}{name}: {str(text).strip().splitlines()[-1][:300]}")
        if "skipped" in place:
            found.append(f"{where}skipped, {place['skipped']}")
    return found


# ---- Targets


def targets(parts: dict[str, dict[str, Any]], *, dry: bool) -> list[dict[str, Any]]:
    """The targets of the parts that ran, and what was measured, None if it was not."""
    rows: list[dict[str, Any]] = []

    def add(part: str, what: str, value: float | None, wanted: float, text: str, *, at_most: bool) -> None:
        target = f"{'at most' if at_most else 'at least'} {wanted:g} {text}"
        value = None if dry else value
        row = {"part": part, "what": what, "target": target, "wanted": wanted, "measured": value}
        rows.append({**row, "met": met(value, wanted, at_most=at_most)})

    for case in PACK_CASES if "pack_points" in parts else ():
        if case.target and case.shape == LARGE:
            found = [each for each in parts["pack_points"].get("cases", ()) if each["case"] == case.name]
            share = found[0].get("ratios", {}).get("pack", {}).get("of_copy_rate") if found else None
            add("pack_points", case.name, share, 0.85, "of the copy rate", at_most=False)
    if "steps" in parts:
        ratio = parts["steps"].get("rows", {}).get("elle-a", {}).get("of_passes")
        add("steps", "elle-a, captured, bf16", ratio, 1.05, "x its model passes", at_most=True)
    if "trainings" in parts and "jobs" in parts["trainings"]:
        took = [job["training_seconds"] for job in _trained(parts["trainings"]) if job["name"] == FASTEST]
        add("trainings", f"{FASTEST}, 8/255", min(took, default=None), 75, "s without evaluation", at_most=True)
    return rows


def _trained(part: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings that came to their end."""
    return [job for job in part.get("jobs", ()) if "training_seconds" in job]


def verdict(row: dict[str, Any]) -> str:
    """Met, or missed by how much."""
    missed = f" by {100 * abs(row['measured'] / row['wanted'] - 1):.0f} %" if row["met"] is False else ""
    return VERDICTS[row["met"]] + missed


# ---- The table and the plot


def table(report: dict[str, Any]) -> str:
    """Times, problems, and last the targets; no line longer than 100 characters."""
    parts = report["parts"]
    lines = [*_op_lines(parts), *_step_lines(parts.get("steps", {})), *_training_lines(parts.get("trainings", {}))]
    for name, part in parts.items():
        for rate in part.get("copy", ())[:1]:
            lines.append(f"copy rate in {name}: {rate['bytes_per_second'] / 1e12:.3f} TB/s, read and written")
        for key in ("built", "outcomes", "memcheck"):
            if key in part:
                lines.append(f"{name}: {part[key]}")
        if part["status"] != "done":
            lines.append(f"{name}: {part['status']}")
    if problems := report["problems"]:
        lines += [f"{len(problems)} problems:", *(f"  {text}" for text in problems)]
    lines.append("")
    for row in report["targets"]:
        value = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        lines.append(f"{row['part']:<12}{row['what']:<28}{row['target']:<34}{value:>7}  {verdict(row)}")
    if report["dry_run"]:
        lines.append("DRY RUN: no number above is a measurement")
    return "\n".join(line.splitlines()[0][:100] if line else "" for line in lines)


def _op_lines(parts: dict[str, Any]) -> list[str]:
    head = ("us", "% copy", "x cuda", "x eager", "x comp.", "replay", "x eager", "x comp.", "host")
    lines = [
        _table_line(op, result, what)
        for op in ("pack_points", "elle_loss")
        for result in parts.get(op, {}).get("cases", ())
        for what in result.get("timings", {})
    ]
    return [f"{'':28}" + "".join(f"{word:>8}" for word in head), *lines] if lines else []


def _step_lines(part: dict[str, Any]) -> list[str]:
    """A step of each method: time, images a second, and beside its own passes, FGSM and the authors."""
    names = {"ms": "median_us", "img/s": "images_per_second", "x passes": "of_passes", "x fgsm": "of_fgsm"}
    rows = part.get("rows", {})
    lines = [f"{'step':<40}" + "".join(f"{name:>9}" for name in (*names, "kernels", "waits"))] if rows else []
    for name, row in rows.items():
        values = [row.get(key) for key in names.values()]
        ms = None if values[0] is None else 1e-3 * values[0]
        cells = [_fine(ms), _cell(values[1]), *map(_fine, values[2:]), _cell(row.get("launches"))]
        cells.append(_cell(row.get("waits")))
        lines.append(f"{name:<40.40}" + "".join(f"{cell:>9}" for cell in cells))
    return lines


def _training_lines(part: dict[str, Any]) -> list[str]:
    """A training each: seconds, images a second, share of full steps, accuracies in %."""
    accuracy: dict[str, dict[str, float]] = {}
    for job in part.get("jobs", ()):
        accuracy.setdefault(job["name"], {}).update(job.get("accuracy", {}))
    attacks = list(dict.fromkeys(attack for found in accuracy.values() for attack in found))
    lines = [f"{'training':<28}" + "".join(f"{head:>11}" for head in ("s", "img/s", "full %", *attacks))]
    for job in _trained(part):
        share = None
        if "full_steps" in job:
            share = 100 * job["full_steps"] / (job["full_steps"] + job["light_steps"])
        values = [job["training_seconds"], job["images_per_second"], share]
        values += [100 * accuracy[job["name"]].get(attack, math.nan) for attack in attacks]
        name = job["name"] + ("" if job["capture"] else ", eager")
        lines.append(f"{name:<28.28}" + "".join(f"{_cell(value):>11}" for value in values))
    return lines if len(lines) > 1 else []


def _table_line(op: str, result: dict[str, Any], what: str) -> str:
    kernel, ratios = result["timings"][what].get("triton", {}), result.get("ratios", {}).get(what, {})
    label = result["case"] if op != "elle_loss" else f"loss {result['case']} {what}"
    share = ratios.get("of_copy_rate", 0.0)
    cells = [_cell(kernel.get("events", {}).get("median_us")), f"{100 * share:.1f}" if share else "-"]
    cells += [_cell(ratios.get(f"events_{other}")) for other in BACKENDS[1:]]
    cells.append(_cell(kernel.get("replay", {}).get("median_us")))
    cells += [_cell(ratios.get(f"replay_{other}")) for other in BACKENDS[2:]]
    cells.append(_cell(kernel.get("host", {}).get("median_us")))
    return f"{label.replace('channels-last', 'last'):<28.28}" + "".join(f"{cell:>8}" for cell in cells)


def _fine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Share of the copy rate, and speed beside the reference, of every case."""
    rows = [
        (result["case"], result["ratios"].get("pack") or result["ratios"].get("both"), result["timings"])
        for op in ("pack_points", "elle_loss")
        for result in report["parts"].get(op, {}).get("cases", ())
        if "ratios" in result
    ]
    names = [name.replace("channels-last", "last") for name, ratios, _ in rows if ratios]
    values = [ratios for _, ratios, _ in rows if ratios]
    figure = new_figure(figsize=(12, 1.5 + 0.28 * len(names)), layout="constrained")
    share, speed = figure.subplots(1, 2, sharey=True)
    places = range(len(names))
    share.barh(places, [100 * ratios.get("of_copy_rate", 0) for ratios in values], color="#0072B2")
    share.set_yticks(places, names, fontsize=8)
    share.invert_yaxis()
    share.axvline(100, color="black", linewidth=0.8)
    share.set_xlabel("bytes per second, % of a copy's")
    series = (
        ("events_eager", "eager", "o", "#D55E00"),
        ("events_compiled", "compiled", "o", "#009E73"),
        ("replay_eager", "eager, both replayed", "x", "#D55E00"),
        ("replay_compiled", "compiled, both replayed", "x", "#009E73"),
    )
    for key, label, marker, colour in series:
        there = [(ratios[key], place) for place, ratios in enumerate(values) if key in ratios]
        speed.plot([x for x, _ in there], [y for _, y in there], marker, color=colour, label=f"reference, {label}")
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_xscale("log")
    speed.set_xlabel("times as fast as the reference")
    speed.legend(fontsize=8)
    for axes in (share, speed):
        axes.grid(alpha=0.3, axis="x")
    device = "DRY RUN, no measurement" if report["dry_run"] else report["device"]["name"]
    figure.suptitle(f"pack_points, and elle_loss forward + backward: {device}")
    write_figure(figure, path)
