"""What is said to be supported, in pyproject.toml and in the workflows, and what a release is called."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

import elle_fast
from tests.release import check_tag

yaml = pytest.importorskip("yaml")
if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CI = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
WHEELS = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8"))["jobs"]


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def in_matrix(job: dict[str, Any], key: str) -> set[str]:
    matrix = job["strategy"]["matrix"]
    return {*matrix[key], *(row[key] for row in matrix.get("include", []) if key in row)}


CLASSIFIED = sorted(
    (
        found[1]
        for line in PYPROJECT["project"]["classifiers"]
        if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line))
    ),
    key=number,
)


def test_pythons_are_without_a_gap():
    assert [f"3.{minor}" for minor in range(number(CLASSIFIED[0])[1], number(CLASSIFIED[-1])[1] + 1)] == CLASSIFIED
    assert PYPROJECT["project"]["requires-python"] == f">={CLASSIFIED[0]}"


def test_every_python_is_tested_and_has_a_wheel():
    assert in_matrix(CI["test"], "python") == set(CLASSIFIED)
    wheels = [f"cp{python.replace('.', '')}-*" for python in CLASSIFIED]
    assert PYPROJECT["tool"]["cibuildwheel"]["build"] == wheels
    assert {CLASSIFIED[0], CLASSIFIED[-1]} <= in_matrix(WHEELS["installed"], "python")


def test_the_oldest_python_has_the_oldest_torch_and_the_newest_the_newest():
    assert CLASSIFIED[0] in in_matrix(CI["oldest-torch"], "python")
    (python,) = [
        step["with"]["python-version"]
        for step in CI["newest-torch"]["steps"]
        if "python-version" in step.get("with", {})
    ]
    assert python == CLASSIFIED[-1]


def test_every_system_is_tested_and_what_is_built_is_installed():
    assert in_matrix(CI["test"], "os") == {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"}
    assert in_matrix(WHEELS["wheels"], "os") == in_matrix(CI["test"], "os")
    assert in_matrix(WHEELS["installed"], "os") == in_matrix(CI["test"], "os") | {"windows-2025"}


def test_the_linter_reads_the_oldest_python():
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + CLASSIFIED[0].replace(".", "")


def test_build_requirements_are_bounded():
    for requirement in PYPROJECT["build-system"]["requires"]:
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<\d+", requirement), requirement


LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
TORCH = (ROOT / "requirements-torch.txt").read_text(encoding="utf-8")


def test_the_lock_has_a_version_and_hashes_for_each_package():
    lines = [line for line in LOCK.replace("\\\n", "").splitlines() if not line.startswith("#")]
    for line in lines:
        pin = r"[a-z0-9-]+(\[[\w,-]+\])?==\S+( ; [^#]+?)?( +--hash=sha256:[0-9a-f]{64})+ *"
        assert re.fullmatch(pin, line), line[:100]
    assert len(lines) > 100


def test_torch_alone_is_without_hashes():
    pinned = [line for line in TORCH.splitlines() if not line.startswith("#")]
    assert [line.split("==")[0] for line in pinned] == ["torch", "torchvision"]
    assert not re.search(r"^(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==", LOCK, re.MULTILINE)


def test_the_lock_has_what_the_extras_ask_for():
    """A new requirement without `make lock` would be missing after `make setup`, which installs no dependencies."""
    locked = {found.replace("_", "-") for found in re.findall(r"^([a-z0-9-]+)(?:\[|==)", LOCK, re.MULTILINE)}
    locked |= {"torch", "torchvision", "triton", "elle-fast"}
    extras = PYPROJECT["project"]["optional-dependencies"]
    asked, left = set(), ["dev"]
    while left:
        for requirement in extras[left.pop()]:
            name = re.match(r"[\w-]+", requirement)
            assert name is not None
            asked.add(name[0].lower())
            if inner := re.match(r"elle-fast\[([\w,-]+)\]", requirement):
                left += inner[1].split(",")
    assert asked <= locked, asked - locked


PACKAGE = '"""Docs."""\n\n__version__ = "1.2.3"\n'
CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-12-01\n\n### Added\n\n- A thing.\n\n## [1.2.2] - 2026-11-01\n"
)


def test_a_tag_is_the_version_and_has_notes():
    assert check_tag.check("v1.2.3", PACKAGE, CHANGELOG) == "### Added\n\n- A thing."


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.4", "v1.2", "v1.2.3 "])
def test_another_tag(tag):
    with pytest.raises(ValueError, match=r"^tag: expected 'v1\.2\.3' of elle_fast/__init__\.py, got "):
        check_tag.check(tag, PACKAGE, CHANGELOG)


@pytest.mark.parametrize("heading", ["## [1.2.3]\n", "## 1.2.3 - 2026-12-01\n", ""])
def test_a_release_without_notes(heading):
    changelog = CHANGELOG.replace("## [1.2.3] - 2026-12-01\n", heading)
    with pytest.raises(
        ValueError, match=r"expected a section '## \[1\.2\.3\] - YYYY-MM-DD', got \['## \[Unreleased\]'"
    ):
        check_tag.check("v1.2.3", PACKAGE, changelog)


def test_this_version_can_be_read_without_an_import():
    package = (ROOT / "elle_fast/__init__.py").read_text(encoding="utf-8")
    assert check_tag.version_of(package) == elle_fast.__version__


def test_the_changelog_is_in_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## .*$", text, re.MULTILINE)
    assert sections[0] == "## [Unreleased]"
    assert all(check_tag.HEADING.fullmatch(section) for section in sections)
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
