"""The report: its words say no more than the intervals do, and its page needs nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_store import CONTROL, cells_for, data_of, run_of, save
from test_cli import environment, fq

from model import report_svg
from model.noise import noise_format
from model.report import report_html, write_pngs
from model.report_data import Group, between, kl_text, ranges, significant
from model.report_tables import at_a_glance
from model.report_verdict import additivity_words, layers_text, verdict

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-report.html"

# ---------------------------------------------------------------- runs of one's choice


def layers(n):
    return {"ffn_norm[*].raw": [f"ffn_norm[{i}].raw" for i in range(n)]}


def layer_of(cell):
    return int(re.search(r"\[(\d+)\]", cell.name)[1]) if "*" not in cell.name else None


def data_for(intervals, *, specs=("bf16",), chunks=8, done=None, together=None, drift=0.0, **options):
    """A run of one layer per interval; a layer's chunks lie evenly over it, so its own is a bit narrower."""
    n = len(intervals)

    def means(cell):
        layer = layer_of(cell)
        low, high = intervals[layer] if layer is not None else together or (1e-3, 1.1e-3)
        return np.linspace(low, high, chunks)

    run = run_of(cells_for(layers(n), specs, **options), [("ffn_norm", i) for i in range(n)], chunks)
    return data_of(run, means, done=done, drift=drift)


def said(data):
    """{what a statement is about: its text}"""
    return {one.about: " ".join(one.lines) for one in verdict(data)}


WINNER = [(1e-6, 2e-6), (1.2e-6, 2.2e-6), (1e-5, 1.1e-5), (1.1e-6, 2.1e-6)]
TIED = [(1e-6, 3e-6), (1.2e-6, 3.2e-6), (1.1e-6, 3.1e-6)]
TWO_FIRST = [(1e-5, 1.4e-5), (1e-6, 1.1e-6), (1.1e-5, 1.5e-5), (1e-7, 1.1e-7)]


# ---------------------------------------------------------------- the verdict


def test_one_layer_costs_most():
    text = said(data_for(WINNER))
    assert "Layer 2 costs most, which is resolved, in bf16." in text["In short"]
    most = text["Which layers"]
    assert re.search(
        r"Layer 2 costs most, mean KL 1\.05e-05 \(1\.0\de-05 to 1\.0\de-05\), 69 % of the sum over all 4: "
        "its interval lies above every other",
        most,
    )
    assert "The last place is shared by layers 0, 1 and 3." in most
    assert "Of 6 pairs of layers the order of 3 is resolved, that of 3 is not." in most


def test_all_layers_tied():
    text = said(data_for(TIED))
    assert "No layer is told from another: all intervals overlap, in bf16." in text["In short"]
    assert "No layer can be told from another: all 3 intervals overlap." in text["Which layers"]
    assert "which costs most is not resolved" in text["Which layers"]


def test_first_place_shared():
    text = said(data_for(TWO_FIRST))
    assert "The first place is shared by layers 0 and 2, not ordered among themselves" in text["In short"]
    assert "which of them costs most is not resolved" in text["Which layers"]
    assert "The largest figure is that of layer 2, 1.30e-05" in text["Which layers"]
    assert "Layer 3 costs least" in text["Which layers"]
    assert "Of 6 pairs of layers the order of 5 is resolved, that of 1 is not." in text["Which layers"]


def test_every_layer_has_its_place():
    text = said(data_for([(1e-6, 2e-6), (1e-5, 2e-5), (1e-4, 2e-4)]))
    assert "Then comes layer 1. Layer 0 costs least" in text["Which layers"]
    assert "The order of all 3 is resolved." in text["Which layers"]


def test_a_single_cell():
    text = said(data_for([(1e-6, 2e-6)]))
    assert "One site was measured, layer 0, in bf16." in text["In short"]
    assert "There is nothing to order." in text["Which layers"]
    assert "Perplexity goes from" in text["Which layers"]


