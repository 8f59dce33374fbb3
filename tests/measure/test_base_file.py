"""llama-perplexity's files of log-probabilities, beside a reader and a writer that go value by value."""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from command_line import fq
from hypothesis import given, settings
from hypothesis import strategies as st

from fq import FqError
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.base_file import BaseFile, save_base
from fq.measure.statistics import compare, compare_log_p
from fq_kernels import Executor

N_CTX, CHUNKS = 64, 3
F32 = np.float32


def row_of(logits):
    """A row as the format is documented, value by value."""
    most, low = max(logits), min(logits)
    least = F32(max(low, F32(most - F32(16))))
    total = math.fsum(math.exp(float(x) - float(most)) for x in logits)
    scale = F32(F32(most - least) / F32(65535))
    first = F32(F32(least - most) - F32(math.log(total)))
    steps = [
        min(round(float(F32(F32(x - least) * F32(F32(1) / scale)))), 65535) if scale and x > least else 0
        for x in logits
    ]
    odd = [0] if len(logits) % 2 else []
    return struct.pack("<ff", scale, first) + struct.pack(f"<{len(steps + odd)}H", *steps, *odd)


def read_row(data, n_vocab):
    scale, first = struct.unpack_from("<ff", data)
    return [F32(F32(scale) * F32(q)) + F32(first) for q in struct.unpack_from(f"<{n_vocab}H", data, 8)]


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-40, 40, width=32), min_size=n, max_size=n), min_size=1, max_size=1
        )
    )
)
@settings(deadline=None)
def test_rows_are_as_documented(tmp_path_factory, logits):
    path = tmp_path_factory.mktemp("rows") / "base"
    logits = np.array(logits, F32)
    n_vocab = logits.shape[1]
    with Executor(1) as executor, save_base(path, 3, n_vocab, np.zeros(3, np.int32), executor) as writer:
        writer.add(logits)
    data = path.read_bytes()
    assert data[:32] == b"_logits_" + struct.pack("<6i", 3, n_vocab, 1, 0, 0, 0)
    expected = row_of(list(logits[0]))
    steps = np.frombuffer(data[40:], "<u2").astype(int) - np.frombuffer(expected[8:], "<u2")
    assert len(data) == 32 + len(expected) and np.abs(steps).max() == 0
    found, wanted = np.frombuffer(data[32:40], "<f4"), np.frombuffer(expected[:8], "<f4")
    assert found[0] == wanted[0] and found[1] == pytest.approx(wanted[1], rel=2e-7, abs=1e-6)
    assert list(BaseFile(path).log_p(0)[0]) == read_row(data[32:], n_vocab)


