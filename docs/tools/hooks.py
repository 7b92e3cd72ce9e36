"""MkDocs hooks: README, CONTRIBUTING and others as pages, and links to files of the repository.

The pages link to files outside of ``docs/`` by paths that work in a checkout and on a code host. Here such a file joins
the site, under ``files/``, and the link follows it. So each text and each JSON file exists once.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # MkDocs runs this file by its path

from docs.tools import options  # noqa: E402

# Texts of the repository that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "development/contributing.md",
    "CHANGELOG.md": "development/changelog.md",
    "SECURITY.md": "development/security.md",
}
_LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\s\"#]+)(#[^)\s\"]*)?(?=[)\"])")
_OPTIONS = re.compile(r"<!-- options: (\w+) -->")
_BEFORE = re.compile(r"\A<!-- before the code\n.*?-->\n", re.DOTALL)  # what the tests of the page need
_PICTURE = re.compile(
    r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img [^>]*alt="([^"]*)" src="([^"]+)"[^>]*>\s*</picture>'
)


def _outside(links: str, folder: Path) -> dict[str, Path]:
    """The links of a text in ``folder`` that lead to something in the repository, by how they are written."""
    found = {}
    for match in _LINK.finditer(links):
        target = match[2]
        if "://" not in target and not target.startswith(("mailto:", "/")):
            path = Path(os.path.normpath(folder / target))
            if path.is_relative_to(ROOT) and path.exists():
                found[target] = path
    return found


def _place(path: Path) -> str | None:
    """Where a file of the repository is in the site, from its root."""
    name = path.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    return f"files/{name}" if path.is_file() else None


def _on_the_site(text: str, folder: Path, at: str) -> str:
    """The text of a file in ``folder`` with links as they have to be on the page ``at``."""
    outside = _outside(text, folder)

    def moved(match: re.Match[str]) -> str:
        path = outside.get(match[2])
        place = None if path is None else _place(path)
        if place is None:
            return match[0]
        return match[1] + os.path.relpath(place, Path(at).parent) + (match[3] or "")

    # Material chooses by its own switch which of the two is shown.
    text = _PICTURE.sub(r"![\2](\3#only-light)\n![\2](\1#only-dark)", text)
    return _LINK.sub(moved, text)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages from outside of ``docs/`` and every file that a page links to."""
    sources = [ROOT / name for name in PAGES]
    sources += [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    wanted = {path for source in sources for path in _outside(source.read_text("utf-8"), source.parent).values()}
    for name, page in PAGES.items():
        text = (ROOT / name).read_text("utf-8")
        files.append(File.generated(config, page, content=_on_the_site(text, ROOT, page)))
    for path in sorted(wanted):
        place = _place(path)
        if place is None:
            raise PluginError(f"a page links to the folder {path.relative_to(ROOT)}; link to a file in it")
        if place.startswith("files/"):
            files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links that leave ``docs/`` follow the files into the site, and put the command line's options in."""
    at = page.file.src_uri
    markdown = _BEFORE.sub("", markdown)
    if at in PAGES.values():
        return markdown
    markdown = _OPTIONS.sub(lambda match: options.markdown(match[1]), markdown)
    return _on_the_site(markdown, (ROOT / "docs" / at).parent, at)


def on_page_content(html: str, **_: Any) -> str:
    """A corner cell that names nothing is no heading."""
    return re.sub(r"<th([^>]*)></th>", r"<td\1></td>", html)


def on_post_page(output: str, **_: Any) -> str:
    """The theme leaves its search without a name; assets/site.js does the rest."""
    search = 'data-md-component="search" role="dialog"'
    return output.replace(search, f'{search} aria-label="Search"')
