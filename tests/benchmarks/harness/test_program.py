import argparse
import json
from pathlib import Path

import pytest

from benchmarks.harness.program import command, listed, number, parser, write_lines


def options_of():
    made = parser("benchmarks.some.thing", "What it does.")
    made.add_argument("--out", type=Path, default=Path("runs") / "out.json")
    made.add_argument("--seeds", type=listed(number), default=(1, 2))
    made.add_argument("--only", action="append")
    made.add_argument("--dry-run", action="store_true")
    return made


def test_a_command_has_what_differs_from_the_defaults_and_no_folder():
    given = ["--only", "a b", "--only", "c", "--seeds", "3,4", "--out", "/somewhere/else/x.json", "--dry-run"]
    words = command(options_of(), options_of().parse_args(given))
    assert words == [
        *("python", "-m", "benchmarks.some.thing"),
        *("--out=x.json", "--seeds=3,4", "--only=a b", "--only=c", "--dry-run"),
    ]
    assert command(options_of(), options_of().parse_args([])) == ["python", "-m", "benchmarks.some.thing"]
    # Typed again, it gives the same options.
    again = options_of().parse_args(words[3:])
    assert (again.seeds, again.only, again.dry_run) == ((3, 4), ["a b", "c"], True)


@pytest.mark.parametrize("text", ["1,0", "1,x", "1,,2"])
def test_a_list_names_the_value_that_is_wrong(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected an integer >= 1, got '(0|x|)'"):
        listed(number)(text)


def test_a_line_for_each_value_of_a_file(tmp_path):
    content = {"note": "text", "of": {"a": {"x": [1, 2]}, "b": {}}, "empty": {}}
    write_lines(tmp_path / "file.json", content)
    lines = (tmp_path / "file.json").read_text().splitlines()
    assert '    "a": {"x": [1, 2]},' in lines
    assert json.loads("\n".join(lines)) == content
