"""bench_train.py's numbers for people: the table, the targets, the picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness.tables import VERDICTS, markdown, met, rounded
from benchmarks.step.train_parts import PARTS
from elle_fast.recipes.plot import new_figure, write_figure

# Images per second over the authors', of `--fast --precision bf16`: on processors with AMX, and without.
FASTER = {True: 7.0, False: 3.0}
PRICE, HOST = 1.2, 0.05
LARGE, SMALL = "preactresnet18", "preact"

Rows = dict[str, dict[str, Any]]


def milliseconds(row: dict[str, Any] | None, share: float) -> float | None:
    """Of a step: of a row with two kinds, of a mix in which that share is full; None if it was not measured."""
    if row is None:
        return None
    if "light" in row and "full" in row:
        light, full = (float(row[kind]["ms"]["median"]) for kind in ("light", "full"))
        return (1 - share) * light + share * full
    return float(row["ms"]["median"]) if "ms" in row else None


def over(rows: Rows, one: str, other: str, share: float) -> float | None:
    """The time of a row over that of another."""
    times = [milliseconds(rows.get(name), share) for name in (one, other)]
    return None if times[0] is None or times[1] is None else times[0] / times[1]


def targets(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What this issue wants; ``met`` is None if it was not measured."""
    share, amx = content["setting"]["full_share"], content["setting"]["amx_bf16"]
    large, small = ({} if content["quick"] else content["nets"].get(net, {}).get("rows", {}) for net in (LARGE, SMALL))
    found = []
    for name in ("fast bf16", "fast bf16 compiled"):
        speed = over(large, "authors", name, share) if content["setting"]["device"] == "cpu" else None
        found.append(_judged(f"{name}, times the authors' speed, {LARGE}", speed, FASTER[amx], at_most=False))
    for name in ("fast", "fast bf16", "fast bf16 same", "fast bf16 compiled"):
        price = over(large, name, base(name), share)
        found.append(_judged(f"time of {name} over {base(name)}'s, {LARGE}", price, PRICE))
    for name in ("elle-a", "fast"):
        found.append(_judged(f"host time of {name} over its step's, {SMALL}", host_part(small.get(name)), HOST))
    return found


def host_part(row: dict[str, Any] | None) -> float | None:
    """Time outside of the steps over that inside; of the two kinds the larger part."""
    if row is None:
        return None
    kinds = [row[kind] for kind in ("light", "full") if kind in row] or [row]
    parts = [each["host_ms"] / (each["ms"]["median"] - each["host_ms"]) for each in kinds if "host_ms" in each]
    return max(parts, default=None)


def _judged(what: str, value: float | None, wanted: float, *, at_most: bool = True) -> dict[str, Any]:
    return {
        "what": what,
        "measured": rounded(value),
        "wanted": wanted,
        "met": met(value, wanted, at_most=at_most),
    }


# ---- Table


def tables(content: dict[str, Any]) -> str:
    """Markdown: a table for each net, what layouts and compiling add, where time goes, and the targets."""
    setting, machine = content["setting"], content["machine"]
    place = machine.get("accelerator") or f"{machine['processor']}, {machine['torch_threads']} threads"
    parts = [f"{place}, torch {content['versions']['torch']}, {setting['rounds']} rounds"]
    for net in content["nets"].values():
        title = f"{net['model']}, width {net['width']}, {net['pixels']}x{net['pixels']}, batch {net['batch']}"
        parts += [title, _rows(net, setting["full_share"])]
        if "layouts" in net:
            parts.append(markdown(["forward and backward", "ms"], [[k, f"{v:.4g}"] for k, v in net["layouts"].items()]))
        if net.get("profile"):
            lines = [[name, *(f"{each['parts'][part]:.3g}" for part in PARTS)] for name, each in net["profile"].items()]
            parts.append(markdown(["ms of a step", *PARTS], lines))
    parts.append("\n".join(_target(row) for row in content["targets"]))
    parts += [f"{name}: {content['about'][name]}" for name in ("ms", "full_share")]
    if content["note"]:
        parts.append(content["note"])
    return "\n\n".join(parts)


def _target(row: dict[str, Any]) -> str:
    return f"{row['what']}: {row['measured']}, target {row['wanted']:g}: {VERDICTS[row['met']]}"


