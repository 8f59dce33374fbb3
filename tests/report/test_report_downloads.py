"""What can be saved from a report's page: its figures as SVG files and their numbers as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from dataclasses import replace
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from example_page import CHARTS, example
from html_page import Page
from report_store import CONTROL, cells_for, data_of, layers, run_of

from fq.report.data import kl_text
from fq.report.downloads import csv_text, svg_url
from fq.report.page import report_html
from fq.report.svg import LIGHT

SVG = "{http://www.w3.org/2000/svg}"


def saved(html):
    """{file's name: its text}"""
    links = [a for a in Page(html).all("a") if "download" in a]
    assert len({a["download"] for a in links}) == len(links)
    for link in links:
        kind, text = link["href"].split(",", 1)
        wanted = "data:image/svg+xml" if link["download"].endswith(".svg") else "data:text/csv"
        assert kind == f"{wanted};charset=utf-8"
        assert not set(text) & set('#<>"&\n\t'), "a browser would cut it"
    return {a["download"]: unquote(a["href"].split(",", 1)[1]) for a in links}


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def files(html):
    return saved(html)


def test_every_figure_has_both(files):
    names = {f"fq-run-1-{key}.{kind}" for key in CHARTS for kind in ("svg", "csv")}
    assert set(files) == names


@pytest.mark.parametrize("key", CHARTS)
def test_a_saved_figure_stands_alone(files, key):
    root = ElementTree.fromstring(files[f"fq-run-1-{key}.svg"])
    assert root.tag == f"{SVG}svg" and root.get("width").endswith("pt") and root.get("font-family")
    assert root.find(f"{SVG}title").text and len(root.find(f"{SVG}desc").text) > 60
    assert root.find(f"{SVG}rect").get("fill") == LIGHT["ground"]
    text = files[f"fq-run-1-{key}.svg"]
    assert "var(" not in text and LIGHT["text"] in text
    tags = {element.tag for element in root.iter()}
    assert not tags & {f"{SVG}{tag}" for tag in ("script", "foreignObject", "a", "image")}
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]
    identities = Counter(element.get("id") for element in root.iter() if element.get("id"))
    wanted = set(re.findall(r"(?:url\(#|href='#)([^)']+)", text))
    assert wanted <= set(identities) and set(identities.values()) == {1}


def test_csv_of_layers_is_the_runs_figures(data, files):
    """Each cell of the group once, with its interval, to the last bit; its noise beside it."""
    rows = {row["cell"]: row for row in rows_of(files["fq-run-1-layers-1.csv"])}
    mine = [
        entry
        for entry in data["cells"]
        if entry["group"] in ("*[*].raw=bf16", "*[*].raw=noise_bf16") and entry["kind"] == "single"
    ]
    assert sorted(rows) == sorted(entry["name"] for entry in mine) and len(mine) == 14
    for entry in mine:
        row, c, site = rows[entry["name"]], entry["comparison"], entry["sites"][0]
        assert float(row["mean_kld"]) == c["mean_kld"]
        assert (float(row["ci95_low"]), float(row["ci95_high"])) == tuple(c["mean_kld_ci95_chunks"])
        assert row["layer"] == ("" if site["layer"] is None else str(site["layer"]))
        assert row["kind"] == f"{site['kind']}.raw" and row["site"] == entry["name"].partition("=")[0]
        assert ("noise" in row["series"]) == ("noise" in entry["group"])


@pytest.mark.parametrize("key", ["one-scale", "heat-map"])
def test_csv_of_all_groups_is_the_runs_figures(data, files, key):
    rows = rows_of(files[f"fq-run-1-{key}.csv"])
    found = {(row["group"], row["cell"]): float(row["mean_kld"]) for row in rows}
    singles = [entry for entry in data["cells"] if entry["kind"] == "single"]
    assert found == {(e["group"], e["name"]): e["comparison"]["mean_kld"] for e in singles}
    assert len(rows) == len(found)


def test_csv_of_the_other_figures(data, files):
    by_name = {entry["name"]: entry for entry in data["cells"]}
    for row in rows_of(files["fq-run-1-together.csv"]):
        assert float(row["mean_kld"]) == by_name[row["group"]]["comparison"]["mean_kld"]
    for row in rows_of(files["fq-run-1-perplexity-1.csv"]):
        c = by_name[row["cell"]]["comparison"]
        assert float(row["ppl_change_percent"]) == pytest.approx(100 * np.expm1(c["ln_ppl_ratio"]))
        low, high = (100 * np.expm1(end) for end in c["ln_ppl_ratio_ci95_chunks"])
        assert (float(row["ci95_low"]), float(row["ci95_high"])) == pytest.approx((low, high))
    for row in rows_of(files["fq-run-1-distribution-1.csv"]):
        c = by_name[f"{row['site']}={row['group'].partition('=')[2]}"]["comparison"]
        assert float(row["99.9%"]) == c["kld"]["99.9%"] and float(row["max"]) == c["kld"]["max"]
    for row in rows_of(files["fq-run-1-errors-1.csv"]):
        site = by_name[f"{row['site']}={row['group'].partition('=')[2]}"]["sites"][0]
        assert float(row["SQNR, dB"]) == site["sqnr_db"]


