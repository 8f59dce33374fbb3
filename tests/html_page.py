"""A page of the report as its parts: elements, text, tables, and what it would fetch."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import unquote


class Page(HTMLParser):
    """Its elements, as (tag, attributes), its text by the element around it, and rows of its tables."""

    VOID = ("meta", "link", "br", "hr", "input")

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.rows, self._open = [], [], [], []
        self.feed(html)
        self.close()
        assert not self._open, "unclosed"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        where = self._open[-1] if self._open else ""
        self.texts.append((where, data))
        if where in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, *tags):
        return " ".join(data for tag, data in self.texts if tag in tags)


def references(html):
    """What a browser might fetch, from the page and from figures that are saved."""
    page = Page(html)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name.rpartition(":")[2] in ("src", "href", "srcset", "data", "action", "poster", "background"):
                yield f"{tag} {name}", value
            if value and value.startswith("data:image/svg+xml"):
                yield from references(unquote(value.partition(",")[2]))
    html = re.sub(r'"data:[^"]*"', "", html)
    yield from (("url()", target) for target in re.findall(r"url\(([^)]*)\)", html))
