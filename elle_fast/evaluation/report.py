"""The report of an evaluation: one HTML file that asks nothing of the network, made of plain results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from elle_fast._core import checks
from elle_fast.evaluation import charts
from elle_fast.evaluation.document import document, settings_list, write_document
from elle_fast.evaluation.examples import Example, Seen
from elle_fast.evaluation.predictions import interval

SHOWN_CLASSES, AT_AN_END = 30, 10
_APART = {"accuracy", "worst_case", "masking", "curve", "by_class", "warnings", "title"}  # sections of their own


def page(result: Mapping[str, Any], *, examples: Sequence[Example] = (), classes: Sequence[str] = ()) -> str:
    """The HTML of an evaluation. What the result lacks is left out; every text of it is escaped.

    Args:
        result: ``accuracy``, by attack what :func:`~elle_fast.evaluation.evaluate` gives. Beside it, if they are
            there: ``worst_case``, ``masking``, ``curve`` and ``by_class``, as the functions of these names give them;
            ``warnings``, a list of texts; ``title``; ``eps``, ``norm``; and any other settings, which are listed.
        examples: what the attacks did to a few samples.
        classes: the classes' names, for the examples.

    Raises:
        TypeError: if the result is no mapping, or holds no accuracies.
    """
    if not isinstance(result, Mapping) or not isinstance(result.get("accuracy"), Mapping):
        raise TypeError(f"result: expected a mapping with the accuracy by attack, got {checks.describe(result)}")
    title = str(result.get("title", "Evaluation"))
    eps, norm = result.get("eps"), str(result.get("norm", "linf"))
    sections = [
        _heading(title, result, eps, norm),
        *(f'<div class="warning">{escape(str(text))}</div>' for text in result.get("warnings", ())),
        _cards(result),
        _accuracies(result),
        _curve(result["curve"], eps, norm) if result.get("curve") else "",
        _by_class(result["by_class"]) if result.get("by_class") else "",
        _masking(result.get("masking")),
        _examples(examples, classes, eps, norm) if examples else "",
        _settings(result),
    ]
    return document(title, sections)


def write_page(path: str | os.PathLike[str], result: Mapping[str, Any], **given: Any) -> None:
    """Write :func:`page` to a file, atomically; raises OSError, naming it, if it cannot be written."""
    write_document(path, page(result, **given))


def _heading(title: str, result: Mapping[str, Any], eps: Any, norm: str) -> str:
    data = result.get("data")
    about = [
        str(data.get("name")) if isinstance(data, Mapping) else "",
        f"{max((row['samples'] for row in result['accuracy'].values()), default=0):,} test images",
        "" if eps is None else f"eps = {_radius(eps, norm)} in {norm}",
    ]
    return f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(" · ".join(filter(None, about)))}</p>'


def _cards(result: Mapping[str, Any]) -> str:
    rows = {"clean accuracy": result["accuracy"].get("clean"), "worst case over the attacks": result.get("worst_case")}
    cards = [
        f'<div class="card"><span>{name}</span><b>{row["accuracy"]:.1%}</b><span>{_interval(row)}</span></div>'
        for name, row in rows.items()
        if row is not None
    ]
    if masking := result.get("masking"):
        verdict = str(masking["verdict"])
        looks = {"ok": "good", "suspicious": "bad"}.get(verdict, "")
        checked = f"checked on {masking['samples']} images"
        cards.append(
            f'<div class="card"><span>gradients</span><b class="{looks}">{escape(verdict)}</b>'
            f"<span>{checked}</span></div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _accuracies(result: Mapping[str, Any]) -> str:
    rows = [(name, row, "") for name, row in result["accuracy"].items()]
    if (worst := result.get("worst_case")) and len(rows) > 1:
        rows.append(("worst case", worst, " worst"))
    lines = []
    for name, row, kind in rows:
        starts = len(row.get("per_restart", [0]))
        said = f"{name}, {starts} starts" if starts > 1 else name
        notes = "".join(
            f"<br><small>{escape(str(note))} ({times} times)</small>" for note, times in row.get("notes", {}).items()
        )
        lines.append(
            f'<tr><td class="attack">{escape(said)}{notes}</td><td class="number">{row["accuracy"]:.2%}</td>'
            f'<td class="number">{_interval(row)}</td><td class="bars">{_bar(row["accuracy"], kind)}</td></tr>'
        )
    head = '<tr><th>attack</th><th class="number">accuracy</th><th class="number">95 % interval</th><th></th></tr>'
    return (
        "<h2>Accuracy</h2>\n<p>The part of the test images that is classified right under each attack. "
        "The worst case counts the images that withstand every attack. Intervals are Wilson's: they cover the choice "
        'of the test images, nothing else.</p>\n<div class="scroll"><table class="accuracies">'
        f"{head}{''.join(lines)}</table></div>"
    )


def _curve(found: Mapping[str, Any], eps: Any, norm: str) -> str:
    scale, unit = (255, "radius in 255ths of the pixels' range, linf") if norm == "linf" else (1, "radius, l2")
    points = [(scale * point["eps"], point["accuracy"]) for point in found["points"]]
    drawn = charts.curve(points, found["samples"], None if eps is None else scale * eps, unit)
    rises = any(
        interval(round(after * found["samples"]), found["samples"])[0] > before
        for (_, before), (_, after) in zip(sorted(points), sorted(points)[1:], strict=False)
    )
    doubt = '<p class="bad">The accuracy rises with the radius: the gradients may be masked.</p>' if rises else ""
    return (
        f"<h2>Accuracy against eps</h2>\n<p>Under {escape(str(found['attack']))} on {found['samples']:,} images, in "
        "per cent. Each radius is attacked for itself; the band is the 95 % interval. It should fall towards 0 as the "
        f'radius grows.</p>{doubt}\n<div class="chart">{drawn}</div>'
    )


def _by_class(rows: Sequence[Mapping[str, Any]]) -> str:
    ordered = sorted(rows, key=lambda row: (row["worst_case"], row["clean"]))
    many = len(ordered) > SHOWN_CLASSES
    shown: list[Mapping[str, Any] | None] = [*ordered]
    if many:
        shown = [*ordered[:AT_AN_END], None, *ordered[-AT_AN_END:]]
    lines = []
    for row in shown:
        if row is None:
            left_out = len(ordered) - 2 * AT_AN_END
            lines.append(f'<tr class="gap"><td colspan="5">{left_out:,} classes between them are not shown</td></tr>')
            continue
        bars = _bar(row["clean"], "") + _bar(row["worst_case"], " worst")
        lines.append(
            f'<tr><td class="name">{escape(str(row["class"]))}</td><td class="number">{row["samples"]}</td>'
            f'<td class="number">{row["clean"]:.1%}</td><td class="number">{row["worst_case"]:.1%}</td>'
            f'<td class="bars">{bars}</td></tr>'
        )
    head = "".join(f'<th class="number">{name}</th>' for name in ("images", "clean", "worst case"))
    which = f"The {AT_AN_END} worst and the {AT_AN_END} best of {len(ordered):,} classes" if many else "All classes"
    key = '<span class="key"></span> clean, <span class="key worst"></span> worst case over the attacks'
    return (
        f"<h2>Accuracy by class</h2>\n<p>{which}, the least robust first: {key}.</p>\n"
        f'<div class="scroll"><table><tr><th>class</th>{head}<th></th></tr>{"".join(lines)}</table></div>'
    )


def _masking(found: Mapping[str, Any] | None) -> str:
    heading = "<h2>Can these numbers be believed?</h2>\n"
    if not found:
        return (
            f"{heading}<p>Not checked. The check for masked gradients compares PGD-20 with more steps, with an attack "
            "without gradients and with noise: <code>--masking-check</code>.</p>"
        )
    meaning = {
        "ok": "No attack that should be weaker than PGD-20, or only a little stronger, beats it.",
        "suspicious": "An attack beats PGD-20 that should not: gradients may be masked, and accuracies too high.",
    }.get(str(found["verdict"]), "Too few images withstand PGD-20 for the check to find anything.")
    rows = {str(found["white_box"]["attack"]): {**found["white_box"]}, **found["attacks"]}
    lines = []
    for name, row in rows.items():
        p_value = f"{row['p_value']:.2g}" if "p_value" in row else ""
        looks = "bad" if row.get("suspicious") else ""
        said = "suspicious" if row.get("suspicious") else "fine" if "p_value" in row else "compared with"
        lines.append(
            f'<tr><td class="attack">{escape(name)}</td><td class="number">{row["accuracy"]:.2%}</td>'
            f'<td class="number">{p_value}</td><td class="{looks}">{said}</td></tr>'
        )
    head = '<tr><th>attack</th><th class="number">accuracy</th><th class="number">p</th><th></th></tr>'
    return (
        f"{heading}<p>{meaning} On {found['samples']} images.</p>\n"
        f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'
    )


def _examples(examples: Sequence[Example], classes: Sequence[str], eps: Any, norm: str) -> str:
    def name(label: int) -> str:
        # Apart from the text around it, which a name may otherwise turn around: U+202E, or right-to-left letters.
        return f"<bdi>{escape(str(classes[label]) if 0 <= label < len(classes) else str(label))}</bdi>"

    def said(seen: Seen) -> str:
        return f"{name(seen.prediction)} ({seen.probability:.0%})"

    if not all(charts.is_picture(example.clean.x) for example in examples):
        return ""
    linf = norm == "linf" and eps
    cards = []
    for example in examples:
        clean = example.clean
        tiles = [
            f'<figure class="single">{charts.figure(clean.x, "undisturbed")}'
            f"<figcaption>undisturbed:<br>{said(clean)}</figcaption></figure>"
        ]
        for attack, seen in example.attacked.items():
            change = seen.x - clean.x
            largest = float(eps) if linf else change.abs().max().item()
            difference = (0.5 + change / (2 * (largest or 1.0))).clamp(0, 1)
            right = seen.prediction == example.label
            looks = "good" if right else "bad"
            after = "no change found" if not change.any() else said(seen)
            pair = charts.figure(seen.x, f"after {attack}") + charts.figure(difference, f"what {attack} changed")
            tiles.append(
                f'<figure><div class="pair">{pair}</div><figcaption>{escape(attack)}: '
                f'{said(clean)} → <span class="{looks}">{after}</span></figcaption></figure>'
            )
        head = f"<h3>image {example.index}, class {name(example.label)}</h3>"
        cards.append(f'<div class="example">{head}<div class="tiles">{"".join(tiles)}</div></div>')
    scale = f"{1 / (2 * eps):.3g} times: white is +eps, black -eps" if linf else "to its largest value"
    return (
        "<h2>What the attacks did</h2>\n<p>Each attack, run again on these images; on the right the difference, "
        f"magnified {scale}, grey is no change. Per cents are the model's probabilities.</p>\n{''.join(cards)}"
    )


def _settings(result: Mapping[str, Any]) -> str:
    rows = [
        (name, value) for name, value in _flat(result) if value is not None and name.partition(": ")[0] not in _APART
    ]
    listed = settings_list(rows)
    return f"<h2>Settings and origin</h2>\n{listed}" if listed else ""


def _flat(result: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in result.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {inner}", each) for inner, each in value.items() if name not in _APART)
        else:
            yield name, value


def _interval(row: Mapping[str, Any]) -> str:
    low, high = interval(round(row["accuracy"] * row["samples"]), row["samples"])
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _bar(share: float, kind: str) -> str:
    return f'<div class="bar{kind}" style="width:{100 * share:.1f}%"></div>'


def _radius(eps: float, norm: str) -> str:
    return f"{255 * eps:.4g}/255" if norm == "linf" else f"{eps:.4g}"
