"""Estimates of what rounding costs: against what they are defined as, and against exact sweeps."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from fq import Executor, FqError, Model, NotFiniteError
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.measure.cells import Cell
from fq.measure.estimates import Gains, estimated
from fq.measure.labels import sampled_labels
from fq.measure.sensitivity import (
    COLUMNS,
    DEFAULT_FORMATS,
    NEIGHBOURS,
    Products,
    Sensitivity,
    costs,
    gain_cells,
)
from fq.measure.sweep import Sweep
from fq.run.backward import Backward
from fq_kernels import get_format, register_format, rms_norm_f32, round_trip
from fq_kernels.formats import unregister_format
from fq_kernels.formats.gain import BY
from fq_kernels.rules import FakeQuant

N_CTX = 48
DIGEST = "de9f4a0f70a5d0ff"


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


def run_of(model, tokens, sites, formats, executor, **settings):
    run = Sensitivity(
        model, tokens, sites, formats, executor=executor, **({"n_ctx": N_CTX, "chunks": 2} | settings)
    )
    assert list(run) == list(range(run.text.n))
    return run


def column(run, position, site, spec):
    at = [str(site) for site in run.sites].index(site), run.formats.index(spec)
    return dict(zip(COLUMNS, run.finished[position][at], strict=True))


def gradients(run, model, position, executor):
    """(value, gradients) of places: each layer's norms' inputs and results, k, the residual; and labels of
    its own."""
    ids, _ = run.text[position]
    back = Backward(model, N_CTX, executor)
    logits = back.forward(ids[:-1], N_CTX // 2)
    labels = sampled_labels(logits, run.samples, run.seed, run.text.indices[position], executor)
    found = {}

    def visit(at):
        node = model.graph.nodes[at.number]
        for value in node.values:
            found[str(value.place)] = at.value, at.grad
            if value.is_norm:
                found[f"{value.place}.in"] = at.inputs[0], at.of_inputs[0]

    back.backward_of(labels, visit)
    return found


def by_definition(x, grads, fmt, rows, first_row, ids):
    """Of one format, in float64; x (rows, n), ids of its tokens."""
    x64, g = x.astype(np.float64), grads.astype(np.float64)
    e = round_trip(x, fmt, first_row=first_row).astype(np.float64) - x64
    c = (e * x64).sum() / (x64 * x64).sum()
    r = e - c * x64

    def tokens(error):
        return (g * error).sum(axis=-1).reshape(len(g), -1, rows).sum(axis=2)

    def blocks(values, numbers):
        sums = np.zeros((len(g), max(numbers) + 1))
        for t, number in enumerate(numbers):
            sums[:, number] += values[:, t]
        return sums

    def cost(squares):
        return squares.sum() / 2 / len(g) / (N_CTX - 1 - N_CTX // 2)

    def bound(squares):
        """Of tokens whose squares are of samples: what their costs are multiplied by."""
        nats = squares.sum(axis=0) / 2 / len(g)
        return 1 / np.sqrt(1 + nats**2)

    plain = tokens(r)
    shorter = plain * np.sqrt(bound(plain**2))
    squares = blocks(shorter, ids) ** 2
    lines = [np.polyval(np.polyfit(x64[:, j], r[:, j], 1), x64[:, j]) for j in range(x.shape[1])]
    line = tokens(np.stack(lines, axis=1)) * np.sqrt(bound(plain**2))
    elements = ((g * r) ** 2).sum(axis=2).reshape(len(g), -1, rows).sum(axis=2)
    return {
        "value_sq": (x64 * x64).sum(),
        "error_sq": (e * e).sum(),
        "along": c,
        "blocks": cost(squares),
        "cross": 2 * c * cost(blocks(shorter, ids) * blocks(tokens(x64), ids)),
        "by_token": cost(shorter**2),
        "neighbours": cost(blocks(shorter, [t // NEIGHBOURS for t in range(len(ids))]) ** 2),
        "by_element": cost(elements * bound(elements)),
        "whole_by_token": cost(tokens(e) ** 2),
        "whole_by_element": cost((g * e) ** 2),
        "unbounded": cost(blocks(plain, ids) ** 2),
        "common": cost(line.sum(axis=1) ** 2) - cost(blocks(line, ids) ** 2),
        "largest": squares.sum(axis=0).max() / squares.sum(),
    }


def test_a_chunk_leaves_what_is_defined(tiny, tokens, executor):
    """Before the weight, after it, at a norm's input, of heads, of the rows that are scored alone; in formats
    with a bias, random numbers, scales by row and by tensor."""
    formats = ["bf16:truncate", "fp8_e4m3fn:stochastic,seed=3", "mxfp4", "int8:tensor"]
    sites = ["attn_norm[1].in", "ffn_norm[0].raw", "ffn_norm[1].weighted", "k[0]", "l_out[1]", "ffn_act[1]"]
    run = run_of(tiny, tokens, sites, formats, executor, samples=3)
    for position in range(2):
        found = gradients(run, tiny, position, executor)
        for site in map(str, run.sites):
            x, grads = found[site.removesuffix(".raw").removesuffix(".weighted")]
            rows = 2 if site.startswith("k[") else 1
            x, grads = x.reshape(len(x) * rows, -1), grads.reshape(3, len(x) * rows, -1)
            if site.endswith(".raw"):
                read, _ = found[site.replace("raw", "in")]
                weight = tiny.vectors["blk.0.ffn_norm.weight"]
                x, grads = rms_norm_f32(read, eps=tiny.hparams.rms_eps), grads * weight
            ids = run.text[position][0][:-1][-(len(x) // rows) :]
            assert (len(ids) < N_CTX - 1) == (site in ("l_out[1]", "ffn_act[1]", "ffn_norm[1].weighted"))
            for spec in run.formats:
                (counter,) = FakeQuant(tiny.values, f"{site}={spec}").matched
                wanted = by_definition(x, grads, counter.format, rows, position * len(x), ids)
                got = column(run, position, site, spec)
                # what is left of nearly equal numbers has their error
                scale = {"along": math.sqrt(wanted["error_sq"] / wanted["value_sq"])}
                scale["cross"] = scale["common"] = wanted["whole_by_token"]
                assert np.isnan(got["common"]) == (position == 1), "looked at in each second chunk"
                if position == 1:
                    del wanted["common"]
                for name, value in wanted.items():
                    close = pytest.approx(value, rel=2e-4, abs=2e-4 * scale.get(name, 0))
                    assert got[name] == close, (site, spec, name)


def beside_the_sweep(run, model, tokens, executor):
    """Estimates of a run of chunks of 128 tokens, and what its cells cost exactly, (sites, formats)."""
    gains, n = gain_cells(run.asked), run.text.n
    exact = [Cell(f"{s}={f}", "single", f, (f"{s}={f}",)) for s in run.sites for f in run.formats]
    cells = [*gains.values(), *exact]
    sweep = Sweep(model, tokens, cells, executor=executor, n_ctx=128, chunks=n)
    for _ in sweep:
        pass
    kld = [[sweep.finished[i, c].paired.kld.mean() for c in range(n)] for i in range(len(cells))]
    of_class = dict(zip(gains, map(np.array, kld), strict=False))
    found = estimated(run.asked, [run.finished[c] for c in range(n)], Gains(run.asked.classes, of_class))
    return found, np.mean(kld[len(gains) :], axis=1).reshape(len(run.sites), -1)


def test_as_the_exact_sweep_has_it(executor, tmp_path):
    """Of sites of all kinds in a format without and one with a bias, within the noise of the labels."""
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="F32")
    model = Model(path)
    tokens = model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    sites = [
        "attn_norm[0].raw",
        "ffn_norm[1].weighted",
        "ffn_norm[0].in",
        "q[1]",
        "v[0]",
        "ffn_up[0]",
        "l_out[0]",
    ]
    formats = ["fp8_e5m2", "bf16:truncate"]
    run = run_of(model, tokens, sites, formats, executor, samples=16, n_ctx=128, chunks=4)
    found, measured = beside_the_sweep(run, model, tokens, executor)
    ratios = measured / found.kld
    assert (0.7 < ratios).all() and (ratios < 1.4).all(), ratios
    assert abs(np.log(ratios).mean()) < 0.1
    # where a format has a bias, the diagonal of Fisher's matrix does not see what errors have in common
    by_element = measured / found.figures["whole_by_element"]
    assert np.abs(np.log(by_element[:, 1])).mean() > 3 * np.abs(np.log(ratios[:, 1])).mean()


def test_what_errors_have_in_common_by_channel(executor, tmp_path):
    """A format that moves each channel by as much in all rows: tokens say far too little one by one."""
    path = tmp_path / "tiny.gguf"
    shape = tiny_shape(n_embd=64, n_ff=96, n_layer=8, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    model = Model(path)
    tokens = model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    move = np.random.default_rng(7).standard_normal(64).astype(np.float32) * np.float32(0.01)
    register_format("moved", lambda x: x + move, idempotent=False)
    try:
        run = run_of(
            model, tokens, ["ffn_norm[*].weighted"], ["moved"], executor, n_ctx=128, chunks=4, samples=16
        )
        found, measured = beside_the_sweep(run, model, tokens, executor)
    finally:
        unregister_format("moved")
    ratios, without = (np.median(measured / some) for some in (found.kld, found.figures["blocks"]))
    assert 0.8 < ratios < 1.25 and without > 1.4


def test_the_same_bits_on_any_set_and_with_any_threads(isa, tiny, tokens):
    sites, formats = ["*.raw", "k", "ffn_out[1]"], ["bf16", "fp8_e4m3fn:truncate", "int4", "nvfp4"]
    found = set()
    for threads in (1, 3):
        with Executor(threads) as executor:
            run = run_of(tiny, tokens, sites, formats, executor)
        found.add(hashlib.sha256(b"".join(run.finished[c].tobytes() for c in (0, 1))).hexdigest()[:16])
    assert found == {DIGEST}


def test_pieces_have_no_say(tiny, tokens, executor, monkeypatch):
    sites, formats = ["ffn_norm[0].raw"], ["bf16:stochastic", "int8", "int8:tensor"]
    whole = run_of(tiny, tokens, sites, formats, executor).finished[0]
    monkeypatch.setattr("fq.measure.sensitivity.PIECE", 200)
    assert run_of(tiny, tokens, sites, formats, executor).finished[0].tobytes() == whole.tobytes()


def test_a_run_goes_on(tiny, tokens, executor):
    whole = run_of(tiny, tokens, ["l_out"], ["bf16"], executor)
    again = Sensitivity(tiny, tokens, ["l_out"], ["bf16"], executor=executor, n_ctx=N_CTX, chunks=2)
    again.finished[0] = whole.finished[0]
    steps = []
    again.on_step = lambda: steps.append(1)
    planned = again.steps
    assert list(again) == [1] and again.finished[1].tobytes() == whole.finished[1].tobytes()
    assert len(steps) == planned


def test_every_site_and_all_default_formats(tiny, tokens, executor):
    run = run_of(tiny, tokens, [], DEFAULT_FORMATS, executor, chunks=1)
    assert len(run.sites) == len([site for value in tiny.values for site in value.sites])
    assert run.finished[0].shape == (len(run.sites), 45, len(COLUMNS))
    # rows of a head and of the feed-forward layer are no multiple of 64, which had=64 rotates together
    narrow = {"q", "k", "v", "k_proj", "v_proj", "ffn_gate", "ffn_up", "ffn_act"}
    misfit = np.array([[s.place.kind in narrow and "had" in f for f in run.formats] for s in run.sites])
    assert misfit.sum() == 2 * len(narrow) and (np.isnan(run.finished[0]).all(axis=2) == misfit).all()
    assert np.isfinite(run.finished[0][~misfit]).all()
    assert all(not get_format(spec).whole_tensor for spec in DEFAULT_FORMATS)


def test_a_format_of_ones_own(tiny, tokens, executor):
    """A Python function is asked for its errors, as any other format."""
    register_format("mine", lambda x: round_trip(x, "bf16"), bits_per_value=16)
    try:
        run = run_of(tiny, tokens, ["ffn_norm[0].raw", "k"], ["mine", "bf16"], executor, chunks=1)
    finally:
        unregister_format("mine")
    assert (run.finished[0][:, 0] == run.finished[0][:, 1]).all() and (run.finished[0][..., 1] > 0).all()


def test_a_format_of_ones_own_that_fails(tiny, tokens, executor):
    register_format("mine", lambda x: 1 / 0)
    try:
        with pytest.raises(FqError, match=r"^format mine at k\[1\]: division by zero$"):
            run_of(tiny, tokens, ["k[1]"], ["mine"], executor, chunks=1)
    finally:
        unregister_format("mine")


def test_default_formats_that_fit_nowhere_are_left_out(tiny, tokens, executor):
    run = Sensitivity(tiny, tokens, ["k"], None, executor=executor, n_ctx=N_CTX)
    assert len(run.formats) == 44 and "int8:had=64" not in run.formats


def test_what_is_not_finite(tiny, tokens, executor):
    """fp8_e5m2 without saturation makes infinities of large values: of those alone nothing is said."""
    run = run_of(tiny, tokens, ["ffn_norm[0].raw"], ["bf16", "e2m1:no-saturate"], executor, chunks=1)
    assert np.isfinite(run.finished[0][0, 0]).all() and np.isnan(run.finished[0][0, 1]).all()


def test_what_a_token_costs_is_bounded():
    """Of four tokens, two of them equal, one with 200 nats: it is tipped over once, and its cross term is as
    if its error were as much smaller; what is small stays."""
    own = np.zeros((4, 6), np.float32)
    own[:, 0], own[:, 4:] = 10.0, [[-1.0, -3.0]] * 4
    error = np.zeros((4, 6), np.float32)
    error[:, 4:] = [[20.0, 20.0], [0.02, 0.02], [0.0, 0.0], [0.005, 0.005]]
    error[:, 2] = [400.0, 1e-4, 0.0, 1e-4]
    error[:, 1] = 0.1  # <e, x> of each: c is 0.01
    lines = np.float32([[[10.0, 5.0], [0.1, 0.2], [0.3, 0.1], [0.2, 0.4]]])
    found = dict(
        zip(COLUMNS, costs(Products(own, error[None], lines), 1, np.array([0, 1, 2, 1]))[0], strict=True)
    )
    of_x, c = np.array([1.0, 3.0]), 0.01
    r = error[:, 4:].astype(np.float64) - c * of_x
    nats = (r**2).sum(axis=1) / 4
    bounded = nats / np.sqrt(1 + nats**2)
    assert found["along"] == pytest.approx(c) and nats[0] > 190
    assert found["by_token"] == pytest.approx(bounded.sum()) and bounded[0] < 1 < found["by_token"] + 1e-4
    r *= np.sqrt(bounded / nats)[:, None]
    blocks = np.array([r[0], r[1] + r[3], r[2]])
    assert found["blocks"] == pytest.approx((blocks**2).sum() / 4)
    assert found["cross"] == pytest.approx(c * (blocks * [of_x, 2 * of_x, of_x]).sum() / 2)
    assert found["largest"] == pytest.approx((blocks**2).sum(axis=1).max() / (blocks**2).sum())
    assert found["unbounded"] == pytest.approx(nats[0], rel=1e-3)
    assert found["by_element"] == pytest.approx(1, rel=1e-3)
    # of a line as of the error
    line = (lines[0].astype(np.float64) - c * of_x) * np.sqrt(bounded / nats)[:, None]
    blocks = np.array([line[0], line[1] + line[3], line[2]])
    assert found["common"] == pytest.approx(((line.sum(axis=0) ** 2).sum() - (blocks**2).sum()) / 4)


def test_costs_of_nothing():
    """No error, and a value that is 0."""
    own = np.zeros((8, 5), np.float32)
    found = dict(
        zip(COLUMNS, costs(Products(own, own[None], own[None, :, 4:]), 1, np.arange(8))[0], strict=True)
    )
    assert set(found.values()) == {0.0}


def test_gain_is_a_factor():
    x = np.float32([[1, -2, 0, 3e38]])
    y = round_trip(x, "gain")
    assert (
        y[0, 0] == 1 + BY
        and y[0, 1] == -2 * (1 + BY)
        and y[0, 2] == 0
        and y[0, 3] == x[0, 3] * np.float32(1 + BY)
    )


def test_gain_cells_are_at_the_last_site_of_each_class(tiny, tokens, executor):
    run = Sensitivity(
        tiny, tokens, ["ffn_up[0]", "ffn_act[0]", "*[0].in"], ["bf16"], executor=executor, n_ctx=N_CTX
    )
    (cell,) = gain_cells(run.asked).values()
    assert cell.rules == ("ffn_act[0]=gain",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sites": ["mlp[0]"]}, "matches no site"),
        ({"formats": ["bf17"]}, "unknown format 'bf17'"),
        ({"formats": ["bf16", "bf16:nearest-even"]}, "a format is asked for twice"),
        ({"formats": []}, "no formats"),
        ({"formats": ["bf16", "mxfp4:had=128"]}, "mxfp4:had=128: format mxfp4:had=128 rotates 128 values"),
        ({"samples": 0}, "samples must be from 1 to 64, not 0"),
        ({"samples": 65}, "samples must be from 1 to 64, not 65"),
        ({"activations": "ggml"}, "exact activations"),
        ({"n_ctx": 4096}, "the model allows at most 128"),
    ],
)
def test_bad_requests(tiny, tokens, executor, change, words):
    asked = {"sites": ["l_out"], "formats": ["bf16"], "n_ctx": N_CTX} | change
    sites, formats = asked.pop("sites"), asked.pop("formats")
    with pytest.raises(FqError, match=words):
        Sensitivity(tiny, tokens, sites, formats, executor=executor, **asked)


def test_a_model_that_is_not_finite(tmp_path, executor):
    path = tmp_path / "nan.gguf"
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=128), mix="F32")
    tensor = Model(path).file.tensors["output_norm.weight"]
    data = np.memmap(path, np.float32, "r+", tensor.offset, tensor.shape)
    data[3] = np.nan
    data.flush()
    model = Model(path)
    tokens = model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))
    with pytest.raises(
        NotFiniteError, match=r"^the model: the logits are not finite in chunk .* result_norm"
    ):
        run_of(model, tokens, ["l_out"], ["bf16"], executor)
