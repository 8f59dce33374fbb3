"""Traces: one event per kernel call, in a file that is JSON whenever it ends, and the summary of it."""

from __future__ import annotations

import json
import os
import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fq.arch.ops
from fq import Context, FqError, Perplexity
from fq.cli import main
from fq.results.trace_summary import summarise, summary_text
from fq.run.trace import Trace, provenance
from fq_kernels import Executor
from fq_kernels.rules import FakeQuant, Rule

ABOUT = {"model": "m.gguf"}
PROMPT, DECODED = 3, 4


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trace.json"


def load(path):
    """(file, node events, eval events)"""
    data = json.loads(path.read_text(encoding="utf-8"))
    events = [e for e in data["traceEvents"] if e["ph"] == "X"]
    return data, [e for e in events if e["cat"] != "eval"], [e for e in events if e["cat"] == "eval"]


def decode(context, prompt=PROMPT, decoded=DECODED):
    context.eval(np.arange(prompt) + 5)
    for token in range(decoded):
        context.eval([token + 9])


def traced(tiny, path, rules=(), executor=None, prompt=PROMPT, decoded=DECODED):
    """Trace a prompt and the tokens after it; the counters of the run."""
    fake_quant = FakeQuant(tiny.values, list(rules))
    with Executor(2) as own, Trace(path, provenance(tiny, executor or own, rules)) as trace:
        decode(Context(tiny, 32, executor or own, fake_quant, trace), prompt, decoded)
    return fake_quant


def test_every_node_of_every_evaluation_once_and_in_order(tiny, path, executor):
    traced(tiny, path, [Rule("bf16")], executor)
    data, nodes, evals = load(path)
    graph = [(node.name, node.op.value) for node in tiny.graph.nodes]
    assert [(e["name"], e["cat"]) for e in nodes] == graph * (1 + DECODED)
    assert all(e["args"]["op"] == e["cat"] for e in nodes)
    assert [e["args"]["n_tokens"] for e in evals] == [PROMPT, *[1] * DECODED]
    assert [e["args"]["n_past"] for e in evals] == [0, *range(PROMPT, PROMPT + DECODED)]
    assert [e["args"]["layer"] for e in nodes if e["name"] == "ffn_norm-1"] == [1] * (1 + DECODED)
    about = data["otherData"]
    assert (about["model"], about["n_layer"], about["threads"]) == ("tiny.gguf", 2, 2)
    assert about["rules"] == [str(Rule("bf16"))]
    assert "/" not in json.dumps(about)  # nothing of the machine it ran on


def test_the_format_that_viewers_want(tiny, path, executor):
    traced(tiny, path, [], executor)
    data, nodes, evals = load(path)
    assert data["displayTimeUnit"] == "ms"
    metadata = [e for e in data["traceEvents"] if e["ph"] == "M"]
    assert [e["name"] for e in metadata] == ["process_name", "thread_name"]
    for event in nodes + evals:
        assert event["pid"] == os.getpid() and event["tid"] == threading.get_native_id()
        assert event["ts"] >= 0 and event["dur"] >= 0
        assert event.keys() == {"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"}
    assert all(isinstance(int(e["args"]["data"], 16), int) for e in nodes)


def test_nodes_lie_inside_their_evaluation_one_after_another(tiny, path, executor):
    traced(tiny, path, [], executor)
    _, nodes, evals = load(path)
    n, half_a_ns = len(tiny.graph.nodes), 5e-4
    for i, outer in enumerate(evals):
        end = outer["ts"]
        for event in nodes[i * n : (i + 1) * n]:
            assert event["ts"] >= end - half_a_ns
            end = event["ts"] + event["dur"]
        assert end <= outer["ts"] + outer["dur"] + half_a_ns


