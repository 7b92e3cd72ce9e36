"""The workflows of .github: their form, what they may do, and that they run what this checkout has."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
named = pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
# YAML 1.1 reads the key `on` as true.
ON: Any = True
# Actions that are not GitHub's own: by commit, with its version beside it.
BY_COMMIT = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")


def load(file: Path) -> dict[Any, Any]:
    read: dict[Any, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return read


def jobs(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = load(file)["jobs"]
    return found


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(file).values() for step in job.get("steps", [])]


def commands(file: Path) -> str:
    return "\n".join(step["run"] for step in steps(file) if "run" in step)


def test_there_are_workflows():
    assert {file.stem for file in WORKFLOWS} == {"ci", "docs", "release", "wheels"}


@named
def test_form(file):
    workflow = load(file)
    assert {"name", ON, "permissions", "concurrency", "jobs"} <= set(workflow)
    for name, job in workflow["jobs"].items():
        assert ("uses" in job) != ("steps" in job), name
        if "steps" in job:
            assert job["timeout-minutes"] <= 90, name
            # A version: an image that changes under a test is no test.
            system = job["runs-on"]
            assert system == "${{ matrix.os }}" or re.fullmatch(r"(ubuntu|macos|windows)-\d[\w.-]*", system), name
        for needed in [job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []):
            assert needed in workflow["jobs"], name


@named
def test_actions_are_pinned(file):
    for line in file.read_text(encoding="utf-8").splitlines():
        found = re.match(r"\s*(?:- )?uses: (\S+)(.*)$", line)
        if found is None or found[1].startswith("./"):
            continue
        own = re.fullmatch(r"actions/[\w-]+@v\d+", found[1])
        by_commit = BY_COMMIT.fullmatch(found[1]) and re.fullmatch(r" # v\d+\.\d+\.\d+", found[2])
        assert own or by_commit, line.strip()


@named
def test_permissions_are_the_least(file):
    workflow = load(file)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    assert ON not in workflow or "pull_request_target" not in workflow[ON]
    for step in steps(file):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    for name, job in workflow["jobs"].items():
        may = {scope for scope, access in job.get("permissions", {}).items() if access == "write"}
        if may:
            # Code of this checkout, and of whatever it installs, never runs with a right to write.
            assert not [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")], name
        if "id-token" in may:
            assert "environment" in job, name


@named
def test_nothing_from_outside_is_put_into_a_shell_command(file):
    """A branch or a title is text of whoever wrote it; in the environment it stays text."""
    assert "${{" not in commands(file)


@named
def test_paths_and_targets_exist(file):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z][\w-]*)", commands(file)):
        # Written against `make docs`, which comes with the pages.
        assert target in targets, target
    for matrix in [job.get("strategy", {}).get("matrix", {}) for job in jobs(file).values()]:
        used = {*matrix.get("target", []), *(row["target"] for row in matrix.get("include", []) if "target" in row)}
        assert used <= targets
    for path in re.findall(r"\b(?:tests/[\w/.]+\.py|requirements[\w.-]*|\.github/[\w.-]+)", commands(file)):
        assert (ROOT / path).exists() or (ROOT / ".github" / path).exists(), path
    text = file.read_text(encoding="utf-8")
    for path in re.findall(r"^ +(requirements[\w.-]+)$|cache-dependency-path: ([\w.-]+)$", text, re.MULTILINE):
        assert (ROOT / (path[0] or path[1])).exists()


def test_a_release_checks_then_builds_then_publishes():
    release = jobs(ROOT / ".github/workflows/release.yml")
    assert {name: job.get("needs") for name, job in release.items()} == {
        "check": None,
        "build": "check",
        "publish": "build",
        "github": "publish",
    }
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert release["build"]["uses"] == "./.github/workflows/wheels.yml"
    assert "workflow_call" in load(ROOT / ".github/workflows/wheels.yml")[ON]
    # No cache: what a pull request has left there does not come into a release.
    for name in ("release.yml", "wheels.yml"):
        assert "cache" not in (ROOT / ".github/workflows" / name).read_text(encoding="utf-8")


def test_what_is_downloaded_was_uploaded():
    release, wheels = ROOT / ".github/workflows/release.yml", ROOT / ".github/workflows/wheels.yml"
    used = [step for step in [*steps(release), *steps(wheels)] if "uses" in step]
    uploaded = [step["with"]["name"] for step in used if "upload-artifact" in step["uses"]]
    assert {"dist-sdist", "dist-${{ matrix.os }}", "notes"} == set(uploaded)
    wanted = [step["with"] for step in used if "download-artifact" in step["uses"]]
    assert {options.get("pattern", options.get("name")) for options in wanted} == {"dist-*", "notes"}


def test_dependabot_and_forms():
    dependabot = load(ROOT / ".github/dependabot.yml")
    assert dependabot["version"] == 2
    assert {update["package-ecosystem"] for update in dependabot["updates"]} == {"github-actions", "pip"}
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        read = load(form)
        if form.name == "config.yml":
            continue
        assert {"name", "description", "body"} <= set(read)
        ids = [part["id"] for part in read["body"]]
        assert len(ids) == len(set(ids))


def test_zizmor():
    """A static analysis of what a workflow gives away; it ships as a binary and asks nothing of the network."""
    program = shutil.which("zizmor") or shutil.which("zizmor", path=str(Path(sys.executable).parent))
    if program is None:
        assert importlib.util.find_spec("zizmor") is None
        pytest.skip("zizmor is not installed")
    command = [program, "--offline", "--no-progress", "--min-severity", "medium", "."]
    done = subprocess.run(command, cwd=ROOT / ".github", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_actionlint():
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("actionlint is not installed; the lint job runs it")
    done = subprocess.run([program, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
