"""fq plan as a user has it: from an estimate to rules, and how they do on another text."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sqlite3
from urllib.parse import unquote

import pytest
from command_line import fq
from html_page import Page


@pytest.fixture(scope="module")
def store(tiny_path, tmp_path_factory):
    """An estimate, and a sweep after it."""
    path = tmp_path_factory.mktemp("plan") / "store.sqlite"
    formats = [
        x for spec in ("bf16", "fp8_e4m3fn", "int8", "mxfp4", "int8:tensor") for x in ("--format", spec)
    ]
    fq("sensitivity", "-m", tiny_path, "-c", 64, "--chunks", 8, "--verify", 12, *formats, "--store", path)
    fq("sweep", "-m", tiny_path, "-c", 64, "--chunks", 1, "--store", path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "other.txt"
    words = "norm scale token layer weight model sum root value bit".split()
    path.write_text(" ".join(f"The {a} of a {b} is {c}." for a in words for b in words for c in words))
    return path


def test_rules_of_a_model_whose_name_is_no_text(store, tiny_path, tmp_path):
    model, rules = tmp_path / "t\udcff.gguf", tmp_path / "plan.rules"
    model.symlink_to(tiny_path)
    fq("plan", "-m", model, "--store", store, "--budget-bits", 12, "-o", rules)
    assert rules.read_text().startswith("# fq plan -m ") and "t\\udcff.gguf" in rules.read_text()


def test_a_plan_and_its_measurement(store, tiny_path, text, tmp_path):
    rules, picture, file = tmp_path / "plan.rules", tmp_path / "front.svg", tmp_path / "plan.json"
    out, _ = fq(
        "plan", "-m", tiny_path, "--store", store, "--budget-kl", 0.002, "-o", rules, "--picture", picture,
        "--json", file, "--validate", text, "--chunks", 8,
    )  # fmt: skip
    data = json.loads(file.read_text())
    plan, (mine, uniform) = data["plan"], data["validated"]["cells"]
    assert data["run"] == 1 and plan["mean_kld"] <= 0.002
    low, high = plan["mean_kld_ci95"]
    assert low < mine["mean_kld_ci95_chunks"][1] and high > mine["mean_kld_ci95_chunks"][0]
    assert uniform["cost"] >= mine["cost"] == plan["cost"] and uniform["name"].startswith("uniform ")
    assert data["validated"]["uniform_over_plan"]["ratio"] == pytest.approx(
        uniform["mean_kld"] / mine["mean_kld"]
    )
    assert all(site["format"] != "int8:tensor" for site in plan["sites"]), "its scale is over a tensor"
    points = {site["site"].partition(".")[2] for site in plan["sites"]}
    assert points == {"", "weighted"}
    assert (
        "binds  the budget: " in out and "what any budget buys" in out and picture.read_text().count("<svg")
    )
    # on the page of the estimate that it was made from, and of no other run
    page = tmp_path / "page.html"
    fq("report", 1, "--store", store, "--plan", file, "-o", page)
    html = page.read_text("utf-8")
    assert html.index('id="plan"') < html.index('id="kinds"') and "Measured on other.txt, held out" in html
    _, err = fq("report", 2, "--store", store, "--plan", file, "-o", page, status=2)
    assert "--plan: run 2 is a sweep" in err
    # what is written is what was measured
    lines = rules.read_text().splitlines()
    assert lines[0].startswith("# fq plan") and lines[2:] == plan["rules"]
    arguments = ["-m", tiny_path, "-f", text, "-c", 64, "--chunks", 8, "--fake-quant", f"@{rules}"]
    shown, _ = fq("perplexity", *arguments, "--json", "-")
    assert json.loads(shown)["comparison"]["mean_kld"] == pytest.approx(mine["mean_kld"], rel=1e-12)


def test_interrupted_as_it_is_measured_the_plan_is_there(store, tiny_path, text, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fq.commands.plan._validate", interrupted)
    options = "-m", tiny_path, "--store", store, "--budget-kl", 0.002, "--validate", text
    out, err = fq("plan", *options, "--json", tmp_path / "p.json", status=130)
    assert out.startswith("plan  ") and "interrupted after the plan, which is not measured" in err
    assert json.loads((tmp_path / "p.json").read_text())["validated"] is None


def test_rules_on_stdout_and_a_budget_of_bits(store, tiny_path, tmp_path):
    out, _ = fq("plan", 1, "-m", tiny_path, "--store", store, "--budget-bits", 8, "--point", "raw", "-o", "-")
    lines = out.splitlines()
    assert all(line.startswith("#") or "=" in line for line in lines) and "ffn_norm" in out
    assert ".raw=" in out and ".weighted=" not in out
    costs = tmp_path / "costs.csv"
    costs.write_text("item,cost\nbf16,1\nnone,2\n")
    arguments = ["--sites", "l_out", "--costs", costs, "--budget-bits", 1, "-o", "-"]
    out, _ = fq("plan", "-m", tiny_path, "--store", store, *arguments)
    assert out.splitlines()[2:] == ["l_out[0-1]=bf16"]


def test_when_nothing_binds(store, tiny_path):
    out, _ = fq("plan", "-m", tiny_path, "--store", store, "--budget-kl", 100)
    assert "binds  nothing: every site has its cheapest format" in out
    assert "above 0.05 nats the second order does not hold" in out
    out, _ = fq("plan", "-m", tiny_path, "--store", store, "--budget-bits", 40)
    assert "binds  nothing: no site is rounded" in out and "second order" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one of the arguments --budget-kl --budget-bits is required"),
        (["--budget-kl", -1], "--budget-kl must be a number from 0"),
        (["--budget-bits", "nan"], "--budget-bits must be a number from 0"),
        (["--budget-kl", 1, "--picture", "p.gif"], "must end in .png or .svg"),
        (["--budget-bits", 1], "no choice of formats has a cost of at most 1"),
        (["--budget-kl", 1, "--sites", "mlp"], "matches no site"),
        (["--budget-kl", 1, "--point", "out"], "the point must be in, raw, weighted or all"),
        ([2, "--budget-kl", 1], "run 2 is a sweep, not an estimate"),
        ([7, "--budget-kl", 1], "there is no run 7"),
        (["9" * 20, "--budget-kl", 1], "RUN must be the number of a run"),
        (["--budget-kl", 1, "--memory-limit", "foo"], "--memory-limit must be a size"),
        (["--budget-kl", 1, "--validate", "TEXT", "--chunks", 0], "chunks must be positive"),
        (["--budget-bits", 40, "--validate", "TEXT"], "the plan rounds nothing"),
        (["--budget-kl", 1, "--chunks", 4], "--chunks is of --validate, which is not given"),
        (["--budget-kl", 1, "--verify", 4], "--verify is of --file, which is not given"),
        (["--budget-kl", 1, "--sites", "k", "--point", "in"], "--point is for where --sites is not given"),
    ],
)
def test_bad_requests(store, tiny_path, text, arguments, words):
    arguments = [text if one == "TEXT" else one for one in arguments]
    _, err = fq("plan", *arguments, "-m", tiny_path, "--store", store, status=2)
    assert words in err


@pytest.mark.parametrize("scored", ["all", "second-half"])
def test_a_plan_is_measured_as_the_estimate_was_scored(tiny_path, text, tmp_path, scored):
    store, rules = tmp_path / "s.sqlite", tmp_path / "plan.rules"
    common = ["-m", tiny_path, "-c", 64, "--scored", scored]
    formats = ["--format", "int8", "--format", "bf16"]
    fq("sensitivity", *common, "--chunks", 4, "--verify", 0, *formats, "--store", store)
    planned = ["plan", "-m", tiny_path, "--store", store, "--budget-bits", 12, "-o", rules]
    out, _ = fq(*planned, "--validate", text, "--chunks", 2, "--json", "-")
    measured = json.loads(out)["validated"]["cells"][0]["mean_kld"]
    shown, _ = fq(
        "perplexity", *common, "-f", text, "--chunks", 2, "--fake-quant", f"@{rules}", "--json", "-"
    )
    assert measured == pytest.approx(json.loads(shown)["comparison"]["mean_kld"], rel=1e-12)


@pytest.fixture
def loose(tiny_path, tmp_path):
    """A store with an estimate of whose error nothing is known."""
    path = tmp_path / "loose.sqlite"
    formats = [x for spec in ("bf16", "fp8_e4m3fn", "int8", "mxfp4") for x in ("--format", spec)]
    sites = [x for site in ("ffn_norm[*].weighted", "l_out", "q") for x in ("--sites", site)]
    arguments = ["sensitivity", "-m", tiny_path, "-c", 64, *formats, *sites, "--verify", 0, "--store", path]
    fq(*arguments, "--chunks", 16)
    return path, arguments


def test_a_plan_measures_what_it_hangs_on(loose, tiny_path):
    """And its interval is then that of what was measured."""
    from fq.gguf.synthetic import SAMPLE_TEXT

    store, estimate = loose
    arguments = ["plan", "-m", tiny_path, "--store", store, "--budget-bits", 8, "--json", "-"]

    def verified():
        shown = json.loads(fq("results", 1, "--store", store, "--json", "-")[0])
        assert not shown["partial"] and shown["model_error"] is None, "they are no sample"
        return {(one["site"], one["format"]): one["exact"] for one in shown["verified"]}

    before = json.loads(fq(*arguments, "-f", SAMPLE_TEXT, "--verify", 0)[0])["plan"]
    assert before["mean_kld_ci95"] is None and not verified()
    some = json.loads(fq(*arguments, "-f", SAMPLE_TEXT, "--verify", 2)[0])["plan"]
    assert some["mean_kld_ci95"] is None and len(verified()) == 2
    after = json.loads(fq(*arguments, "-f", SAMPLE_TEXT)[0])["plan"]
    low, high = after["mean_kld_ci95"]
    assert low < after["mean_kld"] < high < 2 * low
    found = verified()
    planned = {(one["site"], one["format"]): one["mean_kld"] for one in after["sites"] if one["format"]}
    assert planned.keys() <= found.keys()
    assert all(planned[cell] == pytest.approx(found[cell], rel=1e-12) for cell in planned)
    # a plan takes what is there, and the estimate goes on with it
    assert json.loads(fq(*arguments)[0])["plan"] == after
    fq(*estimate, "--chunks", 17, "--resume")
    assert verified().keys() == found.keys()


def test_where_chunks_are_too_few_nothing_is_measured_in_vain(tiny_path, tmp_path):
    from fq.gguf.synthetic import SAMPLE_TEXT

    store = tmp_path / "s.sqlite"
    common = ["-m", tiny_path, "--store", store]
    fq("sensitivity", *common, "-c", 64, "--chunks", 3, "--verify", 0, "--sites", "l_out", "--format", "int8")
    fq("plan", *common, "--budget-bits", 8, "-f", SAMPLE_TEXT)
    assert not json.loads(fq("results", 1, "--store", store, "--json", "-")[0])["verified"]


def test_cells_are_measured_on_the_text_and_by_the_versions_of_the_estimate(loose, tiny_path, text):
    from fq.gguf.synthetic import SAMPLE_TEXT

    store, _ = loose
    arguments = ["plan", "-m", tiny_path, "--store", store, "--budget-bits", 8, "-f"]
    _, err = fq(*arguments, text, status=2)
    assert "the estimate was made on another text" in err
    _, err = fq(*arguments, SAMPLE_TEXT, "--verify", -1, status=2)
    assert "--verify must be >= 0" in err
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.execute("""UPDATE runs SET versions = '{"fq": "0.0.1"}', digest = NULL""")
        db.commit()
    _, err = fq(*arguments, SAMPLE_TEXT, status=2)
    assert "run 1 was measured with other versions than these: run fq sensitivity again" in err


def test_an_estimate_that_is_not_ended(tiny_path, tmp_path):
    store = tmp_path / "s.sqlite"
    arguments = [
        "-m",
        tiny_path,
        "-c",
        64,
        "--chunks",
        4,
        "--verify",
        0,
        "--format",
        "bf16",
        "--store",
        store,
    ]
    fq("sensitivity", *arguments)
    with contextlib.closing(sqlite3.connect(store)) as db:  # as where it was killed before any was measured
        db.execute("DELETE FROM chunks")
        db.commit()
    out, _ = fq("results", 1, "--store", store)
    assert "what a change of its scale costs is not measured yet: fq sensitivity --resume" in out
    _, err = fq("plan", "-m", tiny_path, "--store", store, "--budget-kl", 1, status=2)
    assert "has yet to measure what a change of scale costs: fq sensitivity --resume" in err
    fq("sensitivity", *arguments, "--resume")
    fq("plan", "-m", tiny_path, "--store", store, "--budget-kl", 1)


def test_the_text_of_the_estimate_is_no_other(store, tiny_path, tmp_path):
    from fq.gguf.synthetic import SAMPLE_TEXT

    same = tmp_path / "same.txt"
    same.write_bytes(SAMPLE_TEXT.read_bytes())
    _, err = fq("plan", "-m", tiny_path, "--store", store, "--budget-kl", 1, "--validate", same, status=2)
    assert "the estimate was made on this text" in err


def test_a_store_without_an_estimate_of_the_model(store, tiny_path, tmp_path):
    other = tmp_path / "s.sqlite"
    fq("sweep", "-m", tiny_path, "-c", 64, "--chunks", 1, "--store", other)
    _, err = fq("plan", "-m", tiny_path, "--store", other, "--budget-kl", 1, status=2)
    assert "there is no estimate of" in err and "run fq sensitivity first" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nothing\n\n", "there is no rule in it"),
        (b"ffn_norm=bf16\nnonsense\n", "'nonsense'"),
        (b"\xff\xfe", "is no text in UTF-8"),
        (b"#" * ((1 << 20) + 1), "larger than 1 MiB"),
        (None, "No such file"),
    ],
)
def test_files_of_rules_that_are_none(tiny_path, tmp_path, content, words):
    path = tmp_path / "rules"
    if content is not None:
        path.write_bytes(content)
    _, err = fq("perplexity", "-m", tiny_path, "-c", 64, "--chunks", 1, "--fake-quant", f"@{path}", status=2)
    assert words in err


def test_a_file_of_rules_may_begin_with_a_byte_order_mark(tiny_path, tmp_path):
    path = tmp_path / "rules"
    path.write_bytes("ffn_norm=bf16\r\n".encode("utf-8-sig"))
    out, _ = fq("perplexity", "-m", tiny_path, "-c", 64, "--chunks", 1, "--fake-quant", f"@{path}")
    assert "rule: ffn_norm[*].raw=bf16" in out


def test_the_numbers_on_an_estimates_page(store, tmp_path):
    """Each cell's estimate is in the file that its figure saves, to the last bit."""
    page, figures = tmp_path / "page.html", tmp_path / "figures.json"
    fq("report", 1, "--store", store, "-o", page)
    fq("results", 1, "--store", store, "--json", figures)
    links = [a for a in Page(page.read_text("utf-8")).all("a") if "-sites-" in a.get("download", "")]
    files = [unquote(a["href"].partition(",")[2]) for a in links if a["download"].endswith(".csv")]
    rows = [row for text in files for row in csv.DictReader(io.StringIO(text))]
    found = {(row["site"], row["format"]): row for row in rows}
    # of a kind with one site alone the table of kinds says it all
    several = [c for c in json.loads(figures.read_text())["cells"] if (c["site"], c["format"]) in found]
    assert len(found) == len(rows) == len(several) > 100
    for cell in several:
        row = found[cell["site"], cell["format"]]
        assert row["mean_kld"] == ("" if cell["mean_kld"] is None else repr(cell["mean_kld"]))
        ends = cell["mean_kld_ci95"] or ("", "")
        assert [row["ci95_low"], row["ci95_high"]] == [end if end == "" else repr(end) for end in ends]
        assert row["mark"] == (cell["mark"] or "")
