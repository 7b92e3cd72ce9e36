"""The marks around tables: what is written between them, and that every mistake names file and line."""

from __future__ import annotations

import pytest

from benchmarks.tables.markers import Difference, Place, filled, places


def draw(name):
    return f"| {name} |\n|---|\n\nsmall"


def test_what_is_between_the_marks_is_drawn_and_all_else_stays():
    text = "# A\n<!-- table: one -->\nold\n<!-- end -->\ntext  \n\n<!--table:two-->\n<!-- end -->"
    written, differing = filled(text, "a.md", draw)
    assert written == (
        "# A\n<!-- table: one -->\n\n| one |\n|---|\n\nsmall\n\n<!-- end -->\ntext  \n\n"
        "<!--table:two-->\n\n| two |\n|---|\n\nsmall\n\n<!-- end -->"
    )
    assert differing == [Difference("one", 3, "'old'", "''"), Difference("two", 8, "nothing", "''")]
    assert filled(written, "a.md", draw) == (written, [])


def test_the_first_line_that_differs_is_named():
    text = filled("<!-- table: one -->\n<!-- end -->", "a.md", draw)[0]
    for old, new, said in (
        ("| one |", "| 1 |", Difference("one", 3, "'| 1 |'", "'| one |'")),
        ("\nsmall\n", "\n", Difference("one", 6, "''", "'small'")),
        ("small\n\n", "small\n\nmore\n", Difference("one", 8, "'more'", "nothing")),
    ):
        changed = text.replace(old, new)
        assert changed != text
        assert filled(changed, "a.md", draw)[1] == [said]


def test_marks_inside_of_code_are_examples():
    text = (
        "```\n<!-- table: one -->\n```\n~~~~ html\n<!-- end -->\n~~~\n<!-- table: one -->\n~~~~\n"
        "    <!-- table: two -->\nand `<!-- end -->`\n<!-- table: three -->\n<!-- end -->"
    )
    assert places(text, "a.md") == [Place("three", 10, 11)]


@pytest.mark.parametrize(
    "text,said",
    [
        ("\n<!-- table: one -->\ntext", r"a\.md:2: expected '<!-- end -->' after table 'one', got none"),
        (
            "<!-- table: one -->\n\n<!-- table: two -->\n<!-- end -->",
            r"a\.md:3: expected '<!-- end -->' of table 'one', which begins in line 1, before the next table, got",
        ),
        ("text\n<!-- end -->", r"a\.md:2: expected '<!-- table: NAME -->' before it, got '<!-- end -->' alone"),
        ("<!-- table one -->\n<!-- end -->", r"a\.md:1: expected '<!-- table: NAME -->', got '<!-- table one -->'"),
        ("<!-- table: one two -->\n<!-- end -->", r"a\.md:1: expected '<!-- table: NAME -->', got"),
    ],
    ids=["no end", "nested", "no begin", "no colon", "two names"],
)
def test_a_mistake_is_named_with_its_line(text, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        filled(text, "a.md", draw)


def test_what_cannot_be_drawn_is_named_with_its_line():
    def missing(name):
        raise FileNotFoundError(f"table {name!r}: not there")

    with pytest.raises(FileNotFoundError, match=r"^a\.md:2: table 'one': not there$"):
        filled("\n<!-- table: one -->\n<!-- end -->", "a.md", missing)
