"""The HTML page of an evaluation: whole, with the numbers, escaped, and without a request to anywhere."""

import base64
import io
import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from elle_fast.evaluation import (
    accuracy_curve,
    attacked_examples,
    by_class,
    examples,
    masking,
    outcomes,
    page,
    predictions,
    worst_case,
    write_page,
)
from tests.evaluation.cases import EPS, Linear, around
from tests.html_tree import Tree

NASTY = '<b>bold</b> & "quoted" <script>alert(1)</script>'


@pytest.fixture(scope="module")
def evaluated():
    """A result, examples and names of classes, one of which is HTML."""
    model, names = Linear(4, 16), ("cat", "dog", NASTY, "d\udce4")
    x, y = around(model, n=80, size=4)
    found = outcomes(model, [(x, y)], "clean,fgsm,pgd-3-2", eps=EPS)
    result: dict[str, Any] = {
        "checkpoint": "here/<i>best</i>.pt",
        "data": {"name": "squares", "digest": "0123456789abcdef"},
        "eps": EPS,
        "norm": "linf",
        "accuracy": {name: outcome.summary() for name, outcome in found.items()},
        "worst_case": worst_case(found),
        "curve": accuracy_curve(model, lambda: [(x, y)], [0, EPS, 4 * EPS]),
        "by_class": by_class(y, predictions(model, [(x, y)]), found, names),
        "warnings": ["of what <b>it</b> takes"],
        "title": f"Robustness of {NASTY}",
        "command": "elle-fast eval a && b",
    }
    result["accuracy"]["fgsm"]["notes"] = {"N <em>points</em>": 3}
    return result, attacked_examples(model, x[:3], y[:3], "clean,fgsm,pgd-3-2", eps=EPS), names


def test_the_page_is_whole_and_asks_for_nothing(evaluated):
    result, shown, names = evaluated
    text = page(result, examples=shown, classes=names)
    tree = Tree(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert tree.of("html") == [{"lang": "en"}]
    # No scripts, links, frames or fonts; pictures are in the file; no address at all.
    assert {name for name, _ in tree.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "b", "i", "em"} - {"b"}
    )
    assert all(image["src"].startswith("data:image/png;base64,") for image in tree.of("img"))
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r'src="data:[^"]*"', "", text).replace("<!DOCTYPE", ""))
    policy = next(each["content"] for each in tree.of("meta") if "http-equiv" in each)
    assert policy.startswith("default-src 'none'")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in tree.of("meta")
    assert "prefers-color-scheme: dark" in text
    # The picture of the curve is XML.
    (drawn,) = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert len(list(ElementTree.fromstring(drawn).iter("circle"))) == 3


def test_the_page_has_the_numbers(evaluated):
    result, shown, names = evaluated
    said = Tree(page(result, examples=shown, classes=names)).text
    for row in [*result["accuracy"].values(), result["worst_case"]]:
        assert f"{row['accuracy']:.2%}" in said
    for row in result["by_class"]:
        assert f"{row['clean']:.1%}|{row['worst_case']:.1%}" in said
    for point in result["curve"]["points"]:
        assert f"{255 * point['eps']:.4g}: {point['accuracy']:.1%}" in said
    assert "6/255 in linf" in said
    assert "0123456789abcdef" in said
    assert "pgd-3-2, 2 starts" in said
    for example in shown:
        assert f"image {example.index}, class {names[example.label]}" in said
        assert f"({example.attacked['fgsm'].probability:.0%})" in said


def test_all_texts_are_escaped(evaluated):
    result, shown, names = evaluated
    tree = Tree(page(result, examples=shown, classes=names))
    assert NASTY in tree.text
    assert "of what <b>it</b> takes" in tree.text
    assert "here/<i>best</i>.pt" in tree.text
    assert "N <em>points</em>" in tree.text
    # The only bold text is that of the cards.
    assert len(tree.of("b")) == 2
    assert tree.of("h1") == [{}]


def test_three_pictures_for_each_attack_at_most(evaluated):
    result, shown, names = evaluated
    tree = Tree(page(result, examples=shown, classes=names))
    assert len(tree.of("img")) == 3 * (1 + 2 * 2)
    assert {(image["width"], image["height"]) for image in tree.of("img")} == {("4", "4")}
    # Rows of numbers are no pictures: the section is left out.
    rows = attacked_examples(Linear(2, 9), torch.rand(2, 9), torch.tensor([0, 1]), "fgsm", eps=0.1)
    assert Tree(page(result, examples=rows)).of("img") == []