@pytest.fixture(scope="module")
def base(tiny_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.kld"
    options = ["-m", tiny_path, "-c", N_CTX, "--chunks", CHUNKS, "--kl-divergence-base", path]
    out, _ = fq("perplexity", *options, "--json", path.with_suffix(".json"))
    assert "PPL " in out and not path.with_name("base.kld.part").exists()
    return path


def shown(*arguments):
    return json.loads(fq("perplexity", *arguments, "--json", "-")[0])


def test_a_model_beside_its_own_file(tiny_path, base):
    """But for the 16 bits, which is the format's floor."""
    data = shown("-m", tiny_path, "--kl-divergence", "--kl-divergence-base", base, "--control")
    c, written = data["comparison"], json.loads(base.with_suffix(".json").read_text())
    assert data["n_chunks"] == CHUNKS and data["n_ctx"] == N_CTX and data["base_file"] == str(base)
    assert c["ppl_quant"] == written["ppl"] and c["ppl_base"] == pytest.approx(written["ppl"], rel=1e-4)
    assert 0 < c["mean_kld"] < 1e-8 and c["same_top"] > 0.95 and data["control"]["exactly_zero"]
    assert (
        shown("-m", tiny_path, "--kl-divergence", "--kl-divergence-base", base, "--chunks", 2)["n_chunks"]
        == 2
    )


def test_the_floor_costs_nothing(tmp_path):
    """Of a large vocabulary most tokens lie there, and the other stream's are not there."""
    rng = np.random.default_rng(4)
    n, n_vocab = 31, 20000
    logits = rng.normal(0, 4, (n, n_vocab)).astype(F32)
    targets = logits.argsort(axis=1)[np.arange(n), rng.integers(-50, 0, n)]
    other = logits + rng.normal(0, 0.03, logits.shape).astype(F32)
    path = tmp_path / "base"
    with Executor(2) as executor:
        with save_base(path, N_CTX, n_vocab, np.zeros(N_CTX, np.int32), executor) as writer:
            writer.add(logits)
        log_p = BaseFile(path).log_p(0)
        least = log_p.min(axis=1)
        floor = np.exp(least) * (log_p == least[:, None]).sum(axis=1)
        assert floor.max() > 1e-4, "too small for the floor to matter"
        itself = compare_log_p(log_p, logits, targets, executor)
        found, exact = (
            by(base, other, targets, executor) for by, base in ((compare_log_p, log_p), (compare, logits))
        )
    assert 0 <= itself.kld.min() and itself.kld.max() < 1e-7
    assert itself.nll_base == pytest.approx(itself.nll, abs=1.5e-4) and itself.same_top.all()
    assert found.kld == pytest.approx(exact.kld, rel=0.02)
    assert found.nll_base == pytest.approx(exact.nll_base, abs=1.5e-4)


def test_rows_that_do_not_reach_the_floor_are_known(executor):
    """Were their least taken for it, uniform rows would be beside anything at no cost."""
    base = np.log(np.full((1, 4), 0.25, F32))
    other = np.array([[0, 1, 2, 3]], F32)
    found = compare_log_p(base, other, np.array([0]), executor)
    assert found.kld == pytest.approx(compare(base, other, np.array([0]), executor).kld, rel=1e-6)


def test_its_ln_p_is_taken_as_it_stands(tiny_path, base):
    found = shown("-m", tiny_path, "--kl-divergence", "--kl-divergence-base", base)["comparison"]
    file, n = BaseFile(base), N_CTX // 2 - 1
    targets = file.tokens.reshape(CHUNKS, N_CTX)[:, -n:]
    nll = [-float(file.log_p(c)[i, targets[c, i]]) for c in range(CHUNKS) for i in range(n)]
    assert found["ppl_base"] == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=1e-12)


def test_a_rule_beside_the_file(tiny_path, base):
    rule = ["--fake-quant", "*=fp8_e4m3fn"]
    plain = shown("-m", tiny_path, "-c", N_CTX, "--chunks", CHUNKS, *rule)["comparison"]
    found = shown("-m", tiny_path, "--kl-divergence", "--kl-divergence-base", base, *rule)["comparison"]
    assert found["ppl_quant"] == plain["ppl_quant"]
    assert found["mean_kld"] == pytest.approx(plain["mean_kld"], rel=1e-3)