def test_one_chunk_orders_nothing():
    text = said(data_for([(1e-6, 1e-6), (1e-3, 1e-3)], chunks=1, specs=("bf16", "int8")))
    assert "Without intervals no layer is told from another" in text["In short"]
    assert "from bf16 it is not told apart" in text["In short"] or "from int8 it is not" in text["In short"]
    assert "without intervals no order is resolved" in text["Which format at ffn_norm[*].raw"]
    assert "One chunk of 16 tokens, 7 of them scored: there are no intervals" in text["How sure"]
    assert "costs most" not in " ".join(text.values()).replace("which costs most", "")
    assert text["Which layers: ffn_norm[*].raw=bf16"].count("without an interval") == 1


def test_few_chunks_are_said_to_be_few():
    assert "Fewer than eight chunks" in said(data_for(WINNER, chunks=4))["How sure"]
    assert "Fewer than eight chunks" not in said(data_for(WINNER))["How sure"]


def test_partial():
    first = verdict(data_for(WINNER, done=3))[0]
    assert (first.about, first.tone) == ("Partial result", "warning")
    assert first.lines[0].startswith("3 of 8 chunks have ended in every cell")
    (only,) = verdict(data_for(WINNER, done=0))
    assert only.lines[0].startswith("No chunk of 8 has ended in every cell yet, so there are no figures.")


def test_the_control():
    data = data_for(WINNER)
    assert "exactly 0 in every figure" in said(data)["Control"]
    assert "The control is exactly 0." in said(data)["In short"]
    data["cells"][0]["exactly_zero"] = False
    first = verdict(data)[0]
    assert (first.about, first.tone) == ("Control", "bad")
    assert "NOT come out as 0: no figure of this run can be trusted" in first.lines[0]
    assert "exactly 0" not in said(data)["In short"]
    del data["cells"][0]
    assert "no control" in said(data)["Control"]


def test_formats_in_order():
    run = run_of(cells_for(layers(2), ("bf16", "int8", "f16")), [("ffn_norm", 0), ("ffn_norm", 1)], 8)
    scale = {"bf16": 1e-5, "int8": 1e-3, "f16": 1.01e-5}
    data = data_of(run, lambda cell: scale[cell.name.partition("=")[2]] * np.linspace(1, 1.2, 8))
    text = said(data)
    assert "int8 costs most, 99 times as much as f16, which comes next: resolved." in text["In short"]
    order = text["Which format at ffn_norm[*].raw"]
    assert "int8 1.10e-03 (" in order and "int8 costs most" in order and "that is resolved" in order
    assert "Not ordered, as their intervals overlap: f16 and bf16." in order


def test_sites_in_order():
    sites = {f"{kind}[*].raw": [f"{kind}[{i}].raw" for i in range(2)] for kind in ("attn_norm", "ffn_norm")}
    run = run_of(
        cells_for(sites, ("bf16",)), [(k, i) for i in range(2) for k in ("attn_norm", "ffn_norm")], 8
    )
    data = data_of(run, lambda cell: (1e-5 if "attn" in cell.name else 1e-6) * np.linspace(1, 1.2, 8))
    assert "attn_norm[*].raw costs most, 10 times as much as" in said(data)["Which sites in bf16"]


@pytest.mark.parametrize(
    "ratio, words",
    [(0.5, "cost less than"), (0.96, "add up"), (1.04, "add up"), (2.0, "cost more than")],
)
def test_additivity(ratio, words):
    single = np.array((1e-6, 1.1e-6))
    data = data_for([tuple(single)] * 4, together=tuple(4 * ratio * single))
    assert f"{ratio:.3f} times the sum of the single ones" in said(data)["Which layers"]
    assert words in said(data)["Which layers"] and words in additivity_words(ratio)
    assert words in at_a_glance(data).rows[0][-1]


def test_perplexity_is_resolved_or_not():
    assert (
        "No change of the perplexity is resolved." in said(data_for(TIED, together=(1e-4, 2e-4)))["In short"]
    )
    moved = data_for(TIED, together=(1e-4, 2e-4), drift=0.5)
    assert "A change of the perplexity is resolved for ffn_norm[*].raw=bf16." in said(moved)["In short"]
    assert "the interval leaves 0 out" in said(moved)["Which layers"]


