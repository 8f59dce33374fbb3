"""The tables that other programs read: every column, typed, nothing rounded."""

from __future__ import annotations

import csv
import io
import math
import sys
from dataclasses import replace

import pytest
from compared_runs import HARD, RUN, side

from fq.cli import main
from fq.results.export import csv_text, parquet_bytes, rows_of
from fq.results.runs import Results

COMPARISON = {
    "mean_kld": 1 / 3,
    "kld_se": math.nan,
    "mean_kld_ci95_chunks": (0.1, 0.2),
    "ln_ppl_ratio_ci95_chunks": None,
    "kld": {"max": 1.0},
    "who_pays": {"top": {"0.1%": 0.2, "1%": 0.25, "10%": 0.5}},
    "largest_chunk": {"position": 3, "mean_kld": 0.5, "times_mean": 1.5},
}


def site(kind, layer, point="raw", spec="int8:group=32", mode="every"):
    return {"kind": kind, "layer": layer, "point": point, "format": spec, "mode": mode, "sqnr_db": 100 / 3}


DATA = {
    "model": "/somewhere/m.gguf",
    "n_ctx": 512,
    "n_chunks": 8,
    "chunk_order": "random",
    "chunk_seed": 2**64 - 1,
    "cells": [
        {"name": "control", "kind": "control", "group": "", "comparison": COMPARISON, "sites": []},
        {
            "name": 'a"b,c',
            "kind": "single",
            "group": "g",
            "rank": [1, 3],
            "comparison": COMPARISON,
            "sites": [site("ffn_norm", 2)],
        },
        {
            "name": "g",
            "kind": "together",
            "group": "g",
            "comparison": COMPARISON,
            "sites": [site("ffn_norm", 2), site("ffn_norm", 3)],
        },
    ],
    "groups": [{"name": "g", "additivity": 2 / 3, "additivity_ci95_chunks": (0.6, 0.7)}],
}
COLUMNS = ["name", "kind", "group", "site_kind", "layer", "point", "format", "options"]
COLUMNS += ["rank", "rank_worst", "mean_kld", "kld_se"]
COLUMNS += [f"{key}_ci95_chunks_{end}" for key in ("mean_kld", "ln_ppl_ratio") for end in ("low", "high")]
COLUMNS += ["largest_chunk_times_mean"]
COLUMNS += ["additivity", "additivity_ci95_chunks_low", "additivity_ci95_chunks_high"]
COLUMNS += [f"realisations_{key}" for key in ("n", "ln_ppl_ratio", "ln_ppl_ratio_ci95_low")]
COLUMNS += ["realisations_ln_ppl_ratio_ci95_high", "realisations_p_adjusted"]
COLUMNS += ["top_0.1_share", "top_1_share", "top_10_share", "sqnr_db"]
COLUMNS += ["model", "n_ctx", "n_chunks", "chunk_order", "chunk_seed"]


def test_csv():
    control, single, together = csv.DictReader(io.StringIO(csv_text(DATA)))
    assert list(control) == list(single) == COLUMNS
    assert single["name"] == 'a"b,c' and (single["rank"], single["rank_worst"]) == ("1", "3")
    assert float(single["mean_kld"]) == 1 / 3 and single["kld_se"] == "nan"
    assert single["ln_ppl_ratio_ci95_chunks_low"] == control["rank"] == single["additivity"] == ""
    assert [float(single[f"top_{part}_share"]) for part in ("0.1", "1", "10")] == [0.2, 0.25, 0.5]
    at = COLUMNS.index("additivity")
    assert [float(together[key]) for key in COLUMNS[at : at + 3]] == [2 / 3, 0.6, 0.7]
    about = ["m.gguf", "512", "8", "random", str(2**64 - 1)]
    assert all([row[key] for key in COLUMNS[-5:]] == about for row in (control, single, together))
    assert float(single["sqnr_db"]) == 100 / 3 and together["sqnr_db"] == control["sqnr_db"] == ""
    assert csv_text(DATA | {"cells": []}) == ""


@pytest.mark.parametrize(
    ("sites", "what"),
    [
        ([], [None] * 5),
        ([site("ffn_norm", 2)], ["ffn_norm", 2, "raw", "int8", "group=32"]),
        ([site("output_norm", None, "weighted", "bf16")], ["output_norm", None, "weighted", "bf16", ""]),
        ([site("ffn_norm", 0, mode="first-call")], ["ffn_norm", 0, "raw", "int8", "group=32,first-call"]),
        ([site("ffn_norm", 0, spec="f16", mode="first-call")], ["ffn_norm", 0, "raw", "f16", "first-call"]),
        ([site("ffn_norm", 2), site("ffn_norm", 3)], ["ffn_norm", None, "raw", "int8", "group=32"]),
        ([site("ffn_norm", 2), site("attn_norm", 2)], [None, 2, "raw", "int8", "group=32"]),
        (
            [site("ffn_norm", 2), site("ffn_norm", 2, "weighted", "int8:dither,seed=3")],
            ["ffn_norm", 2, None, "int8", None],
        ),
    ],
)
def test_what_a_cell_rounds(sites, what):
    (row,) = rows_of(DATA | {"cells": [DATA["cells"][0] | {"sites": sites}]})
    assert [row[key] for key in COLUMNS[3:8]] == what


