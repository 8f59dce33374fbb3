from __future__ import annotations

import pytest
from example_page import example
from html_page import Page

from fq.report.page import report_html

# Drawing a page takes seconds: tests look at one.


@pytest.fixture(scope="session")
def data():
    return example()


@pytest.fixture(scope="session")
def html(data):
    return report_html(data)


@pytest.fixture(scope="session")
def page(html):
    return Page(html)
