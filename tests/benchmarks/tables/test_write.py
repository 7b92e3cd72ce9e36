"""The command that writes the tables; that those of the committed pages are as their JSON files have them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks.tables.registry import RESULTS, Drawn, tables
from benchmarks.tables.table import Table
from benchmarks.tables.write import main, pages

PAGE = "text\n\n<!-- table: foreign-attacks -->\n<!-- end -->\n"
NUMBERS = {
    "attacks": {
        "pgd-20": {
            "samples": 8,
            "ratio": 0.5,
            "accuracy": {"elle_fast": 0.25, "foolbox": 0.375},
            "differing_samples": 1,
        }
    }
}


@pytest.fixture
def page(tmp_path):
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "foreign_attacks.json").write_text(json.dumps(NUMBERS))
    return tmp_path / "page.md"


def call(page, *more):
    return main([f"--results={page.parent}", *more, str(page)])


def test_the_tables_of_the_committed_pages_are_those_of_their_files(capsys):
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_every_table_whose_file_is_there_can_be_drawn():
    draw = Drawn()
    for name, table in tables().items():
        if (RESULTS / table.results).exists():
            lines = draw(name).split("\n")
            assert lines[1].startswith("|---")
            assert len({line.replace("\\|", "").count("|") for line in lines[:-2]}) == 1, name  # as many cells in each


def test_readme_and_the_pages_of_docs_are_looked_at(tmp_path):
    for name in ("README.md", "docs/b.md", "docs/a/c.md", "docs/d.txt", "other.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in pages(tmp_path)] == ["README.md", "docs/a/c.md", "docs/b.md"]


def test_it_writes_and_then_finds_no_difference(page, capsys):
    assert call(page, "--check") == 1
    assert "page.md:4: table 'foreign-attacks': here nothing, from its JSON file ''" in capsys.readouterr().out
    assert page.read_text() == PAGE
    assert call(page) == 0
    assert "| PGD-20 | foolbox | 8 | 25.0 / 37.5 | 1 | 0.50 |" in page.read_text().split("\n")
    assert call(page, "--check") == 0
    page.write_text(page.read_text().replace("37.5", "37.4"))
    capsys.readouterr()
    assert call(page, "--check") == 1
    assert "page.md:7: table 'foreign-attacks': here '| PGD-20 | foolbox | 8 | 25.0 / 37.4" in capsys.readouterr().out


def test_nothing_is_written_if_one_page_cannot_be(page):
    other = page.with_name("other.md")
    other.write_text("<!-- table: foreign-attacks -->\n")
    with pytest.raises(ValueError, match=r"other\.md:1: expected '<!-- end -->'"):
        main([str(page), str(other), f"--results={page.parent}"])
    assert page.read_text() == PAGE


def test_errors_name_the_table(page):
    page.write_text(PAGE.replace("foreign-attacks", "foreign"))
    with pytest.raises(ValueError, match=r"page\.md:3: table: expected one of .*'foreign-attacks'.* got 'foreign'"):
        call(page)
    page.write_text(PAGE)
    results = page.with_name("foreign_attacks.json")
    results.write_text(json.dumps({"attacks": {"pgd-20": {}}}))
    with pytest.raises(ValueError, match=r"page\.md:3: table 'foreign-attacks': .*attacks\.json.* none of 'accuracy'"):
        call(page)
    results.write_text("{")
    with pytest.raises(ValueError, match=r"page\.md:3: table 'foreign-attacks': expected a JSON file, got .*: Expect"):
        call(page)
    results.unlink()
    with pytest.raises(FileNotFoundError, match=r"page\.md:3: table 'foreign-attacks': .*attacks\.json.* not there"):
        call(page)


def test_the_list_says_which_files_are_not_there(page, capsys):
    assert call(page, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "foreign-attacks: foreign_attacks.json" in lines
    assert "digits: digits.json (not there)" in lines


def test_two_tables_of_one_name_are_refused(monkeypatch):
    module = SimpleNamespace(TABLES={"one": Table("one.json", str)})
    monkeypatch.setattr("importlib.import_module", lambda name: module)
    with pytest.raises(ValueError, match="expected tables with names of their own, got a second one called 'one'"):
        tables()