def test_values_that_are_no_norms(tiny, path, executor):
    """What is rounded of them, in rows of the node's value: each has several where heads are rounded."""
    traced(tiny, path, [Rule.parse("v[1]=bf16"), Rule.parse("l_out=f16:first-call")], executor)
    _, nodes, _ = load(path)
    rounded = {e["name"]: e["args"] for e in nodes if e["args"].get("rows_rounded")}
    assert set(rounded) == {"Vcur-1", "l_out-0", "l_out-1"}
    of_v = [e["args"] for e in nodes if e["name"] == "Vcur-1"]
    assert all(args["rows_rounded"] == args["rows"] and "norm" not in args for args in of_v)
    assert of_v[0]["sites"] == [
        {"site": "v[1]", "format": "bf16", "rows_rounded": of_v[0]["rows"] * tiny.hparams.n_head_kv}
    ]
    assert next(e["args"]["rows_rounded"] for e in nodes if e["name"] == "l_out-0") == 1
    text = summary_text(summarise(path))
    assert re.search(r"^mul_mat +\d+ +\d+ +[1-9]", text, re.MULTILINE)


RULES = st.builds(
    Rule,
    st.sampled_from(["bf16", "f16", "bf16:truncate"]),
    kind=st.sampled_from(["attn_norm", "ffn_norm", "output_norm", "all"]),
    point=st.sampled_from(["raw", "weighted"]),
    mode=st.sampled_from(["every", "first-call"]),
)


@settings(max_examples=20)
@given(rules=st.lists(RULES, max_size=2), prompt=st.integers(1, 5), decoded=st.integers(0, 3))
def test_norm_events_agree_with_the_counters(tiny, tmp_path_factory, executor, rules, prompt, decoded):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    fake_quant = traced(tiny, path, rules, executor, prompt, decoded)
    _, nodes, _ = load(path)
    by_norm = {str(norm): [] for norm in tiny.norms}
    for event in nodes:
        if "norm" in event["args"]:
            by_norm[event["args"]["norm"]].append(event["args"])
    assert sum(map(len, by_norm.values())) == len(tiny.norms) * (1 + decoded)
    rounded = {}
    for norm, args in by_norm.items():
        for a in args:
            assert a["rounded"] == (a["rows_rounded"] > 0)
            assert a["rows_rounded"] == max((s["rows_rounded"] for s in a["sites"]), default=0)
            for site in a["sites"]:
                assert site["site"].startswith(norm + ".")
                key = (site["site"], site["format"])
                rounded[key] = rounded.get(key, 0) + site["rows_rounded"]
    counted = fake_quant.as_dict()
    assert [sum(a["rows"] for a in args) for args in by_norm.values()] == [
        n["rows_seen"] for n in counted["norms"]
    ]
    layer = {None: ""} | {i: f"[{i}]" for i in range(2)}
    assert rounded == {
        (f"{s['kind']}{layer[s['layer']]}.{s['point']}", s["format"]): s["rows_quantised"]
        for s in counted["sites"]
    }


def test_which_calls_were_rounded(tiny, path, executor):
    """every: all calls, all rows; first-call: one row of the first call."""
    rules = [Rule("bf16", kind="attn_norm"), Rule("f16", layer=0, mode="first-call")]
    traced(tiny, path, rules, executor)
    _, nodes, _ = load(path)

    def rows(name):
        return [(e["args"]["rows"], e["args"]["rows_rounded"]) for e in nodes if e["name"] == name]

    assert rows("attn_norm-1") == [(3, 3)] + [(1, 1)] * DECODED
    assert rows("ffn_norm-0") == [(3, 1)] + [(1, 0)] * DECODED
    assert rows("ffn_norm-1") == [(1, 0)] * (1 + DECODED)
    sites = next(e["args"]["sites"] for e in nodes if e["name"] == "ffn_norm-0")
    assert sites == [{"site": "ffn_norm[0].raw", "format": "f16", "rows_rounded": 1}]