def test_what_it_holds(tiny, base):
    file = BaseFile(base)
    assert (file.n_ctx, file.n_vocab, file.n_chunks) == (N_CTX, tiny.hparams.n_vocab, CHUNKS)
    log_p = file.log_p(CHUNKS - 1)
    assert log_p.shape == (N_CTX // 2 - 1, file.n_vocab) and log_p.dtype == np.float32
    assert np.exp(log_p.astype(np.float64)).sum(axis=1) == pytest.approx(1, abs=1e-3)


def test_interrupted_it_is_not_there(tiny_path, tmp_path, monkeypatch):
    path = tmp_path / "base.kld"
    with pytest.raises(KeyboardInterrupt):
        with Executor(1) as executor, save_base(path, 3, 2, np.zeros(3, np.int32), executor):
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_is_beside_it_stays(tiny_path, tmp_path):
    """A name that only looks like a part of it."""
    text, path = tmp_path / "base.part", tmp_path / "base"
    text.write_text(written := SAMPLE_TEXT.read_text("utf-8"), "utf-8")
    options = ["-m", tiny_path, "-c", N_CTX, "--chunks", 1, "--kl-divergence-base", path]
    fq("perplexity", *options, "-f", text)
    assert text.read_text("utf-8") == written and path.stat().st_size > 1000
    assert sorted(tmp_path.iterdir()) == [path, text]


def test_the_files_chunks_are_no_neighbours(tiny_path, base):
    out, _ = fq("perplexity", "-m", tiny_path, "--kl-divergence", "--kl-divergence-base", base)
    assert "; the file's chunks" in out and "neighbouring" not in out


def test_files_that_are_none(base, tmp_path):
    data, path = bytearray(base.read_bytes()), tmp_path / "base.kld"

    def refused(content, words, chunk=None):
        path.write_bytes(content)
        with pytest.raises(FqError, match=words):
            BaseFile(path).log_p(0)

    refused(b"", "no file of log-probabilities")
    refused(b"_logitz_" + data[8:], "no file of log-probabilities")
    refused(data[:19], "no file of log-probabilities")
    refused(data[:-1], "cut short: ")
    for at, value in ((8, 2), (8, -1), (12, 0), (12, 1 << 30), (16, 0), (16, -5)):
        refused(data[:at] + struct.pack("<i", value) + data[at + 4 :], "it says that it has")
    refused(data[:16] + struct.pack("<i", 1 << 30) + data[20:], "cut short: ")
    refused(data[:20] + struct.pack("<i", 1 << 20) + data[24:], "tokens that are not in its vocabulary")
    begin = 20 + 4 * CHUNKS * N_CTX
    for scale in (float("nan"), float("inf"), -1.0):
        refused(data[:begin] + struct.pack("<f", scale) + data[begin + 4 :], "chunk 1 has rows whose scale")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kl-divergence"], "--kl-divergence needs --kl-divergence-base"),
        (["--kl-divergence", "BASE", "-f", "x.txt"], "--file: the tokens and the baseline are the file's"),
        (["--kl-divergence", "BASE", "-c", "32"], "--ctx-size: the tokens and the baseline are the file's"),
        (["--kl-divergence", "BASE", "--chunk-seed", "0"], "--chunk-seed: the tokens and"),
        (["--kl-divergence", "BASE", "--base-model", "x"], "--base-model: the tokens and"),
        (["--kl-divergence", "BASE", "--no-baseline"], "--kl-divergence needs the baseline"),
        (["--kl-divergence", "BASE", "--scored", "all"], "nothing else can be scored"),
        (["--kl-divergence-base", "OUT", "--fake-quant", "ffn_norm=bf16"], "of a model as it is"),
        (["--kl-divergence-base", "MODEL"], "--kl-divergence-base"),
    ],
)
def test_bad_requests(tiny_path, base, tmp_path, options, words):
    stand_in = {"BASE": ["--kl-divergence-base", base], "OUT": [tmp_path / "o"], "MODEL": [tiny_path]}
    options = [word for one in options for word in stand_in.get(one, [one])]
    before = tiny_path.read_bytes()
    _, err = fq("perplexity", "-m", tiny_path, *options, status=2)
    assert words in err and tiny_path.read_bytes() == before and not list(tmp_path.iterdir())


def test_it_is_not_written_over(base, tiny_path):
    before = base.read_bytes()
    options = ["--kl-divergence", "--kl-divergence-base", base, "--json", base]
    _, err = fq("perplexity", "-m", tiny_path, *options, status=2)
    assert "is the baseline's file" in err and base.read_bytes() == before


def test_another_vocabulary(base, tiny_path, tmp_path):
    data = bytearray(base.read_bytes())
    n_vocab = struct.unpack_from("<i", data, 12)[0]
    small = tmp_path / "small.kld"
    head = data[:12] + struct.pack("<i", n_vocab - 2) + data[16:]
    tokens = np.zeros(CHUNKS * N_CTX, "<i4").tobytes()
    rows = CHUNKS * (N_CTX // 2 - 1)
    whole = 20 + len(tokens) + rows * 2 * (4 + n_vocab - 2)
    small.write_bytes((head[:20] + tokens + head[20 + len(tokens) :])[:whole])
    _, err = fq("perplexity", "-m", tiny_path, "--kl-divergence", "--kl-divergence-base", small, status=2)
    assert f"has a vocabulary of {n_vocab - 2} tokens" in err