def test_noise_beside_its_format():
    specs = ("bf16", noise_format("bf16"))
    run = run_of(cells_for(layers(4), specs), [("ffn_norm", i) for i in range(4)], 8)

    def means(cell):
        factor = (
            {0: 0.1, 1: 1.0, 2: 10.0, 3: 10.0, None: 4.0}[layer_of(cell)] if "noise" in cell.name else 1.0
        )
        return 1e-6 * factor * np.linspace(1, 1.2, 8)

    text = said(data_of(run, means))
    assert (
        "costs 5.28 times as much, summed over single sites. Rounding costs more than its noise at 1 of 4 "
        "sites and less at 2; at 1 that is not resolved."
    ) in text["Which layers"]
    assert not any("noise_" in about for about in text)


intervals_of_layers = st.lists(
    st.tuples(st.floats(1e-9, 1), st.floats(1e-9, 1)).map(sorted).map(tuple), min_size=2, max_size=12
)


@given(intervals_of_layers)
def test_no_layer_is_put_above_one_that_overlaps_it(intervals):
    entries = [
        {
            "name": f"ffn_norm[{i}].raw=bf16",
            "sites": [{"kind": "ffn_norm", "layer": i, "point": "raw"}],
            "comparison": {"mean_kld": sum(interval) / 2, "mean_kld_ci95_chunks": interval},
        }
        for i, interval in enumerate(intervals)
    ]
    text = layers_text(Group("ffn_norm[*].raw=bf16", entries, sum_of_singles=1.0))
    others = [intervals[:i] + intervals[i + 1 :] for i in range(len(intervals))]
    above = [str(i) for i, x in enumerate(intervals) if all(x[0] > other[1] for other in others[i])]
    below = [str(i) for i, x in enumerate(intervals) if all(x[1] < other[0] for other in others[i])]
    assert re.findall(r"Layer (\d+) costs most", text) == above
    assert re.findall(r"Layer (\d+) costs least", text) == below
    pairs = list(combinations(intervals, 2))
    ordered = sum(a[1] < b[0] or b[1] < a[0] for a, b in pairs)
    if 0 < ordered < len(pairs):
        counted = rf"Of {len(pairs)} pairs of layers the order of {ordered} is resolved"
        assert counted in text
    else:
        assert ("No layer can be told from another" in text) == (ordered == 0)
        assert (f"The order of all {len(intervals)} is resolved" in text) == (ordered == len(pairs))


# ---------------------------------------------------------------- figures as text


@pytest.mark.parametrize(
    "value, text",
    [(9.66e-3, "9.66e-03"), (-2e-7, "−2.00e-07"), (0.0, "0"), (2.5, "2.50"), (None, "–"), (np.inf, "∞")],
)
def test_kl_text(value, text):
    assert kl_text(value) == text


def test_figures_as_text():
    assert significant(24.49742, 6) == "24.4974" and significant(0.0412) == "0.0412"
    assert significant(9.999) == "10.0" and significant(-np.inf) == "−∞"
    assert between(None) == "no interval" and between((1e-6, 2e-6)) == "1.00e-06 to 2.00e-06"
    assert ranges([9, 0, 1, 2, 6, 8]) == "0–2, 6, 8 and 9"
    assert ranges([4]) == "4" and ranges([5, 4]) == "4 and 5"


# ---------------------------------------------------------------- the page


class Page(HTMLParser):
    """Its elements, as (tag, attributes), its text by the element around it, and rows of its tables."""

    VOID = ("meta", "link", "br", "hr")

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


def example(chunks=3, **options):
    """Two kinds of norm and output_norm in two formats, noise, cumulative cells: every kind of chart."""
    norms = [(kind, i) for i in range(3) for kind in ("attn_norm", "ffn_norm")] + [("output_norm", None)]
    names = [f"{kind}[{i}].raw" if i is not None else f"{kind}.raw" for kind, i in norms]
    specs = ("bf16", "fp8_e4m3fn", noise_format("bf16"))
    cells = cells_for({"*[*].raw": names}, specs, cumulative=True)
    run = run_of(cells, norms, chunks, **options)

    def means(cell):
        base = 1e-3 if "fp8" in cell.group else 1e-6
        return base * (1 + len(cell.name) % 5) * len(cell.rules) * np.linspace(1, 1.3, chunks)

    return data_of(run, means)


