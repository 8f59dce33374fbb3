"""What a release names more than once says the same everywhere."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def version() -> str:
    match = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.M)
    assert match
    return match[1]


def test_the_citation_is_of_this_version():
    assert re.findall(r"^version: (.+)$", read("CITATION.cff"), re.M) == [version()]
    assert re.findall(r"^license: (.+)$", read("CITATION.cff"), re.M) == ["MIT"]


def test_the_changelog_is_dated_and_in_order():
    """Unreleased on top; below it versions that fall, with dates that do not rise."""
    first, *released = re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.M)
    assert first == "[Unreleased]"
    found = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in released]
    assert all(found), released
    versions = [tuple(map(int, match.groups()[:3])) for match in found]
    dates = [datetime.date.fromisoformat(match[4]) for match in found]
    assert versions == sorted(set(versions), reverse=True)
    assert dates == sorted(dates, reverse=True)
    if "dev" not in version():
        assert version() == ".".join(map(str, versions[0])), "a version without its section"


def test_sections_of_the_changelog_have_entries_of_known_kinds():
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in re.split(r"^## ", read("CHANGELOG.md"), flags=re.M)[1:]:
        headings = re.findall(r"^### (.+)$", section, re.M)
        assert set(headings) <= kinds and len(headings) == len(set(headings))
