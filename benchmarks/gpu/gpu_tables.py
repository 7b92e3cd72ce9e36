"""The results of gpu_report.py's parts: problems, targets, the table and the plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.tables import VERDICTS, met
from benchmarks.ops.sizes import BACKENDS, LARGE, LOSS_CASES, PACK_CASES, LossCase, PackCase
from elle_fast.recipes.plot import new_figure, write_figure


def problems_of(part: dict[str, Any]) -> list[str]:
    """Everything that went wrong in a part, a line each."""
    found = [part["status"]] if part["status"].endswith("out of time") or part["status"] == "interrupted" else []
    for place in (part, *part.get("cases", ())):
        where = f"{place['case']}: " if "case" in place else ""
        for name, text in place.items():
            if name.startswith("error"):
                found.append(f"{where}{name}: {str(text).strip().splitlines()[-1][:300]}")
        if "skipped" in place:
            found.append(f"{where}skipped, {place['skipped']}")
    return found


# ---- Targets


def targets(parts: dict[str, dict[str, Any]], *, dry: bool) -> list[dict[str, Any]]:
    """The targets and what was measured, None if it was not."""
    rows: list[dict[str, Any]] = []

    def add(op: str, case: PackCase | LossCase, what: str, ratio: str, wanted: float, text: str) -> None:
        found = [each for each in parts.get(op, {}).get("cases", ()) if each["case"] == case.name]
        value = found[0].get("ratios", {}).get(what, {}).get(ratio) if found and not dry else None
        if text == "times the least possible" and value is not None:
            value = float(f"{1 / value:.4g}")
        at_most = text == "times the least possible"
        row = {"op": op, "case": case.name, "target": f"{'at most' if at_most else 'at least'} {wanted:g} {text}"}
        rows.append({**row, "wanted": wanted, "measured": value, "met": met(value, wanted, at_most=at_most)})

    for case in PACK_CASES:
        if case.target and case.shape == LARGE:
            add("pack_points", case, "pack", "of_copy_rate", 0.85, "of the copy rate")
        elif case.target:
            add("pack_points", case, "pack", "replay_eager", 8, "x eager, replay")
            add("pack_points", case, "pack", "replay_compiled", 2.5, "x compiled, replay")
    for loss in LOSS_CASES:
        if loss.target and loss.launch_bound:
            for clock in ("events", "replay"):
                add("elle_loss", loss, "both", f"{clock}_eager", 6, f"x eager, {clock}")
                add("elle_loss", loss, "both", f"{clock}_compiled", 2, f"x compiled, {clock}")
        elif loss.target:
            add("elle_loss", loss, "both", "of_copy_rate", 1.5, "times the least possible")
    return rows


def verdict(row: dict[str, Any]) -> str:
    """Met, or missed by how much."""
    missed = f" by {100 * abs(row['measured'] / row['wanted'] - 1):.0f} %" if row["met"] is False else ""
    return VERDICTS[row["met"]] + missed


# ---- The table and the plot


def table(report: dict[str, Any]) -> str:
    """The sweep, times, problems, and last the targets; no line longer than 100 characters."""
    parts = report["parts"]
    lines = _sweep_lines(parts.get("sweep", {}))
    head = ("us", "% copy", "x cuda", "x eager", "x comp.", "replay", "x eager", "x comp.", "host")
    lines.append(f"{'':28}" + "".join(f"{word:>8}" for word in head))
    for op in ("pack_points", "elle_loss", "step"):
        part = parts.get(op, {})
        results = part.get("cases", [{"case": "ELLE-A, small network", **part}] if op == "step" else [])
        for result in results:
            for what in result.get("timings", {}):
                lines.append(_table_line(op, result, what))
    for name, part in parts.items():
        for rate in part.get("copy", ())[:1]:
            lines.append(f"copy rate in {name}: {rate['bytes_per_second'] / 1e12:.3f} TB/s, read and written")
    if "step" in parts:
        step = parts["step"]
        lines.append(f"step: kernels {step.get('launches')}, without a sync {step.get('without_sync')}")
    if "tests" in parts:
        lines.append(f"tests: {parts['tests'].get('outcomes', parts['tests']['status'])}")
    if "kernels" in parts:
        lines.append(f"memcheck: {parts['kernels'].get('memcheck', parts['kernels']['status'])}")
    if problems := report["problems"]:
        lines += [f"{len(problems)} problems:", *(f"  {text}" for text in problems)]
    lines.append("")
    for row in report["targets"]:
        value = "-" if row["measured"] is None else f"{row['measured']:.3g}"
        lines.append(f"{row['op']:<12}{row['case']:<30}{row['target']:<33}{value:>7}  {verdict(row)}")
    if report["dry_run"]:
        lines.append("DRY RUN: no number above is a measurement")
    return "\n".join(line.splitlines()[0][:100] if line else "" for line in lines)


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


def _sweep_lines(part: dict[str, Any]) -> list[str]:
    """The settings of each case, the fastest first."""
    rows = part.get("rows", [])
    lines = []
    for name in dict.fromkeys((row["op"], row["case"]) for row in rows):
        lines.append(f"sweep, {' '.join(name)}: BLOCK, ROWS, warps (-: as it is), us, of copy rate")
        chosen = sorted((row for row in rows if (row["op"], row["case"]) == name), key=lambda row: row["median_us"])
        for row in chosen:
            settings = "".join(f"{_cell(row.get(key)):>7}" for key in ("BLOCK", "ROWS", "num_warps"))
            parts = "".join(
                f"  {what} {_cell(row[what]['median_us'])}" for what in ("forward", "backward") if what in row
            )
            lines.append(f"{settings}{_cell(row['median_us']):>10}{row['of_copy_rate']:>7.2f}{parts}")
    return lines


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