def _rows(net: dict[str, Any], share: float) -> str:
    rows: Rows = net["rows"]
    head = ["training", "ms a step", "quartiles", "images/s", "x authors' speed", "x FGSM's time", "host", "peak MB"]
    lines = []
    for name, row in rows.items():
        kinds = [kind for kind in ("light", "full") if kind in row]
        if kinds:
            lines.append([f"{name}, {share:.0%} full", *_speeds(net, name, share)])
        for kind in kinds:
            lines.append([f"{name}, {kind} steps", *_speeds({**net, "rows": rows | {name: row[kind]}}, name, share)])
        if not kinds:
            lines.append([name, *_speeds(net, name, share)])
    return markdown(head, lines)


def _speeds(net: dict[str, Any], name: str, share: float) -> list[str]:
    rows: Rows = net["rows"]
    row, ms = rows[name], milliseconds(rows[name], share)
    speed, price = over(rows, "authors", name, share), over(rows, name, base(name), share)
    part, peak = host_part(row), row.get("peak_bytes")
    return [
        _shown(ms, ".4g"),
        f"{row['ms']['q1']:.4g} to {row['ms']['q3']:.4g}" if "ms" in row else "-",
        _shown(None if ms is None else 1e3 * net["batch"] / ms, ".4g"),
        _shown(speed, ".2f"),
        _shown(price, ".2f"),
        _shown(part, ".1%"),
        _shown(None if peak is None else peak / 1e6, ".0f"),
    ]


def base(name: str) -> str:
    """FGSM training in a row's precision, compiled if that is."""
    _, _, form = name.removesuffix(" same").partition(" ")
    return f"fgsm {form}".strip()


def _shown(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)


# ---- Picture

# Okabe and Ito, as in the recipes' plots.
_AUTHORS, _PLAIN, _FGSM, _OURS = "#D55E00", "#E69F00", "#999999", "#0072B2"
_SHADES = ("#D55E00", "#F0E442", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#777777")


def plot(content: dict[str, Any], path: Path) -> None:
    """Speed over the authors', and where a step's time goes; a row of panels for each net."""
    share, nets = content["setting"]["full_share"], content["nets"]
    heights = [max(2.0, 0.3 * len(net["rows"]) + 0.8) for net in nets.values()]
    figure = new_figure(figsize=(13, 1.2 + sum(heights)), layout="constrained")
    panels = figure.subplots(len(nets), 2, squeeze=False, height_ratios=heights)
    for (speeds, parts), net in zip(panels, nets.values(), strict=True):
        _speed_bars(speeds, net["rows"], share)
        speeds.set_title(f"{net['model']}, width {net['width']}, {net['pixels']}x{net['pixels']}, batch {net['batch']}")
        _part_bars(parts, net.get("profile", {}))
    machine = content["machine"]
    place = machine.get("accelerator") or f"{machine['processor']}, {machine['torch_threads']} threads"
    figure.suptitle(f"{place}, torch {content['versions']['torch']}; fast: {share:.0%} of the steps are full")
    write_figure(figure, path)


def _speed_bars(axes: Any, rows: Rows, share: float) -> None:
    shown = {name: speed for name in rows if (speed := over(rows, "authors", name, share)) is not None}
    colours = {"authors": _AUTHORS, "plain": _PLAIN, "fgsm": _FGSM}
    axes.barh(range(len(shown)), list(shown.values()), color=[colours.get(n.split(" ")[0], _OURS) for n in shown])
    for place, value in enumerate(shown.values()):
        axes.annotate(f" {value:.2f}", (value, place), va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), list(shown), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(right=1.12 * max(shown.values(), default=1.0))
    axes.set_xlabel("images per second over the authors'")


def _part_bars(axes: Any, profile: dict[str, Any]) -> None:
    for place, row in enumerate(profile.values()):
        left = 0.0
        for part, colour in zip(PARTS, _SHADES, strict=True):
            axes.barh(place, row["parts"][part], left=left, color=colour, label=part if place == 0 else None)
            left += row["parts"][part]
    axes.set_yticks(range(len(profile)), list(profile), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step, full steps with fast")
    if profile:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    else:
        axes.set_visible(False)
