"""Static scales of a model's sites: against numpy on the values that pass there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq

from fq import Context, Executor, FqError, Model
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.measure.calibration import Calibrating, Method
from fq.measure.chunks import Chunks, Settings, first_scored
from fq.measure.observation import Observation
from fq.run.finite import in_batches
from fq_kernels import get_format
from fq_kernels.rules import FakeQuant, Observer

SITES = ["ffn_norm[*].weighted", "attn_norm[0].raw", "output_norm.in", "k[1]", "ffn_act[0]"]
SETTINGS = Settings(n_ctx=48, chunks=3, batch=20)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "tiny.gguf"
    shape = tiny_shape(n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    return path


@pytest.fixture(scope="module")
def model(path):
    return Model(path)


@pytest.fixture(scope="module")
def tokens(model):
    return model.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))[:400]


@pytest.fixture(scope="module")
def values(model, tokens, executor):
    """site -> all rows that pass there, by what a rule rounds: float32 rounded to itself."""
    found: dict[str, list[np.ndarray]] = {}

    class Keeping(FakeQuant):
        def _round(self, counter, x, out, executor):
            found.setdefault(str(counter.site), []).append(x.copy())
            return x

        def rms_norm(self, norm, x, *, eps, weight, out, executor=None):
            read, raw, weighted = self._by_place[norm]
            rms = np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=1, keepdims=True) + eps)
            for counter, y in ((read, x), (raw, x / rms), (weighted, x / rms * weight)):
                if counter.rule:
                    found.setdefault(str(counter.site), []).append(y.astype(np.float32))
            return FakeQuant(self.values).rms_norm(norm, x, eps=eps, weight=weight, out=out)

    context = Context(model, 48, executor, Keeping(model.values, [f"{site}=bf16" for site in SITES]))
    chunks = Chunks(model, tokens, SETTINGS)
    for position in range(chunks.n):
        context.clear()
        for part, wanted in in_batches(chunks[position][0][:-1], first_scored(48), 20):
            context.eval(part, wanted)
    return {site: np.concatenate(rows) for site, rows in found.items()}


def calibrated(model, tokens, method: str, per: str) -> dict[str, np.ndarray]:
    with Executor(2) as executor:
        run = Calibrating(
            model, tokens, SITES, method=Method.parse(method), per=per, executor=executor, settings=SETTINGS
        )
        assert list(run) == list(range(run.n_steps))
    return {site: np.array(value) for site, value in run.result("", "", "")["sites"].items()}


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_largest_magnitude(model, tokens, values, per):
    found = calibrated(model, tokens, "largest", per)
    assert list(found) == ["attn_norm[0].raw", "ffn_norm[0].weighted", "ffn_act[0]", "k[1]",
                           "ffn_norm[1].weighted", "output_norm.in"]  # fmt: skip
    for site, largest in found.items():
        np.testing.assert_allclose(
            largest, np.abs(values[site]).max(axis=0 if per == "channel" else None), 1e-6
        )


@pytest.mark.parametrize(
    ("percent", "n", "above"), [(99.9, 1000, 1), (99.9, 504000, 504), (99.9, 999, 0), (50, 3, 1)]
)
def test_what_is_above_a_percentile_is_counted_exactly(percent, n, above):
    """100 - 99.9 is a little less than 0.1 in binary."""
    assert Method.parse(f"percentile={percent}").above(n) == above


def test_what_does_not_fit_the_memory_is_said_at_once(model, tokens, monkeypatch):
    monkeypatch.setattr("fq.measure.calibration.available_memory", lambda: 50_000)
    calibrated(model, tokens, "percentile=99.9", "tensor")
    with pytest.raises(FqError, match=r"percentile=50: magnitudes above it take .* fewer --chunks"):
        calibrated(model, tokens, "percentile=50", "tensor")


@pytest.mark.parametrize("percent", [50, 90, 99.5, 100])
@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_a_percentile_is_numpys(model, tokens, values, per, percent):
    found = calibrated(model, tokens, f"percentile={percent}", per)
    for site, range_ in found.items():
        magnitudes = np.abs(values[site])
        axis = 0 if per == "channel" else None
        # one of the magnitudes: no fewer than that part of them are at most as large
        wanted = np.percentile(magnitudes, percent, axis=axis, method="inverted_cdf")
        above = np.percentile(
            magnitudes, min(percent + 100 / len(magnitudes), 100), axis=axis, method="higher"
        )
        assert (range_ >= wanted * (1 - 1e-6)).all() and (range_ <= above * (1 + 1e-6)).all()


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_the_least_squared_error(model, tokens, values, per):
    found = calibrated(model, tokens, "mse=int4", per)
    axis = 0 if per == "channel" else None

    def errors(x: np.ndarray, ranges: np.ndarray) -> np.ndarray:
        fmt = get_format("int4:scale=1").with_ranges(np.atleast_1d(ranges).astype(np.float32))
        return np.square(fmt.quantise(x).values.astype(np.float64) - x).sum(axis=axis)

    for site, best in found.items():
        x = values[site]
        largest = np.abs(x).max(axis=axis)
        for part in (0.3, 0.5, 0.7, 0.9, 1):
            assert (errors(x, best) <= errors(x, largest * part) * 1.01).all()
        if per == "tensor":
            assert 0.2 < best / largest < 1, "some are cut"


def test_the_chunks_first_token_is_said_where_its_row_comes(model, tokens, executor):
    seen: list[tuple[str, int, bool]] = []
    sites = ["ffn_norm[*].raw", "k[0]"]
    run = Observation(
        model, tokens, sites, lambda site, x, first: seen.append((str(site), len(x), first)),
        executor=executor, settings=SETTINGS,
    )  # fmt: skip
    assert list(run) == [0, 1, 2]
    a_chunk = seen[: len(seen) // 3]
    assert a_chunk * 3 == seen
    assert [s for s in a_chunk if s[0] == "ffn_norm[0].raw"] == [
        ("ffn_norm[0].raw", 20, True), ("ffn_norm[0].raw", 20, False), ("ffn_norm[0].raw", 7, False)
    ]  # fmt: skip
    # of the last layer the rows that are scored alone
    assert [s for s in a_chunk if s[0] == "ffn_norm[1].raw"][-2:] == [
        ("ffn_norm[1].raw", 16, False), ("ffn_norm[1].raw", 7, False)
    ]  # fmt: skip
    assert a_chunk.count(("k[0]", 40, True)) == 1


def test_what_is_observed_is_not_changed(model, tokens, executor):
    context = Context(model, 48, executor)
    expected = context.eval(tokens[:40], slice(None)).copy()
    context.clear()
    context.fake_quant = Observer(
        model.values, ["*.in", "*.raw", "*.weighted", "activation"], lambda site, x: None
    )
    assert context.eval(tokens[:40], slice(None)).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("best", "the method must be largest, percentile=P or mse=FORMAT"),
        ("largest=1", "the method must be"),
        ("percentile=49", "a percentile must be from 50 to 100"),
        ("percentile=nan", "a percentile must be from 50 to 100"),
        ("mse=bf16", "format bf16 takes no static scale"),
        ("mse=int8:tensor", "takes no static scale, or not beside its options"),
        ("mse=fp8_e4m3:truncate", "takes no static scale, or not beside its options"),
        ("mse=signs_int8", "takes no static scale"),
        ("mse=int9", "unknown format 'int9'"),
    ],
)
def test_methods_that_there_are_not(method, message):
    with pytest.raises(FqError, match=message):
        Method.parse(method)


def test_least_error_per_channel_of_a_format_with_one_scale(model, tokens):
    with pytest.raises(
        FqError, match="format nvfp4 has one static scale for a tensor, not one for each channel"
    ):
        calibrated(model, tokens, "mse=nvfp4", "channel")


@pytest.mark.parametrize("command", [("calibrate", "-o", "cal.json"), ("ranges",), ("sensitivity",)])
@pytest.mark.parametrize("sites", ["ffn_norm=acc", "ffn_norm[*].raw=int8"])
def test_sites_are_named_without_a_format(path, tmp_path, command, sites):
    _, err = fq(*command, "-m", path, "-c", 48, "--chunks", 1, "--sites", sites, status=2, cwd=tmp_path)
    assert f"sites '{sites}' are named without a format" in err and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    "command",
    [
        ("perplexity", "--fake-quant", "k=int8:had=64"),
        ("perplexity", "--base-fake-quant", "k=int8:had=64"),
        ("sites", "--fake-quant", "k=int8:had=64"),
        ("sweep", "--sites", "k", "--format", "bf16", "--format", "int8:had=64"),
    ],
    ids=" ".join,
)
def test_a_format_that_does_not_fit_is_said_before_anything_is_measured(path, tmp_path, command):
    name, *rest = command
    _, err = fq(name, "-m", path, *rest, status=2, cwd=tmp_path)
    assert "k[0]: format int8:had=64 rotates 64 values together: rows of" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_and_what_says_that_the_text_is_the_same(path, tmp_path):
    file, text = tmp_path / "Cal.json", tmp_path / "text.txt"
    text.write_text("Another text. " * 100)
    out, _ = fq("calibrate", "-m", path, "-c", 48, "--chunks", 2, "-o", file, "--per", "channel")
    assert out == f"{file}: 2 sites, channel scales by largest\n"
    data = json.loads(file.read_text())
    assert data["per"] == "channel" and len(data["sites"]["ffn_norm[1].weighted"]) == 64
    assert len(data["text"]["sha256"]) == 64 and len(data["model"]["sha256"]) == 64
    rule = ["--fake-quant", f"ffn_norm[*].weighted=int8:scale=@{file}"]
    out, _ = fq("perplexity", "-m", path, "-c", 48, "--chunks", 2, "--base-fake-quant", rule[1])
    assert "THE TEXT THAT IS MEASURED ON" in out
    shared = ["-m", path, "-c", 48, "--chunks", 2, *rule]
    out, _ = fq("perplexity", *shared)
    scales = f"Cal.json: largest per channel, of {path.name}, on sample text of the package"
    assert f"{scales} - THE TEXT THAT IS MEASURED ON\n" in out
    out, _ = fq("perplexity", *shared, "-f", text, "--json", tmp_path / "figures.json")
    assert f"{scales}\n" in out
    (found,) = json.loads((tmp_path / "figures.json").read_text())["calibrations"]
    assert found["same_text"] is False and found["file"] == str(file)
    _, err = fq("perplexity", *shared[:-1], f"attn_norm[*].raw=int8:scale=@{file}", status=2)
    assert "Cal.json has no scale for attn_norm[0].raw" in err
    _, err = fq("perplexity", *shared[:-1], "attn_norm[*].raw=int8:scale=@nowhere.json", status=2)
    assert "nowhere.json: No such file" in err


def test_a_sweep_with_static_scales_keeps_what_they_are_of(path, tmp_path):
    file, store = tmp_path / "cal.json", tmp_path / "store.sqlite"
    calibrate = ["calibrate", "-m", path, "-c", 48, "-o", file, "--chunks"]
    fq(*calibrate, 2)
    sweep = ["sweep", "-m", path, "-c", 48, "--chunks", 2, "--store", store, "--resume",
             "--sites", "ffn_norm[*].weighted", "--format", f"int8:scale=@{file}"]  # fmt: skip
    out, _ = fq(*sweep)
    assert (
        f"cal.json: largest per tensor, of {path.name}, on sample text of the package - THE TEXT THAT IS"
        in out
    )
    _, err = fq(*sweep)
    assert "run 1" in err
    fq(*calibrate, 1)
    _, err = fq(*sweep)
    assert "no such run to go on with" in err, "other scales are another experiment"