@pytest.fixture(scope="module")
def data():
    return example()


@pytest.fixture(scope="module")
def html(data):
    return report_html(data)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


SECTIONS = ["verdict", "layers", "heat", "perplexity", "sites", "figures", "provenance"]
CHARTS = ["together", "layers-1", "cumulative-1", "layers-2", "cumulative-2", "heat-map", "perplexity-1",
          "errors-1", "errors-2", "distribution-1"]  # fmt: skip


def test_what_is_on_the_page(data, page):
    assert [a["id"] for a in page.all("section")] == SECTIONS
    assert [a["id"] for a in page.all("figure")] == [f"chart-{key}" for key in CHARTS]
    headings = page.text("h1", "h2", "h3")
    assert "m.gguf" in headings and "(partial)" not in headings
    assert "The baseline run a second time differs from itself by exactly 0" in page.text("dd")
    assert {href[1:] for href in (a["href"] for a in page.all("a"))} <= {
        a.get("id") for _, a in page.elements
    }
    assert "fq sweep -m m.gguf -f t.txt" in page.text("pre")


def test_every_cell_is_in_the_tables(data, page):
    rows = [tuple(row) for row in page.rows]
    for entry in data["cells"]:
        c = entry["comparison"]
        name = entry["name"].partition("=")[0] if entry["kind"] != "together" else "all together"
        kl = f"{kl_text(c['mean_kld'], 4)} ± {kl_text(c['kld_se'], 2)}"
        found = [row for row in rows if row[0] == name and kl in row]
        assert found, entry["name"]
        assert f"{100 * c['same_top']:.3f} ± {100 * c['same_top_se']:.3f}" in found[0]
        low, high = c["mean_kld_ci95_chunks"]
        assert f"{kl_text(low)} to {kl_text(high)}" in found[0]
        if "rank" in entry:
            best, worst = entry["rank"]
            assert found[0][1] == (str(best) if best == worst else f"{best}–{worst}")
        assert any(row[0] == name and row[1] == kl_text(c["kld"]["max"]) for row in rows)
    sites = [row for row in rows if row[0] == "ffn_norm[1].raw" and len(row) == 10]
    assert sites and sites[0][3] == f"{10 * np.log10(900 / 0.02):.2f}"


def test_provenance(data, page):
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["model SHA-256"] == "a" * 64 and facts["text SHA-256"] == "b" * 64
    assert facts["model"] == "m.gguf" and facts["text"] == "t.txt"
    assert facts["versions"] == "fq 1.2, numpy 2" and facts["machine: processor"] == "p"
    assert "isa avx2" in facts["numerics"] and "blas openblas 0.3" in facts["numerics"]
    assert facts["started"].startswith("2026-01-01")


def test_no_folder_of_the_model(html):
    assert "somewhere" not in html


def references(html):
    """What a browser might fetch."""
    page = Page(html)
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name.rpartition(":")[2] in ("src", "href", "srcset", "data", "action", "poster", "background"):
                yield f"{tag} {name}", value
    yield from (("url()", target) for target in re.findall(r"url\(([^)]*)\)", html))


