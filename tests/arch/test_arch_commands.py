"""Every command on files of other architectures than llama."""

from __future__ import annotations

import json

import pytest
from command_line import fq
from tiny_models import TINY, write_tiny

# every op and kind of norm that there is
NAMES = ("gemma3", "phi3", "olmo3", "granite")
RULES = ("--fake-quant", "*=bf16", "--fake-quant", "l_out=bf16", "--fake-quant", "k=fp8_e4m3fn")


@pytest.fixture(scope="module", params=NAMES)
def path(request, tmp_path_factory):
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf", TINY[request.param]))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The answer is a world of words. Hello world, the answer is here again.\n" * 9)
    return str(path)


def test_what_a_file_is(path):
    for command in (["inspect", path], ["graph", path], ["sites", "-m", path, *RULES]):
        out, _ = fq(*command, "--json")
        json.loads(out)
        assert fq(*command)[0]
    assert json.loads(fq("inspect", path, "--json")[0])["fault"] is None


def test_runs_and_measures(path, text, tmp_path):
    numbers = ["-m", path, "-t", "2", "--offline"]
    trace = str(tmp_path / "trace.json")
    fq("run", *numbers, "-p", "Hello world", "-n", "3", "--ignore-eos", "--trace", trace, *RULES)
    assert fq("trace", trace)[0]
    measured = [*numbers, "-f", text, "-c", "32", "--chunks", "2"]
    data = json.loads(fq("perplexity", *measured, "--control", *RULES, "--json", "-")[0])
    assert data["control"]["exactly_zero"] and data["comparison"]["mean_kld"] > 0
    assert data["fake_quant"]["rows_quantised"] == data["fake_quant"]["rows_seen"] > 0

    store, sites = str(tmp_path / "s.sqlite"), ["--sites", "*[1]", "--sites", "v[0]", "--format", "bf16"]
    swept = json.loads(fq("sweep", *measured, *sites, "--store", store, "--json", "-")[0])
    assert all(cell["comparison"]["mean_kld"] > 0 for cell in swept["cells"][1:])
    assert fq("results", "--store", store)[0]
    page = tmp_path / "report.html"
    fq("report", "--store", store, "-o", str(page))
    assert "</html>" in page.read_text()
