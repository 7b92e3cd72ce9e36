"""README: short, its promises kept by the code and by the pages that it leads to."""

from __future__ import annotations

import json
import re

import pytest

from docs.tools import method_picture, picture
from tests.docs.pages import PAGES, README, ROOT, python_of
from tests.docs.test_code import stand_ins

TEXT = README.read_text("utf-8")


def test_it_is_short_and_the_loop_comes_early():
    lines = TEXT.splitlines()
    assert len(lines) <= 150
    assert lines.index("```python") < 40


def test_the_five_line_loop_trains_and_its_stats_are_as_said():
    (block,) = (block for block in python_of(README)[1] if "criterion.stats" in block)
    names = stand_ins()
    before = [parameter.detach().clone() for parameter in names["model"].parameters()]
    exec(block, names)
    assert any((old != new).any() for old, new in zip(before, names["model"].parameters(), strict=True))
    said = re.search(r"criterion\.stats +# \{(.*?)\}", block)
    assert said is not None
    assert set(re.findall(r'"(\w+)"', said[1])) == names["criterion"].stats.keys()


def test_the_two_commands_stay_where_newcomers_and_ci_look_for_them():
    assert {"demo", "test"} <= set(re.findall(r"^    make (\w+)", TEXT, flags=re.MULTILINE))


def test_the_pictures_are_those_of_the_numbers():
    for path, content in {**picture.pictures(), **method_picture.pictures()}.items():
        assert path.read_text("utf-8") == content, f"{path.name}: run python -m docs.tools.picture and method_picture"
    light, dark = (path.read_text("utf-8") for path in picture.FILES.values())
    assert light.count("<polyline") == dark.count("<polyline") == 6
    assert light != dark


def test_a_picture_of_runs_that_are_not_there_is_an_error():
    content = json.loads(picture.SOURCE.read_text("utf-8"))
    with pytest.raises(ValueError, match="no-such-method"):
        picture.curves(content, 16 / 255, ["fgsm", "no-such-method"])


def test_each_question_of_a_new_user_is_two_clicks_away():
    # The six of the plan for the pages: from README directly.
    for page in ("lam", "collapse", "precision", "several-gpus", "inference", "evaluation", "time-and-memory"):
        assert f"](docs/guides/{page}.md)" in TEXT


def test_links_to_files_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\"]+)\"", text):
            (link,) = filter(None, target)
            if "://" not in link:
                assert (page.parent / link).is_file(), f"{page.relative_to(ROOT)}: {link}"


def test_what_is_linked_as_a_result_is_named_by_its_file():
    for page in PAGES:
        for shown, link in re.findall(r"\[`([\w.-]+\.json)`\]\(([^)]+)\)", page.read_text("utf-8")):
            assert link.endswith(f"benchmarks/results/{shown}"), f"{page.relative_to(ROOT)}: {shown} leads to {link}"
