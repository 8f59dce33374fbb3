"""The report's page: what is on it, and that it needs nothing else; and its command."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from command_line import environment, fq
from example_page import CHARTS, example
from html_page import Page, references
from report_store import CONTROL, TIED, WINNER, cells_for, data_for, data_of, layers, run_of, save

from fq.report.axes import positions
from fq.report.data import groups_of, kl_text, same_top_text
from fq.report.page import pngs, report_html

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-report.html"

# ---------------------------------------------------------------- the page


SECTIONS = ["verdict", "layers", "heat", "perplexity", "who", "sites", "figures", "provenance"]


def test_what_is_on_the_page(data, page):
    assert [a["id"] for a in page.all("section")] == SECTIONS
    assert [a["id"] for a in page.all("figure")] == [f"chart-{key}" for key in CHARTS]
    headings = page.text("h1", "h2", "h3")
    assert "m.gguf" in headings and "(partial)" not in headings
    assert "The baseline run a second time differs from itself by exactly 0" in page.text("dd")
    assert {a["href"][1:] for a in page.all("a") if "download" not in a} <= {
        a.get("id") for _, a in page.elements
    }
    assert "fq sweep -m m.gguf -f t.txt" in page.text("pre")


def test_where_static_scales_come_from(data, undrawn):
    text = {"name": "texts/other.txt", "sha256": "ab12"}
    scales = {"file": "a/cal.json", "method": "largest", "per": "channel", "text": text, "same_text": False}
    scales |= {"model": {"file": "b/other.gguf", "sha256": "cd34"}}
    rows = Page(report_html(data | {"calibrations": [scales]})).rows
    said = "largest per channel, of other.gguf, on other.txt, SHA-256 ab12"
    assert ["static scales: cal.json", said] in rows


def test_every_cell_is_in_the_tables(data, page):
    rows = [tuple(row) for row in page.rows]
    for entry in data["cells"]:
        c = entry["comparison"]
        name = entry["name"].partition("=")[0] if entry["kind"] != "together" else "all together"
        kl = kl_text(c["mean_kld"], 4)
        found = [row for row in rows if row[0] == name and kl in row]
        assert found, entry["name"]
        if entry["kind"] == "control":
            assert found[0][5] == "100 %"
            continue
        # of the same name in another format, too
        (row,) = (row for row in found if same_top_text(entry) == row[5] and len(row) == 6)
        low, high = c["mean_kld_ci95_chunks"]
        assert f"{kl_text(low)} to {kl_text(high)}" in row
        if entry["kind"] == "single":
            best, worst = entry["rank"]
            assert row[1] == (str(best) if best == worst else f"{best}–{worst}")
        assert [name, kl_text(c["kld_se"], 2)] in [list(row[:2]) for row in rows]
        assert any(row[0] == name and row[1] == kl_text(c["kld"]["max"]) for row in rows)
    sites = [row for row in rows if row[0] == "ffn_norm[1].raw" and len(row) == 12]
    assert sites and sites[0][3] == f"{10 * np.log10(900 / 0.02):.2f}"


def test_what_takes_tokens_as_independent_is_said_to(html, page):
    """Nowhere else is there a ±: what leads is the interval over chunks."""
    parts = html.split("±")
    assert len(parts) > 2
    assert all(
        part.startswith(" of llama-perplexity, which takes tokens as independent") for part in parts[1:]
    )
    assert re.search(r"perplexity of the unrounded model [\d.]+ \([\d.]+ to [\d.]+\)", page.text("p"))


def test_realisations_have_no_place_of_their_own(undrawn):
    """They are of a cell's perplexity: no row, no chart, no group."""
    data = data_for(WINNER)
    whole = next(entry for entry in data["cells"] if entry["kind"] == "together")
    before = report_html(data)
    for seed in range(3):
        name = f"{whole['name']}:dither,seed={seed}"
        data["cells"].append(whole | {"kind": "realisation", "name": name, "of": whole["name"]})
        data["cells"].append(whole | {"kind": "realisation", "name": name, "of": whole["name"], "group": ""})
        data["cells"].append(
            whole | {"kind": "realisation", "name": name, "of": whole["name"], "group": name}
        )
        data["groups"].append({"name": name, "sum_of_single_klds": 0.0})
    assert report_html(data) == before
    whole["realisations"] = {
        "n": 3,
        "ln_ppl_ratio": 0.02,
        "ln_ppl_ratio_ci95": [0.01, 0.03],
        "p_adjusted": 0.01,
    }
    page = Page(report_html(data))
    (row,) = (row for row in page.rows if row[:1] == ["all together"] and "3" in row[5:6])
    assert row[5:] == ["3", "+2.00e-02", "+1.00e-02 to +3.00e-02", "0.010"]
    captions = page.text("figcaption")
    assert (
        "of the mean over several realisations where there are some, else of this one rounding alone"
        in captions
    )


def test_values_that_are_no_norms(undrawn):
    """The embedding stands before the layers, where output_norm stands after them."""
    data = data_for(WINNER)
    assert "what rounding its norms costs" in Page(report_html(data)).text("h1")
    for entry, site in zip(data["cells"][1:], (("inp_embd", None), ("l_out", 0), ("l_out", 1)), strict=False):
        entry["sites"][0] |= dict(zip(("kind", "layer"), site, strict=True), point=None)
    data["cells"][4]["sites"][0] |= {"kind": "output_norm", "layer": None}
    page = Page(report_html(data))
    assert "what rounding its values costs" in page.text("h1")
    assert "“emb” is inp_embd. “out” is output_norm." in page.text("figcaption")
    (group,) = groups_of(data)
    assert positions([group]) == {0: 0, 1: 1, "emb": -2, "out": 3}


