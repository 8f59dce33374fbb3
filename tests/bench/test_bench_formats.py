"""The table of formats: what is in it, in which order, and that it says when an order does not hold."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench import formats as bench
from fq.gguf.synthetic import SAMPLE_TEXT
from fq_kernels.rules import FakeQuant


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "some words.txt"
    path.write_text(SAMPLE_TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def real(smollm2_path, text):
    """Figures of the real model, on one short chunk."""
    chosen = ("fp4_e2m1", "bf16:truncate", "f16", "fp8_e4m3", "bf16", "bf16", "int8:group=32")
    options = [word for fmt in chosen for word in ("--format", fmt)]
    arguments = ["-m", str(smollm2_path), "-f", str(text), "-c", "96", "--chunks", "1", *options]
    return bench.measure(bench.parse([*arguments, "--threads", "2"]))


def test_precision_orders_the_formats(real):
    names = [row["name"] for row in real["formats"]]
    assert names[0] == "control" and sorted(names) == sorted(
        [
            "control",
            "deployed path",
            "f16",
            "bf16",
            "bf16:truncate",
            "fp8_e4m3fn",
            "fp4_e2m1",
            "int8:group=32",
        ]
    )
    ordered = [name for name in names if name not in ("deployed path", "int8:group=32")]
    assert ordered == ["control", "f16", "bf16", "bf16:truncate", "fp8_e4m3fn", "fp4_e2m1"]
    kld = [row["comparison"]["mean_kld"] for row in real["formats"]]
    assert kld == sorted(kld) and kld[0] == 0 and kld[1] > 0
    # ggml's rounding of all inputs costs far more than bf16 in the norms
    assert names.index("deployed path") > names.index("bf16:truncate")
    assert all(holds for _, holds in real["checks"])
    assert [text.split(" ")[0] for text, _ in real["checks"]] == ["the", "f16", "bf16:truncate"]


def test_figures_of_a_row(real, smollm2):
    rows = {row["name"]: row for row in real["formats"]}
    assert rows["bf16"]["bits_per_value"] == 16 and rows["int8:group=32"]["bits_per_value"] == 9
    assert rows["f16"]["sqnr_db"] > rows["bf16"]["sqnr_db"] + 15  # three bits
    assert rows["bf16"]["sqnr_db"] == pytest.approx(rows["bf16:truncate"]["sqnr_db"] + 6, abs=0.2)
    n_embd, n_layer = smollm2.hparams.n_embd, smollm2.hparams.n_layer
    scored = real["n_scored"]  # all that the last layer keeps
    assert rows["bf16"]["elements"] == n_embd * (95 * (n_layer - 1) + scored)
    assert rows["fp4_e2m1"]["out_of_range"] > 0 == rows["bf16"]["out_of_range"]
    for name in ("control", "deployed path"):
        assert rows[name]["bits_per_value"] is rows[name]["sqnr_db"] is rows[name]["out_of_range"] is None


def test_the_document(real):
    document = bench.markdown(real)
    head, table = document.split("\n\n")
    assert (
        "command: `python -m bench.formats -f 'some words.txt' --chunks 1 -m smollm2.gguf -c 96"
        in head.replace(Path(real["model"]).name, "smollm2.gguf")
    )
    assert "the control is exactly 0: holds" in head and "NOT" not in head and "PARTIAL" not in head
    assert str(Path(real["model"]).parent) not in document
    lines = table.strip().split("\n")
    assert [line.split(" | ")[0].strip("|` ") for line in lines[2:]] == [r["name"] for r in real["formats"]]
    assert {line.count("|") for line in lines} == {len(bench.COLUMNS) + 1}
    assert lines[2].split(" | ")[2] == "0"


def test_an_order_that_does_not_hold_is_said(real):
    wrong = copy.deepcopy(real["formats"])
    by_name = {row["name"]: row["comparison"] for row in wrong}
    by_name["f16"]["mean_kld"], by_name["bf16"]["mean_kld"] = 1.0, 0.5
    by_name["control"]["max_kld"] = 1e-9
    said = bench.checks(wrong)
    assert [holds for _, holds in said] == [False, False, False]
    assert bench.markdown({**real, "checks": said}).count("DOES NOT HOLD") == 3


def test_a_stream_for_every_format(tiny):
    names = [*bench.names(), *bench.OPTIONS]
    streams = bench.streams(tiny, names)
    assert [s.name for s in streams] == ["control", "deployed path", *names]
    assert [s.activations for s in streams[:3]] == [None, "ggml", None]
    assert streams[0].fake_quant is streams[1].fake_quant is None
    for stream in streams[2:]:
        assert isinstance(stream.fake_quant, FakeQuant)
        assert {str(c.site) for c in stream.fake_quant.matched} == {"ffn_norm[0].raw", "ffn_norm[1].raw"}
    for order in (*bench.ORDERS, *bench.TRUNCATED):
        assert set(order) <= set(names)


def test_json_is_written(tiny_path, text, tmp_path, capsys):
    figures = tmp_path / "a.json"
    arguments = ["-m", str(tiny_path), "-f", str(text), "-c", "32", "--chunks", "2", "--sites", "*.weighted"]
    bench.main([*arguments, "--json", str(figures), "--format", "bf16", "--format", "q8_0"])
    printed = capsys.readouterr().out
    data = json.loads(figures.read_text())
    assert data["n_chunks"] == 2 and [row["name"] for row in data["formats"]][-1] == "q8_0"
    assert "--sites '*.weighted' --format bf16 --format q8_0`" in printed
    bench.main([*arguments, "--json", "-", "--format", "bf16"])
    assert json.loads(capsys.readouterr().out)["text"] == "some words.txt"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--format", "bf17"], "unknown format 'bf17'"),
        (["--sites", "ffn_norm[99]"], "matches no site"),
        (["--chunks", "0"], "chunks must be positive"),
        (["-m", "nothing.gguf"], "nothing.gguf"),
        (["-f", "nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input(tiny_path, text, capsys, wrong, message):
    assert bench.main(["-m", str(tiny_path), "-f", str(text), "-c", "32", "--format", "bf16", *wrong]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("bench.formats: ") and error.count("\n") == 1