def test_a_run_that_knows_no_order_of_chunks():
    data = {key: value for key, value in DATA.items() if not key.startswith("chunk_")}
    assert list(rows_of(data)[0]) == COLUMNS[:-2]


def test_parquet():
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(io.BytesIO(parquet_bytes(DATA)))
    assert table.column_names == COLUMNS
    texts = ("name", "kind", "group", "site_kind", "point", "format", "options", "model", "chunk_order")
    numbers = ("rank", "rank_worst", "layer", "n_ctx", "n_chunks", "realisations_n")
    kinds = dict.fromkeys(texts, "string") | dict.fromkeys(numbers, "int64") | {"chunk_seed": "uint64"}
    assert {field.name: str(field.type) for field in table.schema} == {
        name: kinds.get(name, "double") for name in COLUMNS
    }
    control, single, together = table.to_pylist()
    assert single["mean_kld"] == 1 / 3 and math.isnan(single["kld_se"])
    assert together["additivity"] == 2 / 3 and single["additivity"] is None
    assert (single["rank"], control["rank"], control["ln_ppl_ratio_ci95_chunks_low"]) == (1, None, None)
    assert (single["layer"], together["layer"], single["options"]) == (2, None, "group=32")
    assert (single["chunk_seed"], single["sqnr_db"], control["sqnr_db"]) == (2**64 - 1, 100 / 3, None)
    empty = parquet.read_table(io.BytesIO(parquet_bytes(DATA | {"cells": []})))
    assert isinstance(empty, pyarrow.Table) and empty.num_rows == 0


# ---------------------------------------------------------------- the command


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The command's arguments, with a store of one run."""
    monkeypatch.chdir(tmp_path)
    with Results("store.sqlite") as store:
        number = store.add(RUN)
        for (i, chunk), left in side(number, [0 * HARD, HARD, HARD]).finished.items():
            store.save(number, i, chunk, left)
    return ["results", "1", "--store", "store.sqlite"]


def test_the_same_columns_as_csv(results, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([*results, "--parquet", "x.parquet", "--csv", "x.csv"]) == 0
    rows = parquet.read_table("x.parquet").to_pylist()
    read = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert len(rows) == len(read) == 3 and list(rows[0]) == list(read[0])
    assert rows[1]["mean_kld"] == float(read[1]["mean_kld"]) == pytest.approx(HARD.mean())
    assert (rows[1]["site_kind"], rows[1]["layer"], rows[1]["format"]) == ("ffn_norm", 0, "bf16")
    assert sorted(p.name for p in tmp_path.iterdir() if "store" not in p.name) == ["x.csv", "x.parquet"]
    assert main([*results, "--cell", "[0]", "--parquet", "x.parquet"]) == 0
    assert [row["name"] for row in parquet.read_table("x.parquet").to_pylist()] == ["ffn_norm[0].raw=bf16"]


def test_a_models_name_that_no_text_has(results, tmp_path):
    """As of a file whose name is not UTF-8."""
    parquet = pytest.importorskip("pyarrow.parquet")
    with Results("store.sqlite") as store, store.writing():
        store.replace(1, replace(RUN, settings=RUN.settings | {"model": "/x/m\udcff\n.gguf"}))
    assert main([*results, "--parquet", "x.parquet", "--csv", "x.csv"]) == 0
    rows = parquet.read_table("x.parquet").to_pylist()
    read = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
    assert {row["model"] for row in (*rows, *read)} == {"m\\udcff\\n.gguf"}


def test_without_pyarrow(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what cannot be imported
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert main([*results, "--parquet", "x.parquet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "fq: error: --parquet needs the package pyarrow: pip install pyarrow\n"
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.parametrize(
    "args, said",
    [
        (["--parquet", "-"], "--parquet -: takes a file"),
        (["--parquet", "/no/such/x"], "--parquet /no/such/x: cannot be written there"),
        (["--csv", "x", "--parquet", "./x"], "--parquet ./x: is the file of --csv too"),
        (["--csv", "-", "--json", "-"], "--csv -: is the file of --json too"),
    ],
)
def test_bad_targets(results, capsys, args, said):
    assert main([*results, *args]) == 2
    assert said in capsys.readouterr().err


def test_a_list_has_no_columns(results, capsys):
    assert main(["results", *results[2:], "--parquet", "x"]) == 2
    assert "--parquet needs the number of a run" in capsys.readouterr().err