def test_nothing_is_fetched(html, page):
    found = list(references(html))
    assert len(found) > 10
    for where, target in found:
        assert target.startswith(("#", "data:")), where
    assert "@import" not in html and "@font-face" not in html
    assert not {"script", "iframe", "object", "embed", "img", "base"} & {tag for tag, _ in page.elements}
    (policy,) = (a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert not re.search(r"\bon\w+=", re.sub(r">[^<]*<", "><", html))


def test_the_kept_example():
    """docs/example-report.html: of this page's parts, and from no machine in particular."""
    html = EXAMPLE.read_text("utf-8")
    page = Page(html)
    assert [a["id"] for a in page.all("section")] == SECTIONS
    assert all(target.startswith(("#", "data:")) for _, target in references(html))
    assert not re.search(r"/(root|home|tmp|usr|work|mnt)\b", html)
    assert "differs from itself by exactly 0" in page.text("dd") and len(html) < 1.5e6


def test_every_chart_has_a_text_alternative(html, page):
    charts = page.all("svg")
    assert len(charts) == len(CHARTS)
    for attributes in charts:
        assert attributes["role"] == "img"
        title, description = attributes["aria-labelledby"].split()
        for identity, least in ((title, 20), (description, 60)):
            (text,) = re.findall(rf'id="{identity}">([^<]*)<', html)
            assert len(text) > least
    assert "largest 2.30e-06 (2.00e-06 to 2.60e-06) at attn_norm.raw layer 0, smallest 1.15e-06" in html
    captions = page.text("figcaption")
    assert captions.count("95 % interval") >= 3


def test_identities_are_one_each_and_all_there(html, page):
    identities = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identities) == len(set(identities))
    wanted = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert len(wanted) > 20 and wanted <= set(identities)


def test_colours_are_the_pages(html):
    for svg in re.findall(r"<svg.*?</svg>", html, re.S):
        assert "var(--text)" in svg and "var(--muted)" in svg
        assert "#fe01" not in svg
        assert "#000000" not in svg or "heat-map" in svg  # whose dots lie on colours of their own
    assert html.count("prefers-color-scheme: dark") == 1 and "@media print" in html


def luminance(colour):
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("palette", [report_svg.LIGHT, report_svg.DARK])
def test_contrast_with_the_ground(palette):
    """WCAG's: 4.5 for text, 3 for what is drawn."""
    for name, colour in palette.items():
        if name not in ("ground", "grid"):
            a, b = sorted((luminance(colour), luminance(palette["ground"])))
            assert (b + 0.05) / (a + 0.05) >= (4.5 if name in ("text", "muted") else 3), name


NASTY = "<script>alert(1)</script>&amp;\"' $x^{2}$ {{ 7 * 7 }} ]]> \x1b[2J.gguf"


def test_what_the_store_says_is_escaped():
    run = run_of(cells_for(layers(2), ("bf16",)), [("ffn_norm", 0), ("ffn_norm", 1)], 2)
    settings = run.settings | {"model": f"/x/{NASTY}", "text": NASTY, "command": NASTY}
    cells = [
        CONTROL,
        *(replace(cell, name=f"{cell.name}{NASTY}", group=f"g={NASTY}") for cell in run.cells[1:]),
        replace(run.cells[1], name=NASTY, group="", kind="mine"),
    ]
    run = replace(run, cells=tuple(cells), settings=settings, machine={NASTY: NASTY}, versions={NASTY: NASTY})
    html = report_html(data_of(run, lambda cell: np.array([1e-6, 2e-6])))
    page = Page(html)
    assert not page.all("script")
    shown = NASTY.replace("\x1b", r"\x1b").rpartition("/")[2]  # of the model and the text the last part
    for where in (("h1",), ("pre",), ("td",), ("text",), ("title",), ("desc",), ("h3",), ("dd",)):
        assert shown in page.text(*where), where
    assert "\x1b" not in html and "49" not in page.text("h1")


def test_the_same_figures_make_the_same_page(data, html):
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert report_html(data) == html
        assert matplotlib.rcParams["font.size"] == 20
    assert matplotlib.rcParams["svg.hashsalt"] is None


@pytest.mark.parametrize(
    "data, charts",
    [
        (data_for(WINNER, done=3), 5),
        (data_for([(1e-6, 2e-6)]), 5),
        (data_for(TIED, chunks=1, specs=("bf16", "int8")), 7),
        (data_for(WINNER, done=0), 0),
    ],
    ids=["partial", "single cell", "one chunk", "nothing yet"],
)
def test_runs_with_less(data, charts):
    page = Page(report_html(data))
    assert len(page.all("svg")) == charts
    assert ("(partial)" in page.text("h1")) == data["partial"]
    assert ("no interval" in page.text("td")) == (data["n_chunks"] == 1)
    assert [a["id"] for a in page.all("section")][-1] == "provenance"


