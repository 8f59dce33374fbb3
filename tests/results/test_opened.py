"""A store in a notebook: what its frames and arrays hold is what fq results says."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from command_line import fq

import fq as package
from fq import FqError, open_results


@pytest.fixture(scope="module")
def path(tiny_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("opened") / "<s>.sqlite"
    fq("sweep", "-m", tiny_path, "-c", 64, "--chunks", 4, "--sites", "ffn_norm", "--store", path)
    arguments = ["-m", tiny_path, "-c", 64, "--chunks", 4, "--sites", "l_out", "--format", "bf16"]
    fq("sensitivity", *arguments, "--verify", 2, "--store", path)
    return path


def shown(path, number):
    return json.loads(fq("results", number, "--store", path, "--json", "-")[0])


def test_runs(path):
    store = open_results(path)
    assert list(store.runs()["run"]) == [1, 2] and store.runs().to_dict("records") == store.list()
    assert repr(store) == f"<store {path}: 2 runs>"
    assert repr(store.run(1)).endswith("sweep of tiny.gguf, 4 cells, 4 of 4 chunks>")
    assert repr(store.run()).startswith("<run 2 of ") and "estimate of tiny.gguf, 2 cells" in repr(
        store.run()
    )


def test_a_run_by_its_number_in_the_frame(path):
    store = open_results(path)
    for number in map(np.int64, store.runs()["run"]):
        assert type(store.run(number).number) is int and len(store.cells(number))
        assert store.run(number).figures["run"] == number


def test_cells(path):
    frame, data = open_results(path).cells(1), shown(path, 1)
    assert list(frame.index) == [cell["name"] for cell in data["cells"]]
    assert list(frame["mean_kld"]) == [cell["comparison"]["mean_kld"] for cell in data["cells"]]
    newest, data = open_results(path).cells(), shown(path, 2)
    assert list(newest["mean_kld"]) == [cell["mean_kld"] for cell in data["cells"]]


def test_chunks_and_tokens(path):
    run, data = open_results(path).run(1), shown(path, 1)
    klds, frame = run.klds(), run.chunks()
    assert klds.shape == (4, 4) and run.names[0] == "control" and not klds[0].any()
    for name, own, cell in zip(run.names, klds, data["cells"], strict=True):
        assert np.mean(own) == pytest.approx(cell["comparison"]["mean_kld"])
        mine = frame[frame["cell"] == name]
        assert list(mine["mean_kld"]) == list(own) and list(mine["chunk_of_text"]) == data["chunk_indices"]
        for chunk in range(4):
            tokens = run.tokens(name, chunk)
            assert len(tokens.kld) == 31 and np.mean(tokens.kld) == own[chunk]
            assert np.mean(tokens.nll) == run.nlls()[run.names.index(name), chunk]
    assert frame["nll_base"].nunique() == 4


def test_html(path):
    text = open_results(path).run(1)._repr_html_()
    assert text.startswith("<table>") and text.count("<tr>") == 5 and "&lt;s&gt;.sqlite" in text
    assert "<th>cell</th><th>mean KL</th><th>from</th><th>to</th><th>rank</th>" in text
    assert open_results(path)._repr_html_().count("<tr>") == 3


def test_what_has_not_ended(tiny_path, tmp_path):
    path = tmp_path / "s.sqlite"
    fq("sweep", "-m", tiny_path, "-c", 64, "--chunks", 2, "--shard", "2/2", "--store", path)
    run = open_results(path).run()
    assert np.isnan(run.klds()[:, 0]).all() and np.isfinite(run.klds()[:, 1]).all()
    with pytest.raises(FqError, match="chunk 0 of control has not ended"):
        run.tokens("control", 0)


def test_a_run_that_is_extended_meanwhile(tiny_path, tmp_path):
    """What was opened is what it was then."""
    path = tmp_path / "s.sqlite"
    common = ["sweep", "-m", tiny_path, "-c", 64, "--store", path, "--resume"]
    fq(*common, "--chunks", 1, "--sites", "ffn_norm")
    run = open_results(path).run()
    fq(*common, "--chunks", 2, "--sites", "l_out")
    assert run.klds().shape == (4, 1) and len(run.chunks()) == 4
    assert open_results(path).run().klds().shape == (7, 2)


def test_bad_requests(path, tmp_path):
    with pytest.raises(FqError, match="there is no such file"):
        open_results(tmp_path / "none.sqlite")
    (tmp_path / "text.sqlite").write_text("no store" * 99)
    with pytest.raises(FqError, match="file is not a database"):
        open_results(tmp_path / "text.sqlite")
    with pytest.raises(FqError, match="there is no run 9"):
        open_results(path).run(9)
    with pytest.raises(FqError, match="run 1 has no cell 'x'"):
        open_results(path).run(1).tokens("x")


def test_without_pandas(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    store = open_results(path)
    assert len(store.list()) == 2 and len(store.run(1).rows()) == 4 and store.run(1)._repr_html_()
    with pytest.raises(FqError, match=r"pip install 'fq\[pandas\]'"):
        store.cells()
    assert package.open_results is open_results