def test_the_difference_is_magnified_as_the_page_says():
    x = torch.full((1, 2, 2), 0.5)
    change = torch.tensor([[[EPS, -EPS], [EPS / 2, 0.0]]])
    seen = examples.Seen(x + change, 1, 0.5)
    example = examples.Example(7, 0, examples.Seen(x, 0, 0.5), {"fgsm": seen})
    result = {"accuracy": {"clean": {"accuracy": 1.0, "samples": 1}}}
    for ball, scale in (({"eps": EPS, "norm": "linf"}, EPS), ({"eps": 9.0, "norm": "l2"}, EPS)):
        tree = Tree(page({**result, **ball}, examples=[example]))
        picture = tree.of("img")[2]
        assert picture["alt"] == "what fgsm changed"
        content = base64.b64decode(picture["src"].partition(",")[2])
        levels = np.asarray(Image.open(io.BytesIO(content)))
        expected = 255 * (0.5 + change[0] / (2 * scale))
        assert np.abs(levels - expected.numpy()).max() <= 0.5 + 1e-3  # rounded to bytes
    assert "to its largest value" in tree.text
    # From grey to white is half of the range.
    assert f"{0.5 / EPS:.3g} times: white is +eps" in Tree(page({**result, "eps": EPS}, examples=[example])).text


def test_names_that_turn_the_text_around_leave_what_is_beside_them():
    x, name = torch.zeros(1, 2, 2), "a\u202eb"
    example = examples.Example(7, 0, examples.Seen(x, 0, 0.5), {"fgsm": examples.Seen(x + EPS, 0, 0.5)})
    result = {"accuracy": {"clean": {"accuracy": 1.0, "samples": 1}}, "eps": EPS}
    text = page(result, examples=[example], classes=[name])
    assert text.count(name) == text.count(f"<bdi>{name}</bdi>") == 4
    assert re.search(r"bdi[^{}]*{ unicode-bidi: isolate; }", text)


def test_what_is_not_there_is_left_out():
    tree = Tree(page({"accuracy": {"clean": {"accuracy": 0.5, "samples": 4, "per_restart": [0.5]}}}))
    assert "50.00%" in tree.text
    assert "Not checked" in tree.text
    assert "Accuracy by class" not in tree.text
    assert "Settings" not in tree.text
    assert tree.of("svg") == tree.of("img") == []


def test_of_many_classes_the_ends_are_shown():
    rows = [{"class": f"number {n}", "samples": 2, "clean": 1.0, "worst_case": n / 100} for n in range(64)]
    result = {"accuracy": {"clean": {"accuracy": 1.0, "samples": 128}}, "by_class": rows[::-1]}
    tree = Tree(page(result))
    shown = [int(number) for number in re.findall(r"number (\d+)", tree.text)]
    assert shown == [*range(10), *range(54, 64)]
    assert "44 classes between them are not shown" in tree.text
    few = Tree(page({**result, "by_class": rows[:30]}))
    assert len(re.findall(r"number \d", few.text)) == 30


@pytest.mark.parametrize(
    "verdict, meaning", [("ok", "beats it"), ("suspicious", "may be masked"), ("undecided", "few")]
)
def test_the_verdict_on_the_gradients(verdict, meaning):
    row = {"accuracy": 0.25, "p_value": 0.0001, "suspicious": verdict == "suspicious"}
    found = {"verdict": verdict, "samples": 8, "level": masking.LEVEL, "attacks": {"square-1000": row}}
    found["white_box"] = {"attack": "pgd-20", "accuracy": 0.5}
    said = Tree(page({"accuracy": {"clean": {"accuracy": 1.0, "samples": 8}}, "masking": found})).text
    assert verdict in said
    assert meaning in said.partition("believed")[2]
    assert "25.00%|0.0001|" in said


def test_a_curve_that_rises_is_remarked():
    curve: dict[str, Any] = {
        "attack": "pgd-20",
        "samples": 100,
        "points": [{"eps": 0.1, "accuracy": 0.2}, {"eps": 0.2, "accuracy": 0.4}],
    }
    result = {"accuracy": {"clean": {"accuracy": 1.0, "samples": 100}}, "curve": curve, "norm": "l2", "eps": 0.1}
    assert "rises with the radius" in page(result)
    curve["points"][1]["accuracy"] = 0.22
    assert "rises with the radius" not in page(result)


def test_the_file_is_replaced_as_a_whole_or_not_at_all(evaluated, tmp_path, monkeypatch):
    result, shown, names = evaluated
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(TypeError, match="result: expected a mapping with the accuracy by attack, got"):
        write_page(path, {"accuracy": 3})
    assert path.read_text() == "old"
    write_page(path, result, examples=shown, classes=names)
    # A name that is not UTF-8 is shown as far as it can be.
    assert "d?" in path.read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OSError, match="folder"):
        write_page(path / "folder" / "a.html", result)
