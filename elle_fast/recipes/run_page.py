"""The page of one run or several: a table of them, their curves, and in which options they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from elle_fast.evaluation.document import document, settings_list
from elle_fast.recipes.checked import number_text
from elle_fast.recipes.run_charts import charts, dashes, look, turning_points
from elle_fast.recipes.run_page_script import SCRIPT
from elle_fast.recipes.run_record import Record

_MISSING = "–"


def run_page(records: Sequence[Record]) -> str:
    """The HTML of the page; every text of it is escaped."""
    title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    differing, same = differences(records)
    sections = [
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(" · ".join(_about(records)))}</p>',
        *(f'<div class="warning">{escape(doubt)}</div>' for doubt in _doubts(records)),
        _table(records),
        _curves(records),
        _differing(records, differing),
        f"<details><summary>{'The same in all runs' if len(records) > 1 else 'Options and origin'}</summary>\n"
        f"{settings_list(same)}</details>",
    ]
    return document(f"{title}: training", sections, SCRIPT)


def verdict(record: Record) -> tuple[str, str]:
    """What became of a run, and how that looks: good, bad, or nothing."""
    last: dict[str, Any] = record.epochs[-1] if record.epochs else {}
    collapses = [row for row, collapsed in turning_points(record) if collapsed]
    said, looks = "no collapse", "good"
    if collapses:
        times = f", {len(collapses)} times in all" if len(collapses) > 1 else ""
        said = f"collapsed in epoch {collapses[0]['epoch']:g} (step {collapses[0]['step']:g}){times}"
        said, looks = (said, "bad") if last["collapsed"] else (f"{said}; recovered", "")
    elif last.get("never_robust"):
        said, looks = "never robust", "bad"
    elif "collapsed" not in last:
        said, looks = "not watched" if last else "", ""
    parts = [said]
    if not record.models:
        of = f"epoch {last.get('epoch', 0):g} of {record.config['epochs']}, step {record.step}"
        parts.insert(0, f"unfinished: {of}")
        looks = "bad" if looks == "bad" else ""
    if count := len(record.alarms):
        parts.append(f"{count} alarm{'s' * (count > 1)}, first in step {record.alarms[0]['step']}")
    return "; ".join(filter(None, parts)), looks


def differences(records: Sequence[Record]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """What the runs have differently, with a text for each, and what they have in common.

    Of an unfinished run nothing is known of machine and versions; it then has what the others have.
    """
    rows = [{**record.origin, **record.config} for record in records]
    differing, same = [], []
    for name in dict.fromkeys(name for row in (*(record.config for record in records), *rows) for name in row):
        texts = [_text(name, row[name]) if name in row else _MISSING for row in rows]
        of_origin = not any(name in record.config for record in records)
        known = {text for text, record in zip(texts, records, strict=True) if record.origin or not of_origin}
        if len(known) > 1:
            differing.append((name, texts))
        else:
            same.append((name, known.pop()))
    return differing, [(name, text) for name, text in same if text not in ("none", _MISSING)]


def _text(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name == "eps":
        return number_text(value)
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _about(records: Sequence[Record]) -> Iterator[str]:
    """What all runs have in common, of what is asked first."""
    for name in ("data", "model", "eps", "norm"):
        found = {_text(name, record.config[name]) for record in records if name in record.config}
        if len(found) == 1:
            yield f"eps = {found.pop()}" if name == "eps" else found.pop()


def _doubts(records: Sequence[Record]) -> Iterator[str]:
    """Why accuracies of these runs do not compare."""
    for name in ("data", "norm"):
        if len(found := sorted({str(record.config[name]) for record in records})) > 1:
            yield f"Accuracies do not compare: the runs have different {name} ({', '.join(found)})."
    counts = {numbers.get("samples") for _, _, numbers in _accuracies(records)}
    if len(counts) > 1:
        yield "Accuracies do not compare well: they are of different numbers of test images."


def _accuracies(records: Sequence[Record]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each kind of weights and attack that a run has an accuracy of, with its numbers."""
    for record in records:
        for weights, model in record.models.items():
            for attack, numbers in model["accuracy"].items():
                yield weights, attack, numbers