def test_csv_of_who_pays(data, files):
    """Of each format all sites together and those that cost most alone; a chunk's share is of the sum."""
    rows = {row["cell"]: row for row in rows_of(files["fq-run-1-few-tokens.csv"])}
    assert not any("noise" in name for name in rows)
    for spec in ("bf16", "fp8_e4m3fn"):
        singles = [e for e in data["cells"] if e["group"].endswith(f"={spec}") and e["kind"] == "single"]
        most = max(singles, key=lambda entry: entry["comparison"]["mean_kld"])
        by_few = max(singles, key=lambda entry: entry["comparison"]["who_pays"]["top"]["1%"])
        whole = next(e for e in data["cells"] if e["name"] == f"*[*].raw={spec}")
        for name, entry in (
            (most["name"], most),
            (by_few["name"], by_few),
            (f"*[*].raw={spec}, together", whole),
        ):
            klds, top = entry["comparison"]["chunks"]["mean_kld"], entry["comparison"]["who_pays"]["top"]
            assert float(rows[name]["largest_chunk"]) == pytest.approx(max(klds) / sum(klds))
            assert [float(rows[name][f"top_{part}"]) for part in top] == list(top.values())


def test_the_largest_tokens_are_named(data, undrawn):
    rows = Page(report_html(data)).rows
    whole = next(e for e in data["cells"] if e["name"] == "*[*].raw=bf16")
    for token in whole["comparison"]["who_pays"]["largest"]:
        share = f"{100 * token['share']:.1f} %"
        wanted = [
            str(data["chunks_of_text"][token["chunk"]]),
            str(token["token"]),
            kl_text(token["kld"]),
            share,
        ]
        assert ["all together", *wanted] in rows


def test_a_broken_models_numbers_are_left_out(undrawn):
    data = example(specs=("bf16",))
    broken = data["cells"][1]
    broken["comparison"]["mean_kld"] = np.inf
    broken["comparison"]["mean_kld_ci95_chunks"] = (np.nan, np.nan)
    rows = rows_of(saved(report_html(data))["fq-run-1-heat-map.csv"])
    (row,) = (row for row in rows if row["cell"] == broken["name"])
    assert row["mean_kld"] == row["ci95_low"] == row["ci95_high"] == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)"])
def test_no_text_is_a_formula(text):
    (row,) = csv.reader(io.StringIO(csv_text([[text, -1.5, None, float("nan"), 'a,"b"\n=2']])))
    assert row == [f"'{text}", "-1.5", "", "", 'a,"b"\n=2']


HOSTILE = "</svg></a><script>alert(1)</script>'\"> #%23,\n&lt;"


def test_names_from_the_store_stay_text():
    """In a file that is saved, too: neither markup nor the end of a link."""
    run = run_of(cells_for(layers(2), ("bf16", "int8")), [("ffn_norm", 0), ("ffn_norm", 1)], 2)
    cells = [replace(c, name=f"{HOSTILE}{c.name}", group=f"{HOSTILE}{c.group}") for c in run.cells[1:]]
    html = report_html(data_of(replace(run, cells=(CONTROL, *cells)), lambda cell: np.array([1e-6, 2e-6])))
    assert not {"script", "iframe"} & {tag for tag, _ in Page(html).elements}
    shown = HOSTILE.replace("\n", "\\n")
    for name, text in saved(html).items():
        if name.endswith(".csv"):
            assert any(shown in value for row in rows_of(text) for value in row.values())
        else:
            root = ElementTree.fromstring(text)
            assert f"{SVG}script" not in {element.tag for element in root.iter()}
            assert shown in "".join(root.itertext()) or "errors" in name  # these name the format alone


@pytest.mark.parametrize("name", ["var(--x)", "var(--ground)", "#fe0100"])
def test_a_name_is_no_colour(name):
    text = f'<svg viewBox="0 0 9 9"><title>{name}</title><path fill="var(--text)"/><defs/></svg>'
    root = ElementTree.fromstring(unquote(svg_url(text).partition(",")[2]))
    assert root.find(f"{SVG}title").text == name
    assert root.find(f"{SVG}path").get("fill").startswith("#")


def test_a_name_is_no_stand_in_of_a_colour():
    """In the page's own figures, where each colour is drawn as another first."""
    run = run_of(cells_for(layers(2), ("bf16",)), [("ffn_norm", 0), ("ffn_norm", 1)], 2)
    cells = [replace(c, group=f"{c.group} #fe0100") for c in run.cells[1:]]
    html = report_html(data_of(replace(run, cells=(CONTROL, *cells)), lambda cell: np.array([1e-6, 2e-6])))
    descriptions = re.findall(r"<desc[^>]*>(.*?)</desc>", html)
    assert any("#fe0100" in text for text in descriptions) and "var(--" not in "".join(descriptions)
    assert "#fe01" not in "".join(re.findall(r"<(?:path|g|use)[^>]*>", html))


def test_a_quote_in_a_figures_words_stays():
    text = '<svg viewBox="0 0 9 9"><title>a "b" \'c\' ="d"</title><defs/></svg>'
    root = ElementTree.fromstring(unquote(svg_url(text).partition(",")[2]))
    assert root.find(f"{SVG}title").text == 'a "b" \'c\' ="d"'
