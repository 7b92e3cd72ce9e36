"""bench_step.py's numbers for people: targets, the mix of light and full steps, a Markdown table, a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.tables import VERDICTS, markdown, met
from elle_fast.recipes.plot import new_figure, write_figure

# Pairs of rows: a method's light and its full step.
MIXED = {
    "elle-a-skip": ("elle-a-skip-light", "elle-a-skip-full"),
    "elle-a-fast": ("elle-a-fast-light", "elle-a-fast-full"),
}
# The targets for a whole run over FGSM's, at eps 8/255 and 16/255.
PRICES = (1.25, 1.4)
PARTS = ("forward_ms", "backward_ms")

Rows = dict[str, dict[str, Any]]


def full_share(light: float, full: float, price: float) -> float | None:
    """The share of full steps, of 0 to 1, at which a run has this price; None if no share is small enough."""
    if light > price:
        return None
    return 1.0 if full <= price else (price - light) / (full - light)


def mixes(rows: Rows) -> dict[str, dict[str, Any]]:
    """For each method with light steps: what both kinds cost, and which share of full steps gives each price."""
    found: dict[str, dict[str, Any]] = {}
    for name, (light_name, full_name) in MIXED.items():
        if light_name in rows and full_name in rows:
            light, full = rows[light_name]["ratio"], rows[full_name]["ratio"]
            shares = {f"{price:g}": _rounded(full_share(light, full, price)) for price in PRICES}
            found[name] = {"light_ratio": light, "full_ratio": full, "full_share_at_price": shares}
    return found


# ---- Targets


def targets(rows: Rows, history: dict[str, Any], *, smoke: bool) -> list[dict[str, Any]]:
    """The targets that a step's own numbers decide; ``met`` is None if it was not measured."""

    def value(method: str, column: str) -> Any:
        return rows.get(method, {}).get(column)

    lengths = sorted(history, key=int)
    growth = None
    if len(lengths) > 1 and not smoke:
        times = [history[length]["AdaptiveLambda"]["median_us"] for length in (lengths[0], lengths[-1])]
        growth = round(times[1] / times[0], 1)

    def faster(method: str, than: str) -> float | None:
        times = [rows[name]["ms"]["median"] for name in (method, than) if "ms" in rows.get(name, {})]
        return round(times[1] / times[0], 3) if len(times) == 2 and not smoke else None

    return [
        _judged("units of elle-a", value("elle-a", "units"), 14.0),
        _judged("units of the authors' step", value("authors", "units"), 16.0, at_least=True),
        _judged("peak of forward='checkpoint' over FGSM's", value("elle-a-checkpoint", "peak_ratio"), 1.2),
        _judged("lam's state after the most steps over the fewest", growth, 1.0),
        _judged("host syncs of elle-a", value("elle-a", "host_syncs"), 0),
        _judged("host syncs with skip_below", value("elle-a-skip-light", "host_syncs"), 1),
        _judged("a full step of fast over GradAlign's", faster("gradalign", "elle-a-fast-full"), 0.6),
        # For an H200 with PreActResNet18, batch 128, bf16, channels last.
        _judged("captured elle-a, times the authors' speed", faster("elle-a-captured", "authors"), 2.0, at_least=True),
        _judged("the same, authors in fp32", faster("elle-a-captured", "authors-fp32"), 4.0, at_least=True),
        _judged("captured elle-a over its model passes", faster("passes-captured", "elle-a-captured"), 1.05),
    ]


def _judged(what: str, value: float | None, wanted: float, *, at_least: bool = False) -> dict[str, Any]:
    return {"what": what, "wanted": wanted, "measured": value, "met": met(value, wanted, at_most=not at_least)}


# ---- For people


def tables(content: dict[str, Any]) -> str:
    """Markdown: the methods, lam's state, the batches, the mixes and the targets."""
    setting, machine = content["setting"], content["machine"]
    place = machine.get("accelerator") or f"{machine['processor']}, {machine['torch_threads']} threads"
    title = f"{setting['model']}, batch {setting['batch']}, {setting['dtype']}, {place}"
    parts = [
        f"{title}, torch {content['versions']['torch']}",
        _methods(content["methods"]),
        _history(content["history"]),
        _batches(content["batches"]),
    ]
    parts += ["\n".join([*_mix_lines(content["mixes"]), *_target_lines(content["targets"])])]
    if content["smoke"]:
        parts.append(content["note"])
    return "\n\n".join(part for part in parts if part)


