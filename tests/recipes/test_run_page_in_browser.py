"""The page of runs in headless Chromium: no errors, the curves are there, and the keyboard is enough."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elle_fast.evaluation.document import write_document
from elle_fast.recipes.run_charts import CHARTS
from elle_fast.recipes.run_page import run_page
from tests.browser import NAMES, browser, program
from tests.recipes.records import COLLAPSING, NASTY, record

pytestmark = pytest.mark.skipif(program() is None, reason=f"needs one of {', '.join(NAMES)}")

NAMES_SHOWN = "[...document.querySelectorAll('table.runs tbody')[0].rows].map(row => row.cells[0].innerText.trim())"
SHOWN = "[...document.querySelectorAll('svg g.run-{}')].filter(line => line.getBoundingClientRect().width > 0).length"
FOCUSED = "document.activeElement.innerText || document.activeElement.parentNode.innerText"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    alarm = {"step": 25, "signal": "linearity", "value": 0.4, "limit": 0.2, "back_to": 11}
    runs = [
        record("b", pgd=(0.3, 0.45)),
        replace(record("c", pgd=COLLAPSING), alarms=[alarm]),
        record(NASTY + "a long name without a place to break it, or a few of them" + 60 * "x", models={}),
        record("a", method="fgsm", eps=0.5, seed=10),
    ]
    write_document(path, run_page(runs))
    return path


@pytest.fixture(scope="module")
def opened():
    with browser() as found:
        yield found


def tab_to(opened, text):
    """Press Tab until what has the focus says ``text``."""
    for _ in range(60):
        opened.press("Tab")
        if opened.find(FOCUSED).strip().startswith(text):
            return
    raise AssertionError(f"no way to {text} by the keyboard")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_all_of_it_is_shown_without_an_error(opened, page, width, dark):
    opened.open(page, width=width, dark=dark)
    assert opened.find("document.documentElement.scrollWidth") <= width
    for number in range(4):
        assert opened.find(SHOWN.format(number)) == len(CHARTS)
    assert opened.find("document.querySelectorAll('path.collapse').length") == len(CHARTS)
    assert opened.find("document.querySelectorAll('path.alarm').length") == len(CHARTS)
    # The runs' colours are the scheme's, and none of the lines is without one.
    colours = opened.find("[...document.querySelectorAll('polyline')].map(line => getComputedStyle(line).stroke)")
    assert len(set(colours)) == 4
    assert ("rgb(95, 168, 224)" in colours) == dark
    back, text = (f"getComputedStyle(document.body).{name}" for name in ("backgroundColor", "color"))
    brightness = [sum(map(int, opened.find(f"{each}.match(/\\d+/g)"))) for each in (back, text)]
    assert (brightness[0] < brightness[1]) == dark
    assert opened.errors == []
    assert set(opened.requests) == {page.as_uri()}


def test_the_keyboard_sorts_and_empty_cells_stay_last(opened, page):
    opened.open(page, width=1280)
    shown = opened.find(NAMES_SHOWN)
    long = shown[2]
    assert shown == ["b", "c", long, "a"]
    assert long.startswith(NASTY)
    tab_to(opened, "seed")
    opened.press("Enter")
    assert opened.find(NAMES_SHOWN) == ["b", "c", long, "a"]
    opened.press(" ")
    assert opened.find(NAMES_SHOWN) == ["a", "b", "c", long]
    sorts = "[...document.querySelectorAll('table.runs thead')[0].rows[0].cells].map(head => head.ariaSort)"
    assert [each for each in opened.find(sorts) if each != "none"] == ["descending"]
    tab_to(opened, "pgd-20")
    opened.press("Enter")  # accuracies: the best first
    assert opened.find(NAMES_SHOWN) == ["a", "b", "c", long]
    opened.press("Enter")
    assert opened.find(NAMES_SHOWN) == ["c", "b", "a", long]
    assert opened.errors == []


def test_the_keyboard_hides_and_shows_a_run_and_weights(opened, page):
    opened.open(page, width=390)
    tab_to(opened, "best")
    heads = "[...document.querySelectorAll('th.of-best, td.of-best')].filter(cell => cell.offsetWidth > 0).length"
    assert opened.find(heads) == 2 + 2 * 4
    opened.press(" ")
    assert opened.find(heads) == 0
    opened.press(" ")
    assert opened.find(heads) == 2 + 2 * 4
    tab_to(opened, "c")
    while "run-1" not in opened.find("document.activeElement.dataset.shows || ''"):
        tab_to(opened, "c")
    opened.press(" ")
    assert [opened.find(SHOWN.format(number)) for number in range(4)] == [len(CHARTS), 0, len(CHARTS), len(CHARTS)]
    assert opened.find("document.querySelectorAll('path.collapse')[0].getBoundingClientRect().width") == 0
    opened.press(" ")
    assert opened.find(SHOWN.format(1)) == len(CHARTS)
    assert opened.errors == []
