"""The site is built without a warning, from its own files alone, with every link and anchor in place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.pages import ROOT

pytest.importorskip("mkdocs")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice about other projects of the theme's authors
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    return folder


def pages(site: Path) -> dict[Path, str]:
    return {path: path.read_text("utf-8") for path in site.rglob("*.html")}


def test_nothing_is_fetched_from_elsewhere(site):
    for path, text in pages(site).items():
        loaded = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href|srcset)=[\"']?([^\"'\s>]+)", text)
        assert loaded
        elsewhere = [link for link in loaded if "://" in link or link.startswith("//")]
        assert not elsewhere, f"{path.name}: {elsewhere}"


def test_every_link_and_anchor_is_there(site):
    found = pages(site)
    anchors = {path: set(re.findall(r"\b(?:id|name)=[\"']?([^\"'\s>]+)", text)) for path, text in found.items()}
    seen = 0
    for path, text in found.items():
        if path.name == "404.html":
            continue
        for link in re.findall(r"<a\b[^>]*?href=[\"']?([^\"'\s>]+)", text):
            if "://" in link or link.startswith("mailto:"):
                continue
            target, _, anchor = link.partition("#")
            place = (path.parent / unquote(target)).resolve() if target else path
            assert place.is_file(), f"{path.relative_to(site)}: {link}"
            if anchor and place.suffix == ".html":
                assert unquote(anchor) in anchors[place], f"{path.relative_to(site)}: {link}"
            seen += 1
    assert seen > 1000


def test_the_numbers_behind_the_pages_come_with_them(site):
    copied = {path.name for path in (site / "files" / "benchmarks" / "results").iterdir()}
    assert {"bench_train.json", "cifar10-small.json", "detector_closed_loop.json"} <= copied


def test_docstrings_are_shown_as_they_are_meant(site):
    text = (site / "reference" / "elle-loss.html").read_text("utf-8")
    body = re.sub(r"<(?:pre|code)\b.*?</(?:pre|code)>", "", text, flags=re.DOTALL)
    for left in (".. math", ":class:", ":func:", ":meth:", "::</p>"):
        assert left not in body, left
    assert "<math" in text
    assert "triplet_fraction" in text


def test_the_options_of_the_command_line_are_on_its_page(site):
    text = (site / "reference" / "command-line.html").read_text("utf-8")
    assert 'id="train-skip-below"' in text
    assert "<!-- options" not in text
