from __future__ import annotations

import pytest
from example_page import example
from html_page import Page

from fq.report import svg
from fq.report.page import report_html

# Drawing a page takes seconds: tests look at one, or at what stands beside the drawings.


@pytest.fixture(scope="session")
def data():
    return example()


@pytest.fixture(scope="session")
def html(data):
    return report_html(data)


@pytest.fixture(scope="session")
def page(html):
    return Page(html)


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are made, with their data and all that is said of them, and not drawn."""
    empty = '<svg viewBox="0 0 1 1"><title>{}</title></svg>'
    monkeypatch.setattr(svg, "svg", lambda chart: empty.format(chart.title))
