"""The report in a real browser: Debian's chromium, without a network, in the light, in the dark and on paper.

Without chromium these tests are skipped, but where CI is set they fail.
"""

from __future__ import annotations

import html as html_entities
import json
import os
import re
import shutil
import signal
import subprocess

import matplotlib.image
import pytest
from example_page import CHARTS

from fq.report.svg import DARK, LIGHT

WIDTH = 1280
SECONDS = 300  # it is started on machines that do much else
ALONE = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run "
    "--disable-dev-shm-usage --hide-scrollbars --enable-logging=stderr --force-color-profile=srgb"
).split()
# In a copy of the page: what it looks like to those who see it, as JSON in an element of its own.
LOOK = """<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target)), true);
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const charts = [...document.querySelectorAll("figure svg")].map(svg => ({
    box: box(svg),
    words: [...svg.querySelectorAll("text")].filter(t => t.textContent.trim()).map(t => ({
      said: t.textContent, box: box(t), colour: getComputedStyle(t).fill,
      size: parseFloat(getComputedStyle(t).fontSize) * Math.hypot(t.getScreenCTM().a, t.getScreenCTM().b),
    })),
  }));
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({
    errors, charts,
    ground: getComputedStyle(document.body).backgroundColor,
    width: [document.documentElement.scrollWidth, document.documentElement.clientWidth],
    tables: [...document.querySelectorAll("table")].filter(t => t.closest("details:not([open])") == null)
      .map(t => box(t)),
    contents: [...document.querySelectorAll("nav a")].map(box),
    beyond: [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, .skip, .unseen"))
      .filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80)),
    fetched: performance.getEntriesByType("resource").map(e => e.name),
  });
  document.body.append(found);
  if (parent !== window) parent.document.body.append(found.cloneNode(true));
});
</script>"""
# Chromium's own windows are wider than a phone.
PHONE = 390
FRAME = (
    '<!DOCTYPE html><iframe src="looked-at.html" '
    f'style="border: 0; width: {PHONE}px; height: 844px"></iframe>'
)


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium")
    if found is None:
        missing = "chromium is not installed: apt-get install --no-install-recommends chromium"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return found


@pytest.fixture
def chromium(browser, tmp_path):
    def run(page, *arguments):
        """(stdout, stderr) of a browser with a profile of its own that is closed with all its children."""
        home = tmp_path / "home"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        command = [browser, *ALONE, f"--user-data-dir={home / 'profile'}", *arguments, page.as_uri()]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home)},
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        assert process.returncode == 0, err
        return out, err

    return run


@pytest.fixture(scope="module")
def page(html, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def rgb(colour):
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


SCHEMES = [pytest.param((), LIGHT, id="light"), pytest.param(("--force-dark-mode",), DARK, id="dark")]


def looked_at(page, tmp_path):
    copy = tmp_path / "looked-at.html"
    text = re.sub(r"<meta http-equiv[^>]*>", LOOK, page.read_text("utf-8"), count=1)
    assert LOOK in text
    # what is shown on demand is looked at, too
    copy.write_text(text.replace('<details class="figure">', '<details class="figure" open>'), "utf-8")
    return copy


def found_in(out):
    return json.loads(html_entities.unescape(re.search(r'<pre id="found">(.*?)</pre>', out, re.S)[1]))


@pytest.mark.parametrize("options, palette", SCHEMES)
def test_it_renders(chromium, page, tmp_path, options, palette):
    out, _ = chromium(looked_at(page, tmp_path), f"--window-size={WIDTH},900", "--dump-dom", *options)
    found = found_in(out)
    assert found["errors"] == [] and found["fetched"] == []
    scrolled, seen = found["width"]
    assert scrolled <= seen == WIDTH
    for left, _, right, bottom in found["tables"]:
        assert left >= 0 and right <= WIDTH and bottom > 0
    assert found["ground"] == rgb(palette["ground"])
    assert len(found["charts"]) == len(CHARTS)
    for key, chart in zip(CHARTS, found["charts"], strict=True):
        left, top, right, bottom = chart["box"]
        assert right - left > 0.8 * WIDTH and bottom - top > 80, key
        assert len(chart["words"]) > 6, key
        for word in chart["words"]:
            assert word["colour"] in (rgb(palette["text"]), rgb(palette["muted"])), (key, word)
            assert word["size"] >= 10, (key, word)
            x0, y0, x1, y1 = word["box"]
            assert x0 >= left - 1 and x1 <= right + 1 and y0 >= top - 1 and y1 <= bottom + 1, (key, word)
        for i, one in enumerate(chart["words"]):
            for other in chart["words"][:i]:
                a, b = one["box"], other["box"]
                across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                assert across <= 1 or down <= 4, (key, one["said"], other["said"])


def test_on_a_phone(chromium, page, tmp_path):
    """Nothing is wider than the screen but what scrolls by itself; words of a figure can be read there."""
    looked_at(page, tmp_path)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME, encoding="utf-8")
    out, _ = chromium(frame, "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom")
    found = found_in(out)
    assert found["errors"] == [] and found["width"] == [PHONE, PHONE]
    assert found["beyond"] == []
    assert len({top for _, top, _, _ in found["contents"]}) > 1, "the contents stand in one line"
    assert all(right <= PHONE for _, _, right, _ in found["contents"])
    assert len(found["charts"]) == len(CHARTS)
    for key, chart in zip(CHARTS, found["charts"], strict=True):
        assert chart["box"][2] > PHONE, (key, "as wide as the screen: too small to be read")
        assert min(word["size"] for word in chart["words"]) >= 10, key


@pytest.mark.parametrize("options, palette", SCHEMES)
def test_what_is_seen(chromium, page, tmp_path, options, palette):
    picture = tmp_path / "seen.png"
    _, err = chromium(page, f"--window-size={WIDTH},3000", f"--screenshot={picture}", *options)
    assert "CONSOLE" not in err  # where the page's own policy would say what it has stopped
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[:2] == (3000, WIDTH)
    ground = [int(palette["ground"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    blank = (abs(image - ground) < 0.02).all(axis=2)
    assert 0.3 < blank.mean() < 0.95
    for band in range(0, 3000, 500):
        assert not blank[band : band + 500].all(), band


def test_on_paper(chromium, page, tmp_path):
    paper = tmp_path / "paper.pdf"
    chromium(page, f"--print-to-pdf={paper}", "--no-pdf-header-footer", "--force-dark-mode")
    data = paper.read_bytes()
    assert data.startswith(b"%PDF") and 20_000 < len(data) < 5_000_000
    assert len(re.findall(rb"/Type /Page\b(?!s)", data)) >= 4
