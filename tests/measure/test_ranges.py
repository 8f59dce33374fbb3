"""The ranges of values: against numpy on the rows that pass a site, and as a page."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from command_line import fq

from fq import Model
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.measure.chunks import Settings
from fq.measure.observation import Observation
from fq.measure.ranges import OUTLIER, Channels, Range, Ranges, Squares
from fq.report.ranges import ranges_html

SITES = ["*.in", "ffn_norm[*].weighted", "k[*]", "ffn_act[0]"]
SETTINGS = Settings(n_ctx=48, chunks=3, batch=20)
F32 = np.float32


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranges") / "tiny.gguf"
    shape = tiny_shape(n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    return path


@pytest.fixture(scope="module")
def model(path):
    return Model(path)


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))[:400]


@pytest.fixture(scope="module")
def result(model, tokens, executor):
    run = Ranges(model, tokens, SITES, executor=executor, settings=SETTINGS)
    assert list(run) == [0, 1, 2]
    return run.result()


@pytest.fixture(scope="module")
def values(model, tokens, executor):
    """site -> (rows of all tokens but each chunk's first, of the first ones)."""
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}

    def see(site, x, first):
        rest, firsts = found.setdefault(str(site), ([], []))
        n = (2 if site.place.kind == "k" else 1) * first
        firsts.append(x[:n].copy())
        rest.append(x[n:].copy())

    for _ in Observation(model, tokens, SITES, see, executor=executor, settings=SETTINGS):
        pass
    return {site: tuple(map(np.concatenate, parts)) for site, parts in found.items()}


def test_counts_are_numpys(result, values):
    assert [site["site"] for site in result["sites"]] == list(values)
    for site in result["sites"]:
        for part, x in zip(("rest", "first"), values[site["site"]], strict=True):
            found = site[part]
            assert (found["rows"], found["values"]) == (len(x), x.size)
            magnitudes = np.abs(x.astype(np.float64))
            assert found["zeros"] == np.count_nonzero(x == 0)
            exponents = np.floor(np.log2(magnitudes[magnitudes > 0])).astype(int)
            exponents, counts = np.unique(np.maximum(exponents, -127), return_counts=True)
            assert found["exponents"] == dict(zip(exponents.tolist(), counts.tolist(), strict=True))
            assert found["largest"] == magnitudes.max(initial=0)
            if not x.size:
                continue
            assert (found["lowest"], found["highest"]) == (min(x.min(), 0), max(x.max(), 0))
            for percent, at in found["percentiles"].items():
                exact = np.percentile(magnitudes, float(percent), method="inverted_cdf")
                assert exact <= at <= exact * (1 + 2**-7)


def test_first_tokens_are_apart(result):
    sites = {site["site"]: site for site in result["sites"]}
    assert sites["ffn_norm[0].in"]["first"]["rows"] == 3 and sites["ffn_norm[0].in"]["rest"]["rows"] == 3 * 46
    assert sites["k[0]"]["first"]["rows"] == 6
    # of the last layer the rows that are scored alone
    assert sites["ffn_norm[1].in"]["first"]["rows"] == 0 and sites["ffn_norm[1].in"]["rest"]["rows"] == 3 * 23


def test_sums_of_squares(result, values):
    for site in result["sites"]:
        assert ("sum_of_squares" in site) == (site["point"] == "in")
        if site["point"] == "in":
            sums = np.square(values[site["site"]][0].astype(np.float64)).sum(axis=1)
            found = site["sum_of_squares"]["rest"]
            np.testing.assert_allclose([found["smallest"], found["largest"]], [sums.min(), sums.max()], 1e-12)
            assert sum(found["exponents"].values()) == len(sums)


def test_headroom_is_the_bits_up_to_the_formats_largest(result):
    for site in result["sites"]:
        largest = max(site["rest"]["largest"], site["first"]["largest"])
        assert math.isclose(site["headroom_bits"]["fp8_e4m3fn"], math.log2(448 / largest))
        assert "int8" not in site["headroom_bits"]


