"""Where the time goes: what is counted under which name; times are not looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last: an installed package goes before the sources

from bench import where
from bench.limits import Limits
from bench.where import PRODUCTS, REST, WHOLE, Part, Table
from fq import Executor, FqError, Model
from fq.arch.graph import N_OUTPUTS, N_TOKENS, AttentionAttributes, Node, Op
from fq.gguf.synthetic import tiny_shape, write_llama_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("where") / "mixed.gguf"
    write_llama_gguf(path, tiny_shape(), mix="Q4_K_M")
    return Model(path)


@pytest.fixture(scope="module")
def limits(tmp_path_factory):
    return Limits(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def tables(model, limits):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"N_PROMPT": 40, "N_FIRST": 3, "N_SINGLE": 4}.items():
            patch.setattr(where, name, value)
        return where.measure(model, 2, 3, limits)


def test_operations_and_bytes_are_counted(model, tables):
    prompt, single = tables
    assert (prompt.tokens, single.tokens, prompt.threads) == (40, 1, 2)
    shape = tiny_shape()
    attention = shape.n_embd * (2 * shape.n_embd + 2 * shape.n_head_kv * shape.head_dim)
    ffn, output = 3 * shape.n_embd * shape.n_ff, shape.n_embd * shape.n_vocab
    # in the last layer only the last token goes on after attention
    assert prompt.parts[PRODUCTS].flops == 2 * (40 * (2 * attention + ffn) + ffn + output)
    assert single.parts[PRODUCTS].flops == 2 * (2 * attention + 2 * ffn + output)
    # two products with each token that one sees; tokens one by one come after 3 to 6 others
    assert prompt.parts["attention"].flops == 4 * 2 * shape.n_embd * 40 * 41 // 2
    assert single.parts["attention"].flops == 4 * 2 * shape.n_embd * (3 + 4 // 2 + 1)
    packed = sum(w.packed.nbytes for name, w in model.weights.items() if name != "token_embd.weight")
    assert prompt.parts[PRODUCTS].bytes == single.parts[PRODUCTS].bytes == packed


@pytest.mark.parametrize(("window", "pairs"), [(0, 5 + 6 + 7), (6, 5 + 6 + 6), (2, 6)])
def test_attention_is_what_each_token_sees(window, pairs):
    attributes = AttentionAttributes(4, 2, 1.0, window=window)
    node = Node("kqv_out", Op.ATTENTION, (), (N_TOKENS, 32), attributes=attributes)
    assert where.attended(node, 4, 3) == 4 * pairs * 32
    last = Node("kqv_out", Op.ATTENTION, (), (N_OUTPUTS, 32), attributes=attributes)
    assert where.attended(last, 4, 3) == 4 * min(7, window or 7) * 32


def test_every_node_has_its_place(model, tables):
    for table in tables:
        names = set(table.parts)
        assert {"attention", "norms", "adds", "rope", "swiglu", PRODUCTS, REST, WHOLE} < names
        assert "products with ffn_gate, ffn_up, Q4_K" in names and "products with output, Q6_K" in names
        assert "products with attn_q, attn_k, attn_v, Q4_K/Q6_K" in names
        products = [part for name, part in table.parts.items() if name.startswith("products with")]
        assert sum(p.calls for p in products) == table.parts[PRODUCTS].calls == 15
        assert sum(p.bytes for p in products) == table.parts[PRODUCTS].bytes
        assert table.parts[WHOLE].calls == len(model.graph.nodes)
        assert table.parts[WHOLE].flops == table.parts[PRODUCTS].flops + table.parts["attention"].flops
        assert table.parts[WHOLE].bytes == table.parts[PRODUCTS].bytes
        assert table.parts["norms"].calls == 5
        nodes = [part for name, part in table.parts.items() if name not in (WHOLE, PRODUCTS)]
        for i, whole in enumerate(table.parts[WHOLE].seconds):
            assert sum(part.seconds[i] for part in nodes) == pytest.approx(whole)
        assert all(value > 0 for part in nodes for value in part.seconds)
    prompt, single = tables
    assert len(prompt.parts[WHOLE].seconds) == len(prompt.parts["norms"].seconds) == 3
    assert len(single.parts[WHOLE].seconds) == len(single.parts["norms"].seconds) == 12


def test_the_text(tables):
    parts = {
        WHOLE: Part([0.010, 0.008, 0.012], 9),
        PRODUCTS: Part([0.005], 3, flops=10**9, bytes=4 * 10**7),
        "product with x, Q8_0": Part([0.005], 3, flops=10**9, bytes=4 * 10**7),
        "norms": Part([0.002], 6),
        REST: Part([0.003]),
    }
    lines = where.lines_of(Table(1, 2, parts, peak=1e12, stream=1e10))
    assert [line[2] for line in lines] == [WHOLE, PRODUCTS, "product with x, Q8_0", REST, "norms"]
    assert lines[0] == ["1", "2", WHOLE, "9", "10", "100.0", "", "", "", ""]
    assert lines[1][3:] == ["3", "5", "50.0", "200", "20", "8", "80"]
    assert lines[3][3:6] == ["", "3", "30.0"]
    prompt_lines = where.lines_of(Table(512, 2, parts, peak=1e12, stream=1e10))
    assert prompt_lines[1][-2:] == ["", ""]  # many tokens are not bound by reading weights
    text = where.markdown({"model": "a"}, tables)
    assert text.startswith("- model: a\n- limits with 2 threads: peak ")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} == {len(where.COLUMNS) + 1}


@pytest.mark.parametrize(("name", "flag"), [("avx2", "-mavx2"), ("avx512", "-mavx512f")])
def test_the_limits_are_those_of_the_kernels_set(tmp_path, monkeypatch, name, flag):
    commands = []

    def refuse(command, **_):
        commands.append(command)
        raise OSError(2, "none")

    monkeypatch.setattr("bench.limits.isa", lambda: name)
    monkeypatch.setattr("subprocess.run", refuse)
    with pytest.raises(FqError, match="C compiler"):
        Limits(tmp_path)
    assert [part for part in commands[0] if part in ("-mavx2", "-mavx512f", "-march=native")] == [flag]


def test_limits(limits):
    with Executor(2) as executor:
        assert 1e8 < limits.fma(executor) < 1e13
        # every byte is read once: of lengths that are no multiple of anything, by both threads
        arrays = [np.frombuffer(np.random.default_rng(n).bytes(n), np.uint8) for n in (1, 63, 1000, 5001)]
        assert limits.read(arrays, executor) > 0


def test_every_byte_is_read(limits):
    import ctypes

    array = np.random.default_rng(0).integers(0, 256, 5001, dtype=np.uint8)
    pointer, size = (ctypes.c_void_p * 1)(array.ctypes.data), (ctypes.c_size_t * 1)(array.nbytes)

    def both() -> int:
        return limits._read(pointer, size, 1, 0, 2) ^ limits._read(pointer, size, 1, 1, 2)

    before = both()
    for i in (0, 63, 2499, 2500, 2501, 5000):
        array[i] ^= 1
        assert both() != before
        array[i] ^= 1


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--threads", "1", "0"]])
def test_wrong_options_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        where.parse(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_bad_input(capsys):
    assert where.main(["-m", "nothing.gguf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.where: nothing.gguf") and error.count("\n") == 1