def test_the_address_is_that_of_the_result(tiny, path, executor):
    with Trace(path, ABOUT) as trace:
        logits = Context(tiny, 8, executor, trace=trace).eval([1, 2])
    _, nodes, _ = load(path)
    assert nodes[-1]["name"] == "result_output"
    assert int(nodes[-1]["args"]["data"], 16) == logits.ctypes.data


def test_a_trace_changes_no_logits(tiny, path, executor):
    rules = FakeQuant(tiny.values, [Rule("bf16", kind="all")])
    expected = Context(tiny, 8, executor, rules).eval([1, 2, 3], slice(0, 3))
    with Trace(path, ABOUT) as trace:
        got = Context(tiny, 8, executor, rules, trace).eval([1, 2, 3], slice(0, 3))
    np.testing.assert_array_equal(got, expected)


def test_contexts_on_several_threads_share_a_trace(tiny, path, executor):
    def work(name):
        context = contexts[name]
        for _ in range(5):
            context.eval([1])
        tids[name] = threading.get_native_id()

    tids = {}
    with Trace(path, ABOUT) as trace:
        contexts = {name: Context(tiny, 16, executor, trace=trace.labelled(stream=name)) for name in "ab"}
        threads = [threading.Thread(target=work, args=(name,), name=name) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    data, nodes, _ = load(path)
    for name, tid in tids.items():
        mine = [e["name"] for e in nodes if e["tid"] == tid]
        assert mine == [node.name for node in tiny.graph.nodes] * 5
        assert {e["args"]["stream"] for e in nodes if e["tid"] == tid} == {name}
    named = {e["tid"]: e["args"]["name"] for e in data["traceEvents"] if e["name"] == "thread_name"}
    assert named == {tid: name for name, tid in tids.items()}


def test_perplexity_labels_stream_and_chunk(tiny, path, executor):
    fake_quant = FakeQuant(tiny.values, [Rule("bf16")])
    with Trace(path, ABOUT) as trace:
        for _ in Perplexity(
            tiny,
            np.arange(40),
            n_ctx=16,
            chunk_seed=2,  # the second chunk first
            fake_quant=fake_quant,
            control=True,
            executor=executor,
            batch=10,
            trace=trace,
        ):
            pass
    _, nodes, evals = load(path)
    streams = [(e["args"]["stream"], e["args"]["chunk"]) for e in evals]
    assert streams == [(s, c) for c in (1, 0) for s in ("baseline", "quantised", "control") for _ in (0, 1)]
    assert {e["args"]["stream"] for e in nodes if e["args"].get("rounded")} == {"quantised"}
    data = summarise(path)
    assert [(s["stream"], s["evals"], s["tokens"]) for s in data["streams"]] == [
        (name, 4, 30) for name in ("baseline", "quantised", "control")
    ]
    assert [sum(layer["rows_rounded"] for layer in s["layers"]) for s in data["streams"]] == [
        0,
        sum(n["rows_quantised"] for n in fake_quant.as_dict()["norms"]),
        0,
    ]


# ---------------------------------------------------------------- however it ends


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, FqError])
def test_an_interrupted_run_leaves_json(tiny, path, executor, monkeypatch, error):
    calls = []
    swiglu = fq.arch.ops.swiglu

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise error("stop")
        return swiglu(*args, **options)

    monkeypatch.setattr(fq.arch.ops, "swiglu", failing)
    with pytest.raises(error, match="stop"):
        traced(tiny, path, [], executor)
    _, nodes, evals = load(path)
    assert len(evals) == 1  # the second was not finished
    assert len(nodes) > len(tiny.graph.nodes) and nodes[-1]["name"] == "ffn_up-1"
    assert summarise(path)["streams"][0]["evals"] == 1


def test_nothing_traced_is_json_too(path):
    with Trace(path, ABOUT):
        pass
    assert load(path)[1:] == ([], [])
    with pytest.raises(FqError, match=r"trace\.json: no event of fq among its 1"):
        summarise(path)