def _table(records: Sequence[Record]) -> str:
    kinds = [*dict.fromkeys(weights for weights, _, _ in _accuracies(records))]
    attacks = [*dict.fromkeys(attack for _, attack, _ in _accuracies(records))]
    found = {(weights, attack) for weights, attack, _ in _accuracies(records)}
    columns = [(weights, attack) for weights in kinds for attack in attacks if (weights, attack) in found]
    heads = [_head("run"), _head("verdict"), _head("method"), _head("eps", "number"), _head("seed", "number")]
    heads += [_head(attack, f"number of-{_slug(weights)}", weights, "descending") for weights, attack in columns]
    heads.append(_head("seconds", "number"))
    lines = []
    for number, record in enumerate(records):
        said, looks = verdict(record)
        cells = [
            f'<th scope="row" data-value="{escape(record.name)}">{_key(number)}{escape(record.name)}</th>',
            _cell(said, said, f"verdict {looks}"),
            _cell(record.config["method"], record.config["method"]),
            _cell(record.config["eps"], _text("eps", record.config["eps"]), "number"),
            _cell(record.config["seed"], record.config["seed"], "number"),
        ]
        for weights, attack in columns:
            numbers = record.models.get(weights, {"accuracy": {}})["accuracy"].get(attack)
            value = "" if numbers is None else numbers["accuracy"]
            cells.append(_cell(value, _MISSING if value == "" else f"{value:.2%}", f"number of-{_slug(weights)}"))
        cells.append(_cell(record.seconds, f"{record.seconds:,.{0 if record.seconds >= 100 else 1}f}", "number"))
        lines.append(f'<tr class="run-{number}">{"".join(cells)}</tr>')
    boxes = [_box(f".of-{_slug(weights)}", escape(weights)) for weights in kinds] if len(kinds) > 1 else []
    return (
        "<h2>Runs</h2>\n<p>Accuracy on the test images, clean and under attack. Best weights are those of the epoch "
        "that was best under PGD-10 on the validation images; seconds are those of training.</p>\n"
        + _boxes("Weights", boxes)
        + f'<div class="scroll" tabindex="0" role="region" aria-label="Runs"><table class="runs"><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _head(name: str, kinds: str = "", below: str = "", first: str = "ascending") -> str:
    small = f"<small>{escape(below)}</small>" if below else ""
    return (
        f'<th scope="col" class="{kinds}" aria-sort="none" data-first="{first}">'
        f'<button type="button">{escape(name)}{small}</button></th>'
    )


def _cell(value: Any, text: Any, kinds: str = "") -> str:
    return f'<td class="{kinds}" data-value="{escape(str(value))}">{escape(str(text))}</td>'


def _slug(weights: str) -> str:
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in weights)


def _box(shows: str, label: str) -> str:
    return f'<label><input type="checkbox" checked autocomplete="off" data-shows="{shows}">{label}</label>'


def _boxes(legend: str, boxes: Sequence[str]) -> str:
    return f'<fieldset class="boxes"><legend>{legend}</legend>{"".join(boxes)}</fieldset>\n' if boxes else ""


def _key(number: int) -> str:
    """A short piece of a run's line."""
    line = f'<line x1="0" x2="22" y1="5" y2="5" stroke-dasharray="{dashes(number)}"/>'
    return f'<svg class="sample" viewBox="0 0 22 10" aria-hidden="true" {look(number)}>{line}</svg>'


def _curves(records: Sequence[Record]) -> str:
    drawn = charts(records)
    if not drawn:
        return "<h2>Curves</h2>\n<p>No epoch has ended yet.</p>"
    marks = []
    if any(collapsed for record in records for _, collapsed in turning_points(record)):
        marks.append('<span class="bad">✕</span> a collapse')
    if any(record.alarms for record in records):
        marks.append("▲ an alarm of the guard")
    boxes = [_box(f".run-{number}", _key(number) + escape(record.name)) for number, record in enumerate(records)]
    boxes = boxes if len(boxes) > 1 else []
    said = f'<p class="soft">{", ".join(marks)}</p>\n' if marks else ""
    return f'<h2>Curves</h2>\n{_boxes("Runs", boxes)}{said}<div class="charts">{"".join(drawn)}</div>'


def _differing(records: Sequence[Record], differing: list[tuple[str, list[str]]]) -> str:
    if len(records) == 1:
        return "<h2>Configuration</h2>"
    if not differing:
        return "<h2>Configuration</h2>\n<p>The runs have the same options.</p>"
    head = "".join(f'<th scope="col">{_key(n)}{escape(record.name)}</th>' for n, record in enumerate(records))
    lines = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>'
        + "".join(f'<td class="mono">{escape(text)}</td>' for text in texts)
        + "</tr>"
        for name, texts in differing
    )
    return (
        "<h2>Configuration</h2>\n<p>In what the runs differ.</p>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="In what the runs differ">'
        f'<table class="runs"><thead><tr><th scope="col">option</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )
