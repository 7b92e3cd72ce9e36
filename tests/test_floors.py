"""The floors of the package, by its imports: none goes up. Each file name says one thing, and no file is long."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import elle_fast

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "elle_fast"

# From the bottom. A file imports from the floors below, and on its own floor from what is named no later than itself.
FLOORS = [
    ("_C", "_core"),
    ("backends",),
    ("ops",),
    (
        "ranges",
        "recompute",
        "draws",
        "gradient_bound",
        "adaptive",
        "auto",
        "weighted_sum",
        "presets",
        "criterion",
        "functional",
        "attacks",
        "own_attack",
        "passes",
    ),
    ("regularizers",),
    ("ascent", "linearity"),
    ("weighing", "loss"),
    ("data",),
    ("step",),
    ("methods",),
    ("evaluation",),
    ("guard",),
    ("integrations",),
    ("__init__", "testing", "recipes", "__main__"),
]
HEIGHT = {name: height for height, name in enumerate(name for floor in FLOORS for name in floor)}
# Evaluation takes any batches, so it does without a floor below it.
APART = {("evaluation", "data")}
# An op has these files in a folder of its own.
OF_EACH_OP = {"cpp", "cuda", "native", "op", "reference", "schema", "triton", "validation"}
LONGEST = 350
PYTHON = {".py", ".pyi"}
CODE = PYTHON | {".c", ".cpp", ".cu", ".cuh", ".h"}


def sources(folder: Path, suffixes: Collection[str] = PYTHON) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in suffixes]


def part(path: Path) -> str:
    """What of the package a file belongs to: the name of a folder or a file directly below elle_fast/."""
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


def imported(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line, module and name of every import in a file, inside functions too; ``import module`` has an empty name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import, whose floor this test cannot tell"
            yield from ((node.lineno, node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            texts = [text.value for text in ast.walk(node.args[0]) if isinstance(text, ast.Constant)]
            paths = [text.rstrip(".") for text in texts if isinstance(text, str) and text.startswith("elle_fast.")]
            yield from ((node.lineno, path, "") for path in paths)


# What `from elle_fast import name` stands for, where that is no module.
EXPORTED = {name: module.split(".")[1] for _, module, name in imported(PACKAGE / "__init__.py") if "." in module}


def goal(module: str, name: str) -> str | None:
    """The part of the package that an import reaches; None outside the package."""
    folders = [*module.split("."), *filter(None, [name])]
    if folders[0] != "elle_fast":
        return None
    if len(folders) == 1 or folders[1].startswith("__"):
        return "__init__"
    return EXPORTED.get(folders[1], folders[1]) if module == "elle_fast" else folders[1]


def problem(source: str, target: str) -> str | None:
    if target not in HEIGHT:
        return f"{target} is on no floor"
    if HEIGHT[target] > HEIGHT[source] and source != "__init__":  # which has `load` import what it needs when called
        return f"{target} is above {source}"
    return f"{source} does without {target}" if (source, target) in APART else None


def test_every_file_is_on_a_floor():
    assert {part(path) for path in sources(PACKAGE)} <= HEIGHT.keys()


def test_no_import_goes_up():
    found = []
    for path in sources(PACKAGE):
        for line, module, name in imported(path):
            target = goal(module, name)
            if target is not None and (said := problem(part(path), target)):
                found.append(f"{path.relative_to(ROOT)}:{line}: {said}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source, statement, said",
    [
        ("ops", "from elle_fast.loss import ELLELoss", "loss is above ops"),
        ("ops", "def f():\n    from elle_fast import LocalLinearity", "linearity is above ops"),
        ("data", "import elle_fast", "__init__ is above data"),
        ("data", "from elle_fast import __version__", "__init__ is above data"),
        ("adaptive", "from elle_fast import attacks, ranges", "attacks is above adaptive"),
        ("evaluation", "import elle_fast.data.memory", "evaluation does without data"),
        ("loss", "from elle_fast.novelty import thing", "novelty is on no floor"),
        ("ops", "importlib.import_module(f'elle_fast.data.{name}')", "data is above ops"),
        ("loss", "import torch\nfrom elle_fast.linearity import LocalLinearity", None),
        ("recipes", "from elle_fast import __version__, data", None),
    ],
)
def test_imports_are_read_as_python_reads_them(source, statement, said, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(statement)
    goals = [found for _, module, name in imported(path) if (found := goal(module, name)) is not None]
    assert [text for target in goals if (text := problem(source, target))] == ([said] if said else [])


def test_contributing_has_the_same_floors():
    _, heading, section = (ROOT / "CONTRIBUTING.md").read_text().partition("# Floors\n")
    if not heading:
        pytest.skip("CONTRIBUTING.md has no heading 'Floors' yet")
    table = re.search(r"^\|.*\n\|[-| :]+\|\n((?:\|.*\n)+)", section, flags=re.MULTILINE)
    assert table is not None, "no Markdown table below the heading 'Floors' of CONTRIBUTING.md"
    there = {part(path) for path in sources(PACKAGE)} - {"_C", "__init__", "testing"}
    written = [there.intersection(re.findall(r"`(\w+)(?:\.py|/)[^`]*`", row)) for row in table[1].splitlines()]
    assert [names for names in written if names] == [
        names for floor in reversed(FLOORS) if (names := there.intersection(floor))
    ]


def test_no_two_files_bear_one_name():
    counts = Counter(path.stem for path in sources(PACKAGE) if path.stem != "__init__")
    twice = {name for name, count in counts.items() if count > 1}
    assert twice <= OF_EACH_OP
    for name in twice:
        assert {path.parents[1].name for path in sources(PACKAGE) if path.stem == name} == {"ops"}, name


def test_no_public_name_hides_a_module():
    modules = {part(path) for path in sources(PACKAGE)}
    for name in modules & set(elle_fast.__all__):
        assert getattr(elle_fast, name).__name__ == f"elle_fast.{name}"


@pytest.mark.parametrize("folder", ["elle_fast", "csrc", "benchmarks"])
def test_no_file_is_long(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(ROOT / folder, CODE)}
    assert len(lengths) > 10
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST} == {}


def test_only_the_tests_of_the_benchmarks_import_benchmarks():
    tests = [path for path in sources(ROOT / "tests") if (ROOT / "tests/benchmarks") not in path.parents]
    wrong = [(path, {"benchmarks", "tests"}) for path in sources(PACKAGE)] + [(path, {"benchmarks"}) for path in tests]
    assert [
        f"{path.relative_to(ROOT)}:{line}: {module}"
        for path, kept_out in wrong
        for line, module, _ in imported(path)
        if module.split(".")[0] in kept_out
    ] == []
