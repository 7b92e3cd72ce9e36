"""A griffe extension: what docstrings have of reStructuredText, as Markdown for the reference pages.

Formulas become MathML, which browsers show without a script; roles become links where their target has an entry;
a literal block after ``::`` becomes highlighted Python.
"""

from __future__ import annotations

import re
import textwrap
from html import escape
from typing import Any

import griffe
from latex2mathml.converter import convert

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`([^`]+)`")
_MATH = re.compile(r"(?m)^(?P<indent> *)\.\. math::[ ]*\n(?:[ ]*\n)*(?P<body>(?:(?P=indent)[ ]+\S.*\n|[ ]*\n)+)")
_LITERAL = re.compile(r"(?m)^(?P<indent> *)(?P<text>\S.*)?::[ ]*\n\s*\n(?P<body>(?:(?P=indent)[ ]{4}.*\n|[ ]*\n)+)")


# Letters that are a name: an upright word, not a product of variables.
_WORD = re.compile(r"\\(?:begin|end|text|mathrm|operatorname)\{[^}]*\}|\\[A-Za-z]+|(?P<word>[A-Za-z]{2,})")


def _upright(match: re.Match[str]) -> str:
    return rf"\mathrm{{{match['word']}}}" if match["word"] else match[0]


def _formulas(match: re.Match[str]) -> str:
    """Each paragraph is a formula of its own."""
    paragraphs = re.split(r"\n\s*\n", textwrap.dedent(match["body"]).strip())
    shown = []
    for paragraph in paragraphs:
        latex = _WORD.sub(_upright, " ".join(paragraph.split()))
        mathml = convert(latex, display="block").replace("\n", " ")
        opened = '<div class="formula" tabindex="0" role="group" aria-label="formula">'
        shown.append(f"{match['indent']}{opened}{mathml}</div>\n")
    return "\n" + "\n".join(shown) + "\n"


def _literal(match: re.Match[str]) -> str:
    indent = match["indent"]
    text = match["text"] or ""
    code = textwrap.dedent(match["body"]).strip("\n")
    lines = [f"{text}:" if text else "", "", "```python", *code.splitlines(), "```", ""]
    return "\n".join(indent + line if line else "" for line in lines) + "\n"


def markdown(text: str, module: str) -> str:
    """The text of a docstring; names in roles are looked up from ``module``."""

    def link(match: re.Match[str]) -> str:
        written = match[1]
        titled = re.fullmatch(r"(.*?)\s*<~?([\w.]+)>", written, flags=re.DOTALL)
        shown, target = (titled[1], titled[2]) if titled else (written.lstrip("~"), written.lstrip("~"))
        if not titled:
            shown = target.rsplit(".", 1)[-1] if written.startswith("~") else target
        full = target if target.startswith("elle_fast") or target.startswith("torch") else f"{module}.{target}"
        return f'<autoref identifier="{full}" optional><code>{escape(" ".join(shown.split()))}</code></autoref>'

    text = _MATH.sub(_formulas, text + "\n")
    text = _LITERAL.sub(_literal, text)
    return _ROLE.sub(link, text).rstrip("\n")


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of all objects of the package."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each object as it is read."""
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = markdown(obj.docstring.value, obj.module.path)
