"""The report's page for those who do not see it, or have no mouse: order, names, contrast."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from matplotlib import colormaps

from fq.report import verdict
from fq.report.page import report_html
from fq.report.plan_charts import letter_on
from fq.report.svg import N_SERIES


def colours(html, scheme):
    """The page's own, as its style says."""
    light, dark = re.findall(r":root \{(.*?)\}", html, re.S)
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", {"light": light, "dark": light + dark}[scheme]))


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(html, scheme):
    """WCAG's: 4.5 for text, 3 for what is drawn."""
    palette = colours(html, scheme)
    series = [f"s{i}" for i in range(N_SERIES)]
    assert set(palette) == {"ground", "raised", "grid", "text", "muted", "warning", "bad", *series}
    words = ("text", "muted", "warning", "bad", "s0")  # s0 is of links
    for ground in ("ground", "raised"):
        for name in (*words, *series):
            dark, light = sorted((luminance(palette[name]), luminance(palette[ground])))
            assert (light + 0.05) / (dark + 0.05) >= (4.5 if name in words else 3), (name, ground)


def test_a_letter_on_any_colour_can_be_read():
    for i in range(256):
        colour = colormaps["cividis"](i)
        ground = luminance("#" + "".join(f"{round(255 * c):02x}" for c in colour[:3]))
        of_letter = {"black": 0.0, "white": 1.0}[letter_on(colour)]
        dark, light = sorted((ground, of_letter))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, i


def test_headings_go_down_one_at_a_time(page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later <= earlier + 1 for earlier, later in pairwise(levels))


def test_what_is_named(html, page):
    """Sections by their headings, tables by captions, figures in words; and each link says whose it is."""
    identities = {a.get("id") for _, a in page.elements}
    for section in page.all("section"):
        assert section["aria-labelledby"] in identities
    tables = page.all("table")
    assert [tag for tag, _ in page.elements].count("caption") == len(tables) > 10
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    # in a screen reader's list of tables, and of what can be opened, each is told from the others
    captions = re.findall(r"<caption[^>]*>(.*?)</caption>", html)
    summaries = re.findall(r"<summary>(.*?)</summary>", html)
    assert len(set(captions)) == len(captions) and len(set(summaries)) == len(summaries) > 10
    assert all(a["aria-label"] for _, a in page.elements if a.get("tabindex") == "0")
    names = [a["aria-label"] for a in page.all("a") if "download" in a]
    assert len(names) == len(set(names)) and all(re.match("(SVG|CSV) of the ", name) for name in names)


def test_the_keyboard(html, page):
    first = next(
        a for tag, a in page.elements if tag in ("a", "input", "summary") or a.get("tabindex") == "0"
    )
    assert first["href"] == "#verdict", "the first stop leads past the contents"
    assert ":focus-visible" in html and "outline: none" not in html and "outline: 0" not in html
    for attributes in page.all("div"):
        if "wide" in attributes.get("class", ""):  # what scrolls, scrolls with the arrow keys
            assert attributes["tabindex"] == "0" and attributes["role"] == "group"


def test_groups_are_shown_on_demand(html, page):
    """A box for each group hides what is of it; a mark says in shape what a colour says."""
    boxes = [a["class"] for a in page.all("input")]
    assert boxes == [f"pick-{i}" for i in range(3)]
    for i in range(3):
        assert f"figure:has(.pick-{i}:not(:checked)) .series-{i} {{ display: none; }}" in html
        drawn = re.search(r'<figure id="chart-one-scale">.*?</figure>', html, re.S)[0]
        assert f'class="series-{i}"' in drawn
    marks = re.findall(r'<span class="mark"[^>]*aria-hidden="true">(.)</span>([^<]*)', html)
    assert [name for _, name in marks] == ["*[*].raw=bf16", "*[*].raw=fp8_e4m3fn", "*[*].raw=noise_bf16"]
    assert len({mark for mark, _ in marks}) == 3


def test_a_long_verdict_is_told_in_short(data, html, undrawn, monkeypatch):
    """What is said of each of many choices is there for those who open it."""
    of_choices = [said for said in verdict.verdict(data) if said.of_choice]
    assert 1 < len(of_choices) <= verdict.MOST_CHOICES < 9
    monkeypatch.setattr(verdict, "MOST_CHOICES", len(of_choices) - 1)
    long = report_html(data)
    full = re.search(r'<details class="in-full">.*?</details>', long, re.S)[0]
    assert "Which layers: *[*].raw=fp8_e4m3fn" in full and "In short" not in full and "How sure" not in full
    assert "Which layers" not in long.replace(full, "")
    assert "in-full" not in re.sub(r"<style>.*?</style>", "", html, flags=re.S) and "Which layers" in html