def test_a_broken_models_figures():
    data = data_for(WINNER)
    for entry in data["cells"][1:3]:
        c = entry["comparison"]
        for key, value in (("mean_kld", np.inf), ("ln_ppl_ratio", np.nan), ("ppl_quant", np.inf)):
            c[key] = value
        c["mean_kld_ci95_chunks"] = c["ln_ppl_ratio_ci95_chunks"] = (np.nan, np.nan)
        c["kld"] = dict.fromkeys(c["kld"], np.inf)
        entry["sites"][0]["sqnr_db"] = None
    html = report_html(data)
    assert "∞" in Page(html).text("td") and ">nan<" not in html


def test_a_big_sweep_stays_small():
    norms = [(kind, i) for i in range(30) for kind in ("attn_norm", "ffn_norm")]
    specs = ("bf16", "f16", "fp8_e4m3fn", "fp8_e5m2", "int8", "int4")
    run = run_of(cells_for({"*[*].raw": [f"{k}[{i}].raw" for k, i in norms]}, specs), norms, 2)
    seed = np.random.default_rng(1)
    html = report_html(data_of(run, lambda cell: seed.lognormal(-12, 2) * np.array([1, 1.2])))
    assert len(html.encode()) < 2e6
    assert len(Page(html).all("figure")) == 13


# ---------------------------------------------------------------- the command


def test_pngs(data, tmp_path):
    written = write_pngs(data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{key}.png" for key in CHARTS)
    for path in written:
        image = matplotlib.image.imread(path)
        assert image.shape[1] == int(9.2 * 160) and image[..., :3].std() > 0.02, path
        assert image[0, 0, :3].min() == 1.0  # in the light, whatever the screen is


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "s.sqlite"
    norms = [("ffn_norm", 0), ("ffn_norm", 1)]
    run = run_of(cells_for(layers(2), ("bf16",)), norms, 2)
    save(path, run, lambda cell: np.array([1e-6, 1.2e-6]))
    save(
        path, replace(run, settings=run.settings | {"model": "second.gguf"}), lambda cell: np.ones(2), done=1
    )
    return path


def test_the_newest_run_and_others(store, tmp_path):
    out, err = fq("report", "--store", store, cwd=tmp_path)
    assert out == "" and "run 2 of" in err and "partial: 1 of 2 chunks: fq-report-2.html" in err
    assert "second.gguf" in Page((tmp_path / "fq-report-2.html").read_text("utf-8")).text("h1")
    _, err = fq("report", 1, "--store", store, "-o", "a.html", "--png", "x/y", cwd=tmp_path)
    assert "5 plots in x/y" in err and len(list((tmp_path / "x/y").iterdir())) == 5
    out, err = fq("report", 1, "--store", store, "-o", "-", cwd=tmp_path)
    assert out == (tmp_path / "a.html").read_text("utf-8") and err == ""


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((7,), "there is no run 7"),
        (("--store", "none.sqlite"), "none.sqlite: there is no such file"),
        (("-o", "no/such/a.html"), "-o no/such/a.html: cannot be written there"),
        (("--png", "s.sqlite"), "--png s.sqlite: "),
    ],
)
def test_what_cannot_be(store, tmp_path, arguments, said):
    if "--store" not in arguments:
        arguments = (*arguments, "--store", store)
    _, err = fq("report", *arguments, status=2, cwd=tmp_path)
    assert err.startswith("fq: error: ") and said in err and err.count("\n") == 1


def test_without_matplotlib(store, tmp_path):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/matplotlib.py").write_text("raise ImportError('hidden')\n")
    env = environment(first_on_path=str(tmp_path / "hidden"))
    _, err = fq("report", "--store", store, status=2, env=env, cwd=tmp_path)
    assert "pip install 'fq[report]'" in err
    fq("results", 1, "--store", store, env=env)


def test_other_commands_do_not_pay_for_it(store):
    code = (
        "import sys; from model.cli import main; main(['results', '1', '--store', sys.argv[1]]); "
        "sys.exit('matplotlib' in sys.modules or 'model.report' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, store], check=True, env=environment(), capture_output=True)