def test_both_controls_are_drawn_beside_their_format():
    """Random signs as noise: in the bars' legend, in what is said of them, and not as a format."""
    data = example(specs=("bf16", "noise_bf16", "int8"))
    for about in (*data["groups"], *data["cells"]):
        for key in ("name", "group"):
            if key in about:
                about[key] = about[key].replace("=int8", "=signs_bf16")
    page = Page(report_html(data))
    shown = page.text("text")
    assert "noise of the same length instead" in shown and "its errors with random signs instead" in shown
    assert [a["id"] for a in page.all("figure")].count("chart-layers-1") == 1
    assert "chart-layers-2" not in [a["id"] for a in page.all("figure")]  # bf16 alone is a format
    assert "Beside them its errors with random signs instead: largest" in page.text("desc")
    assert "The rounding's own errors with random signs cost" in page.text("dd")


def test_provenance(data, page):
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["model SHA-256"] == "a" * 64 and facts["text SHA-256"] == "b" * 64
    assert facts["model"] == "m.gguf" and facts["text"] == "t.txt"
    assert facts["versions"] == "fq 1.2, numpy 2" and facts["machine: processor"] == "p"
    assert "isa avx2" in facts["numerics"]
    assert facts["started"].startswith("2026-01-01")


def test_no_folder_of_the_model(html):
    assert "somewhere" not in html


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
    assert "largest 2.30e-06 (1.92e-06 to 2.75e-06) at attn_norm.raw layer 0, smallest 1.15e-06" in html
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
        (data_for(WINNER, done=3), 7),
        (data_for([(1e-6, 2e-6)]), 7),
        (data_for(TIED, chunks=1, specs=("bf16", "int8")), 10),
        (data_for(WINNER, done=0), 0),
    ],
    ids=["partial", "single cell", "one chunk", "nothing yet"],
)
def test_runs_with_less(data, charts):
    page = Page(report_html(data))
    assert len(page.all("svg")) == charts
    assert ("(partial)" in page.text("h1")) == data["partial"]
    assert ("no interval" in page.text("td")) == (data["n_chunks"] in (1, 3))
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
    assert len(html.encode()) < 3e6
    assert len(Page(html).all("figure")) == 16


# ---------------------------------------------------------------- the command


def test_pngs(data):
    drawn = pngs(data)
    assert sorted(drawn) == sorted(f"{key}.png" for key in CHARTS)
    for path, png in drawn.items():
        image = matplotlib.image.imread(io.BytesIO(png), format="png")
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
    assert "7 plots in x/y" in err and len(list((tmp_path / "x/y").iterdir())) == 7
    out, err = fq("report", 1, "--store", store, "-o", "-", cwd=tmp_path)
    assert out == (tmp_path / "a.html").read_text("utf-8") and err == ""


def test_a_run_beside_others(tmp_path):
    """One whose layers rank the other way round, and one that has none of its cells."""
    path = tmp_path / "s.sqlite"
    norms = [("ffn_norm", i) for i in range(4)]
    run = run_of(cells_for(layers(4), ("bf16",)), norms, 4)
    other = run_of(cells_for(layers(4), ("int8",)), norms, 4)
    for one, sign in ((run, 1), (replace(run, settings=run.settings | {"text": "code.txt"}), -1), (other, 1)):
        save(
            path,
            one,
            lambda cell, s=sign: np.full(
                4, 1e-6 * 10.0 ** (s * int((re.findall(r"\d", cell.name) or [0])[0]))
            ),
        )
    fq("report", 1, "--beside", 2, "--beside", 3, "--store", path, "-o", "a.html", "--png", "p", cwd=tmp_path)
    html = (tmp_path / "a.html").read_text("utf-8")
    said = Page(html).text("dd")
    assert (
        "the rank correlation (Spearman) of its 4 cells with those of run 2 (m.gguf, code.txt, 16 tokens"
        in said
    )
    assert (
        "is -1.00 (-1.00 to -1.00)" in said and "run 3 (m.gguf, t.txt" in said and "shares no group" in said
    )
    assert 'id="chart-elsewhere"' in html and (tmp_path / "p/elsewhere.png").exists()
    flat = replace(run, settings=run.settings | {"text": "flat.txt"})
    save(path, flat, lambda cell: np.full(4, 1e-6))
    fq("report", 1, "--beside", 4, "--store", path, "-o", "b.html", cwd=tmp_path)
    page = (tmp_path / "b.html").read_text("utf-8")
    assert "its cells all cost the same" in page and 'id="chart-elsewhere"' not in page
    # in the order of the sections
    assert html.index('id="who"') < html.index('id="elsewhere"') < html.index('id="sites"')


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((7,), "there is no run 7"),
        ((1, "--beside", 1), "--beside takes other runs than 1, each once"),
        ((1, "--beside", 9), "there is no run 9"),
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
        "import sys; from fq.cli import main; main(['results', '1', '--store', sys.argv[1]]); "
        "sys.exit('matplotlib' in sys.modules or 'fq.report' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, store], check=True, env=environment(), capture_output=True)
