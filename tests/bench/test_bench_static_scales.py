"""The table of static scales: which rows it has, and that they are of the text measured on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench import static_scales as bench
from fq import Model, Perplexity
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq_kernels.rules import FakeQuant


def test_a_row_for_each_scale(tmp_path, capsys, executor, monkeypatch):
    monkeypatch.setattr(bench, "CALIBRATION_CHUNKS", 2)
    path, text = tmp_path / "tiny.gguf", tmp_path / "words.txt"
    shape = tiny_shape(n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    text.write_text(SAMPLE_TEXT.read_text(encoding="utf-8")[5000:8000], encoding="utf-8")
    assert bench.main(["-m", str(path), "-f", str(text), "-c", "48", "--chunks", "2"]) == 0
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "| `" in line]
    static = [(f"static, per {per}", method) for method in ("largest", "percentile=99.9", "mse")
              for per in ("tensor", "channel")]  # fmt: skip
    assert [tuple(row[:3]) for row in rows] == [
        ("`int8`", "of the row", ""),
        ("`int8`", "of the chunk's rows", ""),
        *(("`int8`", *each) for each in static),
        ("`fp8_e4m3fn`", "none", ""),
        *(("`fp8_e4m3fn`", *each) for each in static),
    ]
    model = Model(path)
    tokens = model.tokenizer.encode(text.read_text(encoding="utf-8"))
    rules = FakeQuant(model.values, "ffn_norm[*].weighted=int8:tensor")
    run = Perplexity(model, tokens, fake_quant=rules, executor=executor, n_ctx=48, chunks=2)
    assert list(run) == [0, 1]
    assert rows[1][3] == f"{run.result()['comparison']['mean_kld']:.3e}"
    # what percentiles cut is counted, and the scales of a row cut nothing
    assert rows[0][6] == "0" and int(rows[4][6]) > 0 and float(rows[4][3]) > 0


def test_it_needs_a_text():
    with pytest.raises(SystemExit):
        bench.main([])
