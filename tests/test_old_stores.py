"""Stores that earlier versions wrote open, with the figures that they had.

tests/data/store-1.sqlite is of version 0.1.0, schema 1: `fq sweep` on a tiny model, two runs. Beside
it, as JSON, are the per-chunk values and counts that the version which wrote it read out of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model.results import Results
from model.sweep_figures import stored_figures

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("version", [1])
def test_a_store_of_an_earlier_version_opens(version, tmp_path):
    path = tmp_path / "store.sqlite"
    shutil.copy(DATA / f"store-{version}.sqlite", path)
    expected = json.loads((DATA / f"store-{version}.json").read_text())
    with Results(path, must_exist=True) as store:
        assert [str(run["run"]) for run in store.list()] == list(expected)
        for number, then in expected.items():
            left, data = store.load(int(number)), stored_figures(store, int(number))
            assert data["ppl_base"] == then["ppl_base"]
            # which took a text's first chunks
            assert data["chunk_order"] == "first" and data["chunk_seed"] is None
            assert data["chunk_indices"] == list(range(data["n_chunks_asked"]))
            assert [cell["name"] for cell in data["cells"]] == [cell["name"] for cell in then["cells"]]
            for i, (cell, old) in enumerate(zip(data["cells"], then["cells"], strict=True)):
                chunks = [left[i, chunk].paired for chunk in range(data["n_chunks"])]
                assert [float(c.kld.mean()) for c in chunks] == old["mean_kld"]
                assert [float((c.nll - c.nll_base).mean()) for c in chunks] == old["ln_ppl_ratio"]
                assert [int(c.same_top.sum()) for c in chunks] == old["same_top"]
                for key in ("rows_quantised", "changed", "max_abs_error"):
                    assert [site[key] for site in cell["sites"]] == old[key]