def test_a_trace_that_cannot_be_written(tmp_path):
    with pytest.raises(FqError, match=r"no/trace\.json: cannot write the trace: No such file"):
        Trace(tmp_path / "no" / "trace.json", ABOUT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk(tiny, executor):
    with pytest.raises(FqError, match="/dev/full: cannot write the trace: No space left"):
        with Trace("/dev/full", ABOUT):
            pass
    with pytest.raises(FqError, match="/dev/full: cannot write the trace: No space left"):
        with Trace("/dev/full", ABOUT) as trace:
            decode(Context(tiny, 64, executor, trace=trace), 3, 60)


# ---------------------------------------------------------------- the summary


def test_totals_are_those_of_the_events(tiny, path, executor):
    traced(tiny, path, [Rule("bf16", mode="first-call")], executor)
    _, nodes, _ = load(path)
    data = summarise(path)
    assert data["events"] == len(nodes) + 1 + DECODED and data["foreign_events"] == 0
    [stream] = data["streams"]
    assert (stream["stream"], stream["evals"], stream["tokens"]) == (None, 1 + DECODED, PROMPT + DECODED)
    found = {k["kind"]: k for k in stream["kinds"]}
    by_kind = {}
    for event in nodes:
        norm = event["args"].get("norm", "").partition("[")[0]
        by_kind.setdefault(norm or event["cat"].lower(), []).append(event)
    assert found.keys() == by_kind.keys() and {"attn_norm", "ffn_norm", "mul_mat"} <= found.keys()
    for kind, events in by_kind.items():
        times = [e["dur"] for e in events]
        assert found[kind]["calls"] == len(events)
        assert found[kind]["rows"] == sum(e["args"]["rows"] for e in events)
        assert found[kind]["rows_rounded"] == sum(e["args"].get("rows_rounded", 0) for e in events)
        assert found[kind]["total_us"] == pytest.approx(sum(times))
        assert found[kind]["median_us"] == pytest.approx(np.median(times))
    assert found["ffn_norm"]["rows_rounded"] == 2
    assert sum(k["share"] for k in stream["kinds"]) == pytest.approx(1)
    layers = [(x["attn_norm_rows"], x["ffn_norm_rows"], x["rows"], x["calls"]) for x in stream["layers"]]
    assert layers == [(7, 7, 14, 10), (7, 5, 12, 10)]
    for i, layer in enumerate(stream["layers"]):
        assert layer["threads"] == [threading.get_native_id()]
        names = (f"attn_norm-{i}", f"ffn_norm-{i}")
        assert layer["pointers"] == sorted({e["args"]["data"] for e in nodes if e["name"] in names})


def test_the_reports_thirty_calls_explain_themselves(tiny, path, executor):
    traced(tiny, path, [], executor, prompt=14, decoded=1)
    text = summary_text(summarise(path))
    assert "Each layer has 30 norm rows = 15 attn_norm + 15 ffn_norm" in text and "in 4 kernel calls" in text
    assert "The last layer has 17 = 15 + 2: its ffn_norm sees only the rows whose logits" in text
    assert "norm rows in the layers: 47" in text
    traced(tiny, path, [], executor, prompt=1, decoded=1)  # each layer sees as many rows
    text = summary_text(summarise(path))
    assert "4 norm rows = 2 attn_norm + 2 ffn_norm" in text and "The last layer" not in text


def test_no_explanation_for_another_pattern(tiny, path, executor):
    traced(tiny, path, [], executor)
    events = json.loads(path.read_text())
    for event in events["traceEvents"]:
        if event["name"] == "ffn_norm-0":
            event["args"]["layer"] = 2
    path.write_text(json.dumps(events))
    data = summarise(path)
    assert data["streams"][0]["explanation"] is None and "Each layer" not in summary_text(data)


@pytest.mark.parametrize("indent", [None, 4])
def test_what_another_program_has_written_again(tiny, path, executor, indent):
    """Reformatted, its keys in another order, or in the array form: the same figures."""
    traced(tiny, path, [Rule("bf16")], executor)
    expected = summarise(path)
    data = json.loads(path.read_text())
    data["traceEvents"] += [{"ph": "X", "cat": "gpu", "name": "other", "ts": 1, "dur": 2}, 7]
    expected["foreign_events"] = 2
    path.write_text(json.dumps(dict(reversed(data.items())), indent=indent))
    assert summarise(path) == expected
    path.write_text(json.dumps(data["traceEvents"], indent=indent))
    assert summarise(path) == expected | {"about": {}}


def test_a_value_that_is_cut_by_the_end_of_what_is_read(tiny, path, executor, monkeypatch):
    traced(tiny, path, [], executor, decoded=0)
    path.write_text('{"version": 12345,' + path.read_text()[1:])
    expected = summarise(path)
    for n in (1, 7, 100):
        monkeypatch.setattr("fq.results.trace_summary.READ_CHARS", n)
        assert summarise(path) == expected


EVENT = {"ph": "X", "cat": "RMS_NORM_MUL", "name": "ffn_norm-0", "dur": 1, "tid": 1}
ARGS = {"op": "RMS_NORM_MUL", "rows": 1, "data": "0x1", "layer": 0, "norm": "ffn_norm[0]", "rows_rounded": 0}


def events(*changes, **args):
    return json.dumps([EVENT | dict(changes) | {"args": ARGS | args}])


BAD = {
    "empty": ("", "after 0 events: not JSON: the end"),
    "text": ("hello", "after 0 events: not JSON: 'h'"),
    "another object": ('{"a": [1, 2]}', "no event of fq among its 0"),
    "no list of events": ('{"traceEvents": {}}', "no event of fq"),
    "another program's": ('[{"ph": "X", "cat": "gpu", "args": {"op": ["x"]}}]', "no event of fq among its 1"),
    "odd categories": ('[{"ph": "X", "cat": ["a"], "args": {"op": ["a"]}}]', "no event of fq among its 1"),
    "keys": ('{traceEvents: []}', "keys cannot be read"),
    "a missing comma": ("[1 2]", "after 1 events: not JSON: '2'"),
    "more after the end": (events() + "x", "after 1 events: not JSON: 'x' after its end"),
    "cut off": (events()[:-1], "after 1 events: not JSON: the end"),
    "cut off in an event": (events()[:-9], "after 0 events: not JSON, or only its beginning"),
    "NaN": ('[{"dur": NaN}]', "NaN is no JSON number"),
    "infinite time": (events().replace('"dur": 1', '"dur": 1e999'), "dur must be a number"),
    "negative time": (events(("dur", -1)), "dur must be a number from 0 up, not -1"),
    "no time": (events(("dur", None)), "dur must be a number from 0 up, not None"),
    "huge number": (events(rows=10**400), "rows must be a number"),
    "rows and a half": (events(rows=1.5), "rows must be a whole number, not 1.5"),
    "rows yes": (events(rows=True), "rows must be a number from 0 up, not True"),
    "layer": (events(layer=10**6), "layer must be below 1024"),
    "thread": (events(("tid", "main")), "tid must be a number"),
    "address": (events(data="x" * 1000), "data must be an address"),
    "norm": (events(norm="k_proj[0]"), "norm must be a norm such as ffn_norm[5], not 'k_proj[0]'"),
    "stream": (events(stream=["a"]), "stream must be a name"),
    "streams": (json.dumps([EVENT | {"args": ARGS | {"stream": str(i)}} for i in range(17)]), "at most 16"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "a huge value": ('["' + "x" * (2 << 20) + '"]', "a value of more than 1 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("text, message", BAD.values(), ids=BAD.keys())
def test_bad_traces(text, message, path, capsys):
    path.write_text(text)
    assert main(["trace", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"fq: error: {path}: ") and err.count("\n") == 1
    assert message in err


def test_bytes_that_are_no_text(path, capsys):
    path.write_bytes(b"[\xff]")
    assert main(["trace", str(path)]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_a_trace_too_large_to_be_one_of_ours(path, capsys):
    with path.open("wb") as file:
        file.truncate((2 << 30) + 1)
    assert main(["trace", str(path)]) == 2
    assert "larger than 2 GiB" in capsys.readouterr().err


@given(st.binary(max_size=200) | st.text('[]{},:" \n1e-tn\\u', max_size=60).map(str.encode))
def test_noise_gives_an_error_and_no_crash(tmp_path_factory, noise):
    path = tmp_path_factory.getbasetemp() / "noise.json"
    path.write_bytes(noise)
    with pytest.raises(FqError):
        summarise(path)


def test_what_a_trace_says_of_its_run_again_and_again_is_kept_once(path):
    again = "".join(f'"otherData": {{"model": "{k}", "key {k}": []}}, ' for k in range(9))
    path.write_text(f'{{{again}"traceEvents": {events()}}}')
    assert summarise(path)["about"] == {"model": "8", "key 8": []}


def test_no_control_characters_of_an_untrusted_trace(path, capsys):
    path.write_text(
        json.dumps(
            {"otherData": {"model": "\x1b[31m\ud800"}, "traceEvents": json.loads(events(stream="\x1b"))}
        )
    )
    assert main(["trace", str(path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


# ---------------------------------------------------------------- the command line


def run_args(tiny_path, path, *more):
    return [
        *("run", "-m", str(tiny_path), "-p", "Hello world", "-n", "5", "--ignore-eos", "-t", "1"),
        *("--fake-quant-ffn-norm", "bf16", "--trace", str(path), *more),
    ]


def test_run_and_trace(tiny_path, path, capsys):
    assert main(run_args(tiny_path, path, "--json", "-")) == 0
    counts = json.loads(capsys.readouterr().out)["fake_quant"]
    assert main(["trace", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    [stream] = data["streams"]
    seen = {(n["kind"], n["layer"]): n["rows_seen"] for n in counts["norms"]}
    for layer in stream["layers"]:
        assert layer["attn_norm_rows"] == seen["attn_norm", layer["layer"]]
        assert layer["ffn_norm_rows"] == seen["ffn_norm", layer["layer"]]
    assert sum(x["rows_rounded"] for x in stream["layers"]) == counts["rows_quantised"] == 12
    assert data["about"]["rules"] == counts["rules"]
    assert main(["trace", str(path)]) == 0
    text = capsys.readouterr().out
    assert "model    tiny.gguf" in text and stream["explanation"] in text


def test_ctrl_c_during_a_traced_run(tiny_path, path, capsys, monkeypatch):
    def interrupted(self, logits):
        raise KeyboardInterrupt

    monkeypatch.setattr("fq.run.generation.Sampler.sample", interrupted)
    assert main(run_args(tiny_path, path)) == 130
    _, nodes, evals = load(path)
    assert len(evals) == 1 and nodes


def test_perplexity_and_trace(tiny_path, path, capsys):
    args = ["perplexity", "-m", str(tiny_path), "-c", "32", "--chunks", "2", "--trace", str(path)]
    assert main(args) == 0
    capsys.readouterr()
    assert main(["trace", str(path)]) == 0
    assert "baseline: 2 evaluations, 62 tokens" in capsys.readouterr().out


def test_bad_targets(tiny_path, tmp_path, capsys):
    same = str(tmp_path / "a.json")
    before = tiny_path.read_bytes()
    for target, message in (
        (str(tmp_path), f"--trace {tmp_path}: cannot be written there"),
        (str(tmp_path / "no" / "x"), "cannot be written there"),
        ("-", "--trace -: takes a file"),
        (same, "is the file of --json too"),
        (str(tiny_path), "is the model"),
    ):
        assert main(run_args(tiny_path, target, "--json", same)) == 2
        assert message in capsys.readouterr().err
    assert tiny_path.read_bytes() == before