def test_outlier_channels():
    x = np.ones((10, 32), F32)
    x[:, 3], x[:4, 7], x[:, 9] = -100, 50, OUTLIER
    x[2, 3] = -300
    channels = Channels()
    channels.add(x[:6])
    channels.add(x[6:])
    found = channels.as_dict()
    assert (found["n"], found["n_outliers"]) == (32, 2)
    assert found["outliers"] == [
        {"channel": 3, "tokens": 10, "times_median": 300.0, "largest": 300.0},
        {"channel": 7, "tokens": 4, "times_median": 50.0, "largest": 50.0},
    ]


def test_values_that_are_not_finite_are_counted_and_left_out():
    x = np.array([[1, np.inf, -2, np.nan], [1, 1, 1e-40, 0]], F32)
    found, channels, squares = Range(), Channels(), Squares()
    for each in (found, channels, squares):
        each.add(x)
    assert (found.not_finite, found.zeros, found.low, found.high) == (2, 1, -2, 1)
    assert found.exponent_counts() == {-127: 1, 0: 3, 1: 1}
    assert (found.percentile(100), found.percentile(50)) == (2, pytest.approx(1, rel=0.01))
    assert channels.largest.tolist() == [1, 1, F32(1e-40), 0] and squares.largest == 2


def test_nothing_but_zeros():
    found, squares = Range(), Squares()
    found.add(np.zeros((2, 4), F32))
    squares.add(np.zeros((2, 4), F32))
    assert found.as_dict()["largest"] == 0 and found.exponent_counts() == {} and found.percentile(50) == 0
    assert squares.as_dict() == {"smallest": 0, "largest": 0, "exponents": {}}


def test_the_page_shows_each_kind_of_site(result):
    html = ranges_html(result | {"text": "a <text>", "command": "fq ranges"})
    assert "a &lt;text&gt;" in html and "<text>" not in html
    for name in ("ffn_norm.in", "attn_norm.in", "ffn_norm.weighted", "k"):
        for what in ("Exponents of", "Magnitudes of"):
            assert f"<b>{what} {name}.</b>" in html
    assert "Sums of squares of ffn_norm.in" in html and "Sums of squares of k" not in html
    assert "Magnitudes of output_norm" not in html, "one site needs no line"
    assert len(re.findall(r"<th scope=\"row\">", html)) == len(result["sites"])
    assert "script" not in html and "http://" not in re.sub(r"http://www.w3.org/\S+", "", html)


def test_interrupted_it_says_so_everywhere(path, tmp_path, monkeypatch):
    page, figures = tmp_path / "ranges.html", tmp_path / "figures.json"
    see, seen = Ranges._see, []

    def interrupted(self, *args):
        seen.append(args)
        if self.done == 1:
            raise KeyboardInterrupt
        see(self, *args)

    monkeypatch.setattr(Ranges, "_see", interrupted)
    options = ["-m", path, "-c", 48, "--chunks", 2, "--activations", "ggml"]
    out, err = fq("ranges", *options, "-o", page, "--json", figures, status=130)
    data = json.loads(figures.read_text())
    assert (data["n_chunks"], data["n_chunks_asked"], data["partial"]) == (1, 2, True)
    assert data["activations"] == "ggml" and data["numerics"]["activations"] == "ggml"
    assert "PARTIAL: 2 were asked for" in out and "partial result" in err
    assert "(partial: 2 were asked for)" in page.read_text()


def test_the_command(path, tmp_path):
    page, figures = tmp_path / "ranges.html", tmp_path / "figures.json"
    options = ["-m", path, "-c", 48, "--chunks", 2]
    out, _ = fq("ranges", *options, "-o", page, "--json", figures)
    data = json.loads(figures.read_text())
    assert [s["site"] for s in data["sites"]] == [
        line.split()[0] for line in out.splitlines()[4 : 4 + len(data["sites"])]
    ]
    assert data["n_chunks"] == 2 and page.read_text().startswith("<!DOCTYPE html>")
    assert {s["point"] for s in data["sites"]} == {"in", "weighted"}
    assert not data["partial"] and data["n_chunks_asked"] == 2 and "PARTIAL" not in out
    alone, _ = fq("ranges", *options, "-o", "-", "--json", figures)
    assert alone == page.read_text().replace(str(page), "-")
    _, err = fq("ranges", *options, "--sites", "nothing", status=2)
    assert "--sites: nothing[*] matches no site" in err