def _methods(rows: Rows) -> str:
    on_gpu = any(row.get("launches") is not None for row in rows.values())
    head = ["method", "ms", "quartiles", "loss", "backward", "x FGSM", "units", "units by FLOPs", "forward"]
    head += ["peak MB", "x FGSM", "launches" if on_gpu else "operators", "host syncs"]
    lines = []
    for name, row in rows.items():
        ms = row["ms"]
        parts = [f"{row[part]:.4g}" if part in row else "-" for part in PARTS]
        cells = [name, f"{ms['median']:.4g}", f"{ms['q1']:.4g} to {ms['q3']:.4g}", *parts, f"{row['ratio']:.2f}"]
        if "units" not in row:  # a replay, of which nothing is counted
            lines.append([*cells, *["-"] * 7])
            continue
        cells += [f"{row['units']:.2f}", f"{row['flop_units']:.2f}", f"{row['forward_samples']:g} B"]
        cells += [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['peak_ratio']:.2f}"]
        lines.append([*cells, str(row["launches"] if on_gpu else row["operators"]), str(row["host_syncs"])])
    return markdown(head, lines)


def _history(history: dict[str, Any]) -> str:
    lines = [
        [f"{int(length):,}", *(f"{sides[name]['median_us']:.4g}" for name in ("AdaptiveLambda", "authors"))]
        for length, sides in history.items()
    ]
    return markdown(["steps taken", "lam's update, us", "the authors' list, us"], lines)


def _batches(batches: dict[str, Rows]) -> str:
    names = list(next(iter(batches.values())))
    lines = [
        [name, *(f"{rows[name]['ms']['median']:.4g} ({rows[name]['ratio']:.2f})" for rows in batches.values())]
        for name in names
    ]
    return markdown(["ms (x FGSM)", *(f"batch {size}" for size in batches)], lines)


def _mix_lines(found: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, mix in found.items():
        shares = [
            f"{float(price):.2f}x FGSM " + ("is below a light step" if share is None else f"at {share:.0%} full steps")
            for price, share in mix["full_share_at_price"].items()
        ]
        lines.append(f"{name}: light {mix['light_ratio']:.2f}x, full {mix['full_ratio']:.2f}x; " + ", ".join(shares))
    return lines


def _target_lines(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['what']}: {row['measured']}, target {row['wanted']:g}: {VERDICTS[row['met']]}" for row in rows]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# ---- Picture

# Okabe and Ito, as in the recipes' plots.
_OURS, _OTHERS, _AUTHORS, _BASE = "#0072B2", "#999999", "#D55E00", "#000000"
# The methods that are also measured with other batch sizes.
SWEPT = {
    "fgsm": _BASE,
    "authors": _AUTHORS,
    "elle-a": _OURS,
    "elle-a-fast-light": "#56B4E9",
    "elle-a-fast-full": "#009E73",
    "gradalign": "#CC79A7",
    "pgd-at": "#E69F00",
}


def plot(content: dict[str, Any], path: Path) -> None:
    """Time and memory over FGSM's, lam's state over the steps taken, time over the batch."""
    rows: Rows = content["methods"]
    figure = new_figure(figsize=(12, 2.6 + 0.42 * len(rows)), layout="constrained")
    (times, memory), (state, batches) = figure.subplots(2, 2, height_ratios=(max(3, 0.3 * len(rows)), 3))
    _bars(times, rows, "ratio")
    base = rows["fgsm"]["ms"]["median"]
    for place, row in enumerate(rows.values()):
        # The paper's Fig. 15: the loss, its backward pass, and the little rest of the optimiser.
        left = 0.0
        for part, shade in zip(PARTS, (0.45, 0.2), strict=True):
            if part in row:
                times.barh(place, row[part] / base, left=left, color="black", alpha=shade)
                left += row[part] / base
        times.plot([row["ms"]["q1"] / base, row["ms"]["q3"] / base], [place] * 2, color="black", linewidth=1)
    times.set_xlabel(
        "time of a step over FGSM's (median; line: quartiles)\ndark: the loss with its attack; then: backward"
    )
    _bars(memory, {name: row for name, row in rows.items() if "peak_ratio" in row}, "peak_ratio")
    memory.set_xlabel("peak memory over FGSM's")
    lengths = [int(length) for length in content["history"]]
    for name, colour in (("AdaptiveLambda", _OURS), ("authors", _AUTHORS)):
        values = [sides[name]["median_us"] for sides in content["history"].values()]
        state.loglog(lengths, values, "o-", color=colour, label=name)
    state.set_xlabel("steps taken")
    state.set_ylabel("update of lam, us")
    for name in next(iter(content["batches"].values())):
        values = [found[name]["ms"]["median"] for found in content["batches"].values()]
        batches.plot([int(size) for size in content["batches"]], values, "o-", color=SWEPT[name], label=name)
    batches.set_xlabel("batch")
    batches.set_ylabel("ms a step")
    batches.set_ylim(bottom=0)
    for axes in (state, batches):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(tables(content).partition("\n")[0])
    write_figure(figure, path)


def _bars(axes: Any, rows: Rows, column: str) -> None:
    values = [row[column] for row in rows.values()]
    axes.barh(range(len(rows)), values, color=[_colour(name) for name in rows])
    for place, value in enumerate(values):
        axes.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
    axes.axvline(1.0, color=_BASE, linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(values))


def _colour(name: str) -> str:
    return _AUTHORS if name == "authors" else _OURS if "elle" in name else _OTHERS
