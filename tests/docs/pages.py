"""The texts that users read, and what is in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:^ {4}\S.*\n)+", re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_RECORDED = re.compile(r"^<sub>From .*</sub>$", re.MULTILINE)  # the command of an older commit, as a JSON file has it
_BEFORE = re.compile(r"\A<!-- before the code\n(.*?)-->", re.DOTALL)
# What begins a command, in a block or within a sentence.
COMMANDS = ("elle-fast", "make", "python", "pip", "torchrun", "OMP_NUM_THREADS=", "nohup")


class Code(NamedTuple):
    """``text`` in ``page``; ``name`` for a test's name."""

    page: Path
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0][:60]}"


def python_of(page: Path) -> tuple[str, list[str]]:
    """What has to run before the page's Python, which is in a comment at its top, and the blocks."""
    text = page.read_text("utf-8")
    before = _BEFORE.match(text)
    return ("" if before is None else before[1]), [code for kind, code in _FENCED.findall(text) if kind == "python"]


def prose_of(page: Path) -> str:
    """A page without blocks of code and without what tables say of where they come from."""
    return _RECORDED.sub("", _BEFORE.sub("", _FENCED.sub("", page.read_text("utf-8"))))


def commands_of(page: Path) -> list[Code]:
    """Every command of a page: in ``sh`` blocks, in indented lines, and in code within a sentence."""
    text = page.read_text("utf-8")
    lines = [line for kind, block in _FENCED.findall(text) if kind == "sh" for line in _joined(block)]
    rest = prose_of(page)
    indented = [line[4:] for block in _INDENTED.findall(rest) for line in block.splitlines()]
    lines += [line for line in indented if line.startswith(COMMANDS)]
    for inline in _INLINE.findall(re.sub(r"\n> ?", "\n", rest)):
        code = " ".join(inline.split())
        if re.match(rf"({'|'.join(COMMANDS)})(?<!=)\s|OMP_NUM_THREADS=\S+\s", code):
            lines.append(code)
    return [Code(page, line) for line in lines]


def _joined(block: str) -> list[str]:
    """Lines without comments; those that end with a backslash go on in the next one."""
    whole = re.sub(r"\\\n\s*", "", block)
    return [line for line in whole.splitlines() if line.strip() and not line.startswith("#")]
