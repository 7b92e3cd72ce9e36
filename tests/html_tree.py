"""A page of HTML as its elements and its text."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

EMPTY = {"meta", "img", "br", "input", "line", "polygon"}


class Tree(HTMLParser):
    """Checks that each element is closed; keeps the elements, their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "bdi":  # within a text
            self.text = self.text.removesuffix("|")
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data}|" if self.open and self.open[-1] not in ("style", "script") else ""

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]
