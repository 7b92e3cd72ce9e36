"""Every command in README, CONTRIBUTING and the pages is one that exists, with options that exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from docs.tools import options
from elle_fast.recipes import cli
from elle_fast.recipes.config import TrainConfig, TrainOptions
from tests.docs.pages import PAGES, ROOT, Code, commands_of, prose_of

# In Python 3.10 there is no tomllib.
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
EXTRAS = set(re.findall(r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
TARGETS = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
ALL = [command for page in PAGES for command in commands_of(page)]


def check(command: str) -> None:
    """Raise where a command cannot be meant as it stands; an ellipsis stands for options of the reader's."""
    line = re.split(r"\s#\s|\s>\s|\s2?>", command)[0].strip()
    words = shlex.split(line)
    while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("nohup",)):
        words = words[1:]
    words = [word for word in words if word not in ("...", "&")]
    first, rest = words[0], words[1:]
    if first == "torchrun":
        assert "-m" in rest, "torchrun without -m"
        assert rest[rest.index("-m") + 1] == "elle_fast"
        first, rest = "elle-fast", rest[rest.index("-m") + 2 :]
    if first == "elle-fast":
        check_ours(rest)
    elif first == "make":
        for word in rest:
            assert "=" in word or word in TARGETS, f"no such target: {word}"
    elif first == "pip":
        assert rest[0] == "install"
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= EXTRAS, f"no such extra: {extra}"
    elif first.startswith("python"):
        check_python(rest)
    else:
        raise AssertionError(f"cannot tell whether this is right: {line}")


def check_ours(rest: list[str]) -> None:
    if not rest or rest[0] == "COMMAND":  # of any
        return
    command, given = rest[0], rest[1:]
    if not given or given == ["--help"]:
        assert command in cli.COMMANDS, f"no such command: {command}"
        return
    if command == "export" and given[-1] == "--to":  # as the head of a table
        given = given[:-1]
    if "--config" in given:  # a file that is not here
        place = given.index("--config")
        given = given[:place] + given[place + 2 :]
    cli.read_options(command, given)


def check_python(rest: list[str]) -> None:
    if rest == ["-m"]:
        return
    if rest[0] == "-m":
        name = rest[1]
        if name in ("pytest", "mkdocs") or name.endswith(".FOLDER.NAME"):
            return
        if name == "elle_fast":
            return check_ours(rest[2:])
        assert importlib.util.find_spec(name) is not None, f"no such module: {name}"
    elif rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), f"no such file: {rest[0]}"
    else:
        raise AssertionError(f"cannot tell whether this is right: {rest}")


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_a_command_is_understood(command: Code):
    check(command.text)


@pytest.mark.parametrize(
    "wrong",
    [
        "elle-fast train --no-such-option 1",
        "elle-fast train --method no-such-method --lam x",
        "elle-fast frobnicate",
        "make no-such-target",
        "pip install '.[no_such_extra]'",
        "python -m benchmarks.no.such_module",
        "python examples/no_such_file.py",
        "torchrun -m elle_fast train --no-such-option",
    ],
)
def test_a_wrong_command_is_seen(wrong):
    with pytest.raises((AssertionError, ValueError, ModuleNotFoundError)):
        check(wrong)


def test_the_pages_have_the_commands_that_they_should():
    said = {command.text.split()[0] for command in ALL}
    assert {"elle-fast", "make", "python", "pip", "OMP_NUM_THREADS=4"} <= said
    assert len(ALL) > 60


def test_options_within_a_sentence_exist():
    known = {
        name
        for command in ("train", "report", "eval", "export")
        for option in options.options(command)
        for name in re.findall(r"--[\w-]+", option.flags)
    }
    # Of other programs that the pages name.
    known |= {"--help", "--nproc_per_node", "--standalone"}
    others = {"--stages", "--dry-run", "--scale", "--variants", "--no-deps"}
    for page in PAGES:
        if page.name == "CONTRIBUTING.md":
            continue
        for code in re.findall(r"`([^`\n]*--[^`]*)`", prose_of(page)):
            if not code.startswith(("make", "python", "ARGS")):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known - others
                assert not unknown, f"{page.relative_to(ROOT)}: {unknown}"


def test_the_reference_has_every_option_of_train():
    listed = {option.flags.split(",")[0].split(" ")[0] for option in options.options("train")}
    wanted = {each.name for kind in (TrainConfig, TrainOptions) for each in fields(kind)} - {"run"}
    assert listed == {"--" + name.replace("_", "-") for name in wanted}
    text = options.markdown("train")
    assert "`--eps NUMBER`{ #train-eps }" in text
    assert "Default: `8/255`." in text


def test_a_page_of_the_reference_names_each_command():
    text = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    for command in cli.COMMANDS:
        assert f"`elle-fast {command}`" in text
    assert Path(options.__file__).is_relative_to(ROOT)
