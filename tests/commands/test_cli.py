"""The command line as its users meet it: a process, its two streams, its exit status."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import gguf_builder
import pytest
from command_line import HERE, INTERRUPT_SECONDS, TIMEOUT, environment, fq, popen

from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf

COMMANDS = (
    "pull",
    "inspect",
    "graph",
    "sites",
    "formats",
    "profiles",
    "schema",
    "trace",
    "bench",
    "replicate",
    "sweep",
    "results",
    "report",
    "run",
    "ranges",
    "pareto",
    "calibrate",
    "perplexity",
)
BF16 = ["--fake-quant-ffn-norm", "bf16"]
REPORT = ["-p", "Hello world", "-n", "5", "--threads", "1", "--ignore-eos", *BF16]


@pytest.fixture(scope="session")
def tiny22_path(tmp_path_factory):
    """TinyLlama's 22 layers, small; slow enough to be interrupted."""
    path = tmp_path_factory.mktemp("tiny22") / "tiny22.gguf"
    shape = tiny_shape(n_layer=22, n_embd=64, n_ff=64, n_vocab=512, n_ctx_train=4096)
    write_llama_gguf(path, shape, mix="Q8_0")
    return path


@pytest.fixture(scope="session")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(SAMPLE_TEXT.read_text(encoding="utf-8") * 30, encoding="utf-8")
    return path


# ---------------------------------------------------------------- showing


def test_help_names_the_commands_and_their_options():
    out, _ = fq("--help")
    assert all(name in out for name in COMMANDS)
    for name in COMMANDS:
        out, err = fq(name, "--help")
        assert out.startswith(f"usage: fq {name} ") and not err
    for option in (
        "--fake-quant RULE",
        "--fake-quant-counts",
        "--fake-quant-ffn-norm",
        "--fake-quant-layer",
        "--fake-quant-point",
        "--fake-quant-kind",
        "--fake-quant-mode",
        "--fake-quant-verbose",
        "--no-baseline",
        "--control",
        "--threads",
        "--ctx-size",
        "--batch-size",
        "--seed",
        "--json",
        "--offline",
        "--chunks",
    ):
        assert option in out


@pytest.mark.parametrize(
    "command, loaded, others",
    [
        (["--help"], set(), {"numpy"}),
        (
            ["run", "-m", "none", "-p", "x"],
            {"run", "options", "files", "rules", "outcome", "progress", "show"},
            {"sqlite3", "fq.measure.sweep", "fq.results.trace_summary", "fq.replicate.replication"},
        ),
        (["trace", "none"], {"trace", "files"}, {"fq.run.context"}),
    ],
    ids=["help", "run", "trace"],
)
def test_a_command_is_loaded_when_it_is_asked_for(command, loaded, others):
    """And nothing that only others need."""
    code = f"""
import sys
from fq.cli import main
try:
    main({command!r})
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=HERE, capture_output=True, text=True, check=True
    )
    modules = set(done.stderr.split())
    commands = {name for name in modules if name.startswith("fq.commands.")}
    assert commands == {f"fq.commands.{name}" for name in loaded}
    assert not others & modules


def test_version():
    out, _ = fq("--version")
    assert re.fullmatch(r"fq \S.*\n", out)


def test_pull_checks_what_is_there(smollm2_path):
    out, _ = fq("pull", env=environment(FQ_CACHE=str(smollm2_path.parent)))
    assert str(smollm2_path) in out


def test_inspect(tiny_path):
    out, err = fq("inspect", tiny_path)
    assert not err
    assert "llama.block_count" in out and "norm sites: attn_norm[0-1], ffn_norm[0-1], output_norm" in out
    assert re.search(r"^F32 +21 +\d", out, re.MULTILINE)
    data = json.loads(fq("inspect", "--json", tiny_path)[0])
    assert data["metadata"]["llama.embedding_length"] == 64
    assert data["metadata"]["tokenizer.ggml.tokens"] == "array of 512"
    assert data["tensor_types"][0] | {"bytes": 0} == {"type": "F32", "tensors": 21, "bytes": 0}
    assert len(data["tensors"]) == 21 and data["bytes"] == tiny_path.stat().st_size
    assert data["sites"][:3] == ["inp_embd", "attn_norm[0].in", "attn_norm[0].raw"]
    assert len(data["sites"]) == 1 + 2 * (2 * 3 + 14) + 3
    assert data["activations"].startswith("inp_embd, q_proj[0-1], k_proj[0-1], ")


def test_inspect_names_what_fq_does_not_know_or_cannot_run(tmp_path):
    strange, other = tmp_path / "strange.gguf", tmp_path / "other.gguf"
    write_llama_gguf(strange, tiny_shape(n_embd=64, n_ff=32, n_vocab=512), mix="F32")
    data = strange.read_bytes()
    strange.write_bytes(data.replace(b"llama.vocab_size", b"llama.vocal_size"))
    out, _ = fq("inspect", strange)
    assert "keys that fq does not know:\n  llama.vocal_size\n" in out and "norm sites: attn_norm[0-1]" in out
    shown = json.loads(fq("inspect", "--json", strange)[0])
    assert (shown["unknown_keys"], shown["fault"]) == (["llama.vocal_size"], None)
    said = f"fq: {strange}: keys that fq does not know, and goes without: llama.vocal_size\n"
    assert said in fq("run", "-m", strange, "-p", "x", "-n", 1)[1]
    assert said in fq("perplexity", "-m", strange, "-c", 16, "--chunks", 1)[1]
    keys = [
        gguf_builder.pair("general.architecture", gguf_builder.STRING, gguf_builder.string("other")),
        gguf_builder.pair("tokenizer.\x1bkey", gguf_builder.BOOL, b"\0"),
    ]
    other.write_bytes(gguf_builder.gguf(keys, data=b""))
    out, _ = fq("inspect", other)
    assert "fq does not know:\n  tokenizer.\\x1bkey\n" in out and "fq cannot run it: " in out
    assert "\x1b" not in out
    assert "architecture 'other' is not supported" in json.loads(fq("inspect", "--json", other)[0])["fault"]


def test_inspect_shows_no_control_characters_of_an_untrusted_file(tmp_path):
    path = tmp_path / "hostile.gguf"
    write_llama_gguf(path, tiny_shape(n_embd=64, n_ff=32, n_vocab=512), mix="F32")
    data = path.read_bytes()
    assert data.count(b"synthetic llama") == 1
    path.write_bytes(data.replace(b"synthetic llama", b"\x1b[31msyn\r\nllama"))
    out, _ = fq("inspect", path)
    assert "\x1b" not in out and "\\x1b[31msyn\\r\\nllama" in out


def test_graph(tiny_path):
    out, err = fq("graph", tiny_path)
    lines = out.splitlines()
    assert not err and lines[0].split() == ["#", "node", "op", "shape", "inputs", "weight", "sites"]
    data = json.loads(fq("graph", tiny_path, "--json")[0])
    assert len(data["nodes"]) == len(lines) - 1
    for line, node in zip(lines[1:], data["nodes"], strict=True):
        assert line.split()[:2] == [str(node["index"]), node["name"]]
        assert all(source < node["index"] for source in node["inputs"])
    by_name = {node["name"]: node for node in data["nodes"]}
    points = ("in", "raw", "weighted")
    assert by_name["ffn_norm-1"]["sites"] == [f"ffn_norm[1].{point}" for point in points]
    assert by_name["Vcur-1"]["sites"] == ["v_proj[1]", "v[1]"]
    assert by_name["ffn_norm-0"]["shape"] == ["n_tokens", 64]
    assert by_name["ffn_norm-1"]["shape"] == ["n_outputs", 64]
    assert by_name["ffn_norm-1"]["weight"] == "blk.1.ffn_norm.weight"
    assert by_name["result_output"]["shape"] == ["n_outputs", 512]
    assert data["nodes"][-1]["name"] == "result_output"


def test_sites(tiny_path):
    """Every site with its rule, before anything runs; later rules win, the shorthand is the first."""
    rules = ["--fake-quant", "*.weighted=bf16:stochastic,seed=9", "--fake-quant", "norm[1]=f16:first-call"]
    shorthand = ["--fake-quant-ffn-norm", "bf16:stochastic", "--fake-quant-kind", "all"]
    args = ["sites", "-m", tiny_path, "--seed", "4", *shorthand, *rules]
    out, err = fq(*args)
    assert not err
    weighted, norm_n = "*[*].weighted=bf16:stochastic,seed=9", "norm[1].raw=f16:first-call"
    short = "*[*].raw=bf16:stochastic,seed=4"
    expected = []
    for name, node, raw in (
        ("attn_norm[0]", "attn_norm-0", short),
        ("ffn_norm[0]", "ffn_norm-0", short),
        ("attn_norm[1]", "attn_norm-1", norm_n),
        ("ffn_norm[1]", "ffn_norm-1", norm_n),
        ("output_norm", "result_norm", short),
    ):
        expected += [
            [f"{name}.in", node, None],
            [f"{name}.raw", node, raw],
            [f"{name}.weighted", node, weighted],
        ]
    lines = [line.split() for line in out.splitlines()]
    of_norms = [line for line in lines[1:-1] if "norm" in line[0]]
    assert lines[0] == ["site", "node", "rule"] and len(lines) == 2 + 44
    assert of_norms == [[site, node, rule or "-"] for site, node, rule in expected]
    assert ["k[1]", "Kcur-1", "-"] in lines and out.endswith("10 of 44 sites have a rule\n")
    data = json.loads(fq(*args, "--json")[0])
    assert data["rules"] == [short, weighted, norm_n]
    found = [[site["site"], site["node"], site["rule"]] for site in data["sites"] if site["point"]]
    assert found == expected
    last = {
        "kind": "output_norm",
        "layer": None,
        "point": "weighted",
        "node": "result_norm",
        "rule": weighted,
        "unit": None,
    }
    assert data["sites"][-1] == last | {"site": "output_norm.weighted"}

    out, _ = fq("sites", "-m", tiny_path, "--fake-quant", "ffn_norm[1]=bf16")
    assert [line.split()[2] for line in out.splitlines()[1:-1]].count("-") == 43
    assert out.endswith("1 of 44 sites have a rule\n")


def test_dithers_take_the_seed_of_the_command(tiny_path):
    rules = ["--fake-quant", "*=tf32:dither", "--fake-quant", "ffn_norm=int8:group=32,dither,seed=9"]
    out, _ = fq("sites", "-m", tiny_path, "--seed", "4", *rules)
    assert "attn_norm-0  *[*].raw=tf32:dither,seed=4" in re.sub("  +", "  ", out)
    assert "ffn_norm-0  ffn_norm[*].raw=int8:group=32,dither,seed=9" in re.sub("  +", "  ", out)


def test_formats():
    out, err = fq("formats")
    assert "\neXmY " in out
    numbers, options, notes = (part.splitlines() for part in out.split("\n\n"))
    data = json.loads(fq("formats", "--json")[0])["formats"]
    assert not err
    assert [line.split()[0] for line in numbers] == ["format", *(entry["name"] for entry in data)]
    assert {"bf16", "f16"} <= {entry["name"] for entry in data}
    for entry, line in zip(data, numbers[1:], strict=True):
        keys = ("bits_per_value", "largest", "smallest_normal", "smallest_subnormal")
        shown = [None if text == "-" else float(text) for text in line.split()[1:5]]
        assert shown == [entry[key] and pytest.approx(entry[key], rel=1e-5) for key in keys]
        assert line.endswith(entry["rounding"])
        assert (
            any(row.split(maxsplit=1) == [entry["name"], entry["note"]] for row in notes) or not entry["note"]
        )
    assert next(row for row in options if row.startswith("bf16 ")).endswith("seed=N")


@pytest.mark.parametrize("command", ["inspect", "graph"])
def test_a_reader_that_goes_away(command, tiny22_path):
    """`fq graph | head -1`: with text left to print, and with all of it still in the buffer."""
    with popen(command, tiny22_path) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT) == 141


# ---------------------------------------------------------------- run


def test_run_to_a_file_and_to_stdout(tiny_path, tmp_path):
    target = tmp_path / "run.json"
    args = ["run", "-m", tiny_path, "-p", "Hello world", "-n", "6", "--ignore-eos", "--json"]
    out, err = fq(*args, target)
    data = json.loads(target.read_text())
    assert out == "Hello world" + data["text"] + "\n"
    assert {"prompt_tokens", "generated_tokens", "text", "timings"} <= data.keys()
    assert len(data["prompt_tokens"]) == 3 and len(data["generated_tokens"]) == 6
    assert data["timings"].keys() == {"load_ms", "prompt_ms", "prompt_n", "eval_ms", "eval_n", "total_ms"}
    assert (data["timings"]["prompt_n"], data["timings"]["eval_n"]) == (3, 5)
    assert data["timings"]["total_ms"] >= data["timings"]["prompt_ms"] + data["timings"]["eval_ms"]
    assert data["partial"] is False
    for name in ("load time", "prompt eval time", "eval time", "total time"):
        assert re.search(rf"^ *{name} = +\d+\.\d\d ms", err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [target]

    out, err = fq(*args, "-")
    again = json.loads(out)  # JSON and nothing else
    assert again["generated_tokens"] == data["generated_tokens"]
    assert "Hello world" in err


def test_sampling_depends_on_the_seed_alone(tiny_path):
    def tokens(*options):
        out, _ = fq("run", "-m", tiny_path, "-p", "Hello", "-n", "8", "--ignore-eos", "--json", "-", *options)
        return json.loads(out)["generated_tokens"]

    one = tokens("--temp", "1", "--seed", "1")
    assert tokens("--temp", "1", "--seed", "1", "--threads", "1") == one
    assert tokens("--temp", "1", "--seed", "2") != one
    assert tokens("--temp", "1", "--top-k", "1", "--seed", "2") == tokens()


@pytest.mark.parametrize(
    "layer, mode, kind, rounded",
    [
        (5, "first-call", "ffn_norm", {("ffn_norm", 5): 1}),
        (-1, "first-call", "ffn_norm", {("ffn_norm", i): 1 for i in range(22)}),
        (-1, "first-call", "attn_norm", {("attn_norm", i): 1 for i in range(22)}),
        (5, "every", "ffn_norm", {("ffn_norm", 5): 7}),
        (-1, "every", "ffn_norm", {("ffn_norm", i): 7 for i in range(21)} | {("ffn_norm", 21): 5}),
    ],
)
def test_the_reports_commands(tiny22_path, layer, mode, kind, rounded):
    """The counts that the original experiment should have printed: 3 prompt tokens and 4 decoded."""
    out, err = fq(
        "run",
        "-m",
        tiny22_path,
        *REPORT,
        "--fake-quant-layer",
        layer,
        "--fake-quant-mode",
        mode,
        "--fake-quant-kind",
        kind,
        "--fake-quant-verbose",
        "--json",
        "-",
    )
    data = json.loads(out)
    assert (data["timings"]["prompt_n"], data["timings"]["eval_n"]) == (3, 4)
    norms = {(n["kind"], n["layer"]): n for n in data["fake_quant"]["norms"]}
    per_layer = [norms["attn_norm", i]["rows_seen"] + norms["ffn_norm", i]["rows_seen"] for i in range(22)]
    assert per_layer == [14] * 21 + [12]
    assert sum(per_layer) == 306 and "norm rows in the layers: 306 (154 attn_norm, 152 ffn_norm)" in err
    assert {key: n["rows_quantised"] for key, n in norms.items() if n["rows_quantised"]} == rounded
    assert data["fake_quant"]["rows_quantised"] == sum(rounded.values())
    [site] = [s for s in data["fake_quant"]["sites"] if (s["kind"], s["layer"]) == (kind, 5)]
    assert (site["rows_seen"], site["rows_quantised"]) == (7, rounded[kind, 5])
    lines = re.findall(
        rf"{kind} fake quantization \(bf16\): {kind}-(\d+) - "
        r"diff: first=\d+\.\d{6}, last=\d+\.\d{6}$",
        err,
        re.MULTILINE,
    )
    assert sorted(map(int, lines)) == sorted(i for (_, i), n in rounded.items() for _ in range(n))


@pytest.mark.parametrize(
    "rule, rounded",
    [
        ("norm[*]=bf16:first-call", {("attn_norm", i): 1 for i in range(22)}),
        ("norm[5]=bf16:truncate,first-call", {("attn_norm", 5): 1}),
        ("ffn_norm[0-1,5].weighted=f16", {("ffn_norm", i): 7 for i in (0, 1, 5)}),
        ("output_norm=bf16", {("output_norm", None): 5}),
    ],
)
def test_rules_on_the_command_line(tiny22_path, rule, rounded):
    """The first is the original experiment: 22 rows of 306, row 0 of each attention norm."""
    args = ["run", "-m", tiny22_path, "-p", "Hello world", "-n", "5", "--ignore-eos", "--json", "-"]
    out, err = fq(*args, "--fake-quant", rule, "--fake-quant-verbose")
    data = json.loads(out)["fake_quant"]
    norms = {(n["kind"], n["layer"]): n["rows_quantised"] for n in data["norms"]}
    assert {key: n for key, n in norms.items() if n} == rounded
    assert len(data["rules"]) == 1 and f"rule: {data['rules'][0]}" in err
    for site in data["sites"]:
        n = rounded.get((site["kind"], site["layer"]), 0)
        assert (site["rows_quantised"], site["rows_skipped"]) == (n, site["rows_seen"] - n)
        assert site["mode"] == ("first-call" if "first-call" in rule else "every")
        assert site["out_of_range"] == 0
    fmt = data["sites"][0]["format"]
    node = r"(?:attn_norm-\d+|ffn_norm-\d+|result_norm)"
    # the generated text may stand before it in the line
    lines = re.findall(
        rf"(attn_norm|ffn_norm|output_norm) fake quantization \({fmt}\): {node} - diff: first=\d", err
    )
    assert sorted(lines) == sorted(kind for (kind, _), n in rounded.items() for _ in range(n))


def test_counting_rows_alone(tiny_path):
    args = ["run", "-m", tiny_path, "-p", "Hello", "-n", "3", "--ignore-eos", "--json", "-"]
    args += ["--fake-quant", "*=bf16"]
    (out, err), (rows_out, rows_err) = fq(*args), fq(*args, "--fake-quant-counts", "rows")
    data, rows_data = json.loads(out), json.loads(rows_out)
    assert rows_data["generated_tokens"] == data["generated_tokens"]
    for site, counted in zip(rows_data["fake_quant"]["sites"], data["fake_quant"]["sites"], strict=True):
        uncounted = {name for name in site if site[name] is None and name != "layer"}
        assert uncounted == {"changed", "out_of_range", "to_zero", "subnormal", "not_finite", "max_abs_error",
                             "mean_abs_error", "mean_error", "sqnr_db"}  # fmt: skip
        assert counted | dict.fromkeys(uncounted) == site
    assert re.search(r"^ffn_norm\[0\]\.raw +4 +4 +0 +100\.0 %( +-){5}$", rows_err, re.MULTILINE)
    assert max(map(len, err.splitlines())) <= 120


def test_what_underflows_has_columns_where_there_is_any(tiny_path):
    args = ["run", "-m", tiny_path, "-p", "Hello", "-n", "3", "--ignore-eos", "--json", "-", "--fake-quant"]
    out, err = fq(*args, "ffn_norm[0].weighted=fp4_e2m1")
    (site,) = json.loads(out)["fake_quant"]["sites"]
    assert site["to_zero"] > 0 < site["subnormal"]
    heads = r"^site +rows seen +rounded +skipped +coverage +out of range +to zero +subnormal +max \|e\|"
    assert re.search(heads, err, re.MULTILINE)
    counts = " +".join(str(site[key]) for key in ("out_of_range", "to_zero", "subnormal"))
    assert re.search(rf"^ffn_norm\[0\]\.weighted .* % +{counts} +\d", err, re.MULTILINE)
    _, err = fq(*args, "ffn_norm[0].weighted=int8:asymmetric,group=1")
    assert "out of range  max |e|" in err


def test_text_that_the_terminal_cannot_show(tiny_path, tmp_path):
    text = tmp_path / "grüße.txt"
    text.write_text("Grüße, " * 200, encoding="utf-8")
    ascii_only = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    out, _ = fq("run", "-m", tiny_path, "-p", "Grüße", "-n", "3", env=ascii_only)
    assert out.startswith("Gr??e")
    out, _ = fq("perplexity", "-m", tiny_path, "-f", text, "-c", "32", "--chunks", "2", env=ascii_only)
    assert "gr??e.txt: " in out and re.search(r"^PPL \d+\.\d+$", out, re.MULTILINE)


# ---------------------------------------------------------------- perplexity


def test_perplexity_with_everything(tiny_path, tmp_path):
    target = tmp_path / "figures.json"
    out, err = fq(
        "perplexity",
        "-m",
        tiny_path,
        "-f",
        SAMPLE_TEXT,
        "-c",
        "32",
        "--chunks",
        "3",
        "-b",
        "20",
        "-t",
        "2",
        "--seed",
        "7",
        "--control",
        "--json",
        target,
        "--fake-quant-ffn-norm",
        "bf16:stochastic",
        "--fake-quant-layer",
        "1",
        "--fake-quant-point",
        "weighted",
        "--fake-quant-kind",
        "all",
    )
    data = json.loads(target.read_text())
    assert (data["n_ctx"], data["n_chunks"], data["n_scored"], data["partial"]) == (32, 3, 45, False)
    assert data["model"] == str(tiny_path) and data["text"] == str(SAMPLE_TEXT)
    assert data["control"]["exactly_zero"] is True
    assert [(s["kind"], s["layer"], s["point"], s["format"]) for s in data["fake_quant"]["sites"]] == [
        ("attn_norm", 1, "weighted", "bf16:stochastic,seed=7"),
        ("ffn_norm", 1, "weighted", "bf16:stochastic,seed=7"),
    ]
    comparison = data["comparison"]
    assert comparison["mean_kld"] > 0
    for figure in (
        f"PPL baseline            {comparison['ppl_base']:.4f}\n",
        f"PPL quantised           {comparison['ppl_quant']:.4f}\n",
        f"mean ln(PPL ratio)      {comparison['ln_ppl_ratio']:+.3e}\n",
        f"mean KL divergence      {comparison['mean_kld']:.3e}\n",
        f"{comparison['median_kld']:.3e}, {comparison['max_kld']:.3e}",
        f"{100 * comparison['same_top']:.3f} %\n",
        "3 chunks: too few for intervals, which start at 4",
        "ln(PPL ratio) 0, max KL 0, same top token 100 %: exactly 0",
    ):
        assert figure in out
    for site in data["fake_quant"]["sites"]:
        assert re.search(
            rf"^{site['kind']}\[1\]\.weighted +{site['rows_seen']} +{site['rows_quantised']} "
            rf"+0 +100\.0 % +0 .*{site['sqnr_db']:.2f}$",
            out,
            re.MULTILINE,
        )
    # no terminal: a line per chunk, and no bar
    assert re.fullmatch(r"(\[[123]/3\] PPL \d+\.\d{4}  \d+\.\d s, \d+ s left\n){3}", err)


def test_perplexity_to_stdout_is_json_alone(tiny_path):
    args = ["perplexity", "-m", tiny_path, "-c", "32", "--chunks", "2", *BF16, "--json", "-"]
    out, err = fq(*args)
    both = json.loads(out)
    assert "PPL baseline" in err
    alone = json.loads(fq(*args, "--no-baseline")[0])
    assert alone["ppl"] == both["ppl"] and "comparison" not in alone
    assert [c["nll"] for c in alone["chunks"]] == [c["nll"] for c in both["chunks"]]


def test_perplexity_of_the_baseline_alone_and_of_fewer_chunks_than_asked(tiny_path, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text("Hello world. " * 60)
    out, err = fq(
        "perplexity", "-m", tiny_path, "-f", text, "-c", "64", "--chunks", "50", "--json", os.devnull
    )
    chunks = int(re.search(r"fq: the text has (\d+) chunks of 64, not 50", err).group(1))
    assert f"[{chunks}/{chunks}]" in err and f"{chunks} chunks of 64" in out
    assert re.search(r"^PPL \d", out, re.MULTILINE) and "PARTIAL" not in out
    assert not Path(os.devnull).is_file()  # a device is written to, not replaced


def test_the_text_starts_with_bos_as_llama_perplexity_has_it(tiny_path, tmp_path):
    """One token of text short of a chunk is enough where the vocabulary adds BOS."""
    text = tmp_path / "text.txt"
    text.write_text("Hello world " * 40)
    out, _ = fq("run", "-m", tiny_path, "-p", text.read_text(), "-n", "0", "--json", "-")
    n = len(json.loads(out)["prompt_tokens"])
    out, _ = fq("perplexity", "-m", tiny_path, "-f", text, "-c", n, "--json", "-")
    assert json.loads(out)["n_tokens"] == n and json.loads(out)["n_chunks"] == 1
    fq("perplexity", "-m", tiny_path, "-f", text, "-c", n + 1, status=2)


def read_pty(fd):
    """All that is written to a pseudo-terminal until its other end closes."""
    parts = []
    while True:
        try:
            part = os.read(fd, 4096)
        except OSError:  # Linux's way to say the end
            part = b""
        if not part:
            os.close(fd)
            return b"".join(parts).decode()
        parts.append(part)


def test_a_terminal_gets_a_bar(tiny_path):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with popen("perplexity", "-m", tiny_path, "-c", "32", "--chunks", "4", stderr=slave) as process:
        os.close(slave)
        shown = read_pty(master)
        assert "PPL " in process.stdout.read()
    assert process.returncode == 0
    assert "| 0 %, " in shown and "\r" in shown
    assert "s left" not in shown  # the log's words


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Files that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "noise.gguf").write_bytes(b"this is no model" * 100)
    (folder / "nothing.gguf").touch()
    mamba = gguf_builder.pair("general.architecture", gguf_builder.STRING, gguf_builder.string("mamba"))
    (folder / "mamba.gguf").write_bytes(gguf_builder.gguf([mamba], data=b""))
    (folder / "empty.txt").touch()
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "latin1.txt").write_bytes("Grüße ".encode("latin-1") * 500)
    (folder / "short.txt").write_text("Hello")
    return folder


RUN = ["run", "-m", "TINY", "-p", "Hello"]
PPL = ["perplexity", "-m", "TINY", "-c", "32", "--chunks", "1"]
SITES = ["sites", "-m", "TINY"]


BAD_INPUT = [
    (["inspect", "BAD/missing.gguf"], "missing.gguf: no such file, and no such alias; aliases are smollm2"),
    (["inspect", "BAD"], "is a directory"),
    (["graph", "BAD/noise.gguf"], "noise.gguf"),
    (["inspect", "BAD/nothing.gguf"], "nothing.gguf"),
    (["graph", "BAD/mamba.gguf"], "mamba"),
    (["inspect", "--offline"], "smollm2 is not in /nonexistent/cache and --offline forbids fetching it"),
    (["perplexity", "--offline"], "--offline forbids"),
    (["run", "-p", "x", "--offline"], "--offline forbids"),
    (["pull", "gpt5"], "unknown model alias 'gpt5'"),
    ([*RUN, "--json", "BAD/no/such/folder.json"], "cannot be written there"),
    ([*PPL, "--json", "BAD"], "cannot be written there"),
    ([*PPL, "--seed", "-1"], "--seed must be >= 0"),
    ([*RUN, "--threads", "0"], "--threads: threads must be between 1 and"),
    ([*PPL, "--threads", "-3"], "--threads: threads must be between 1 and"),
    ([*RUN, "-c", "129"], "context of 129 tokens"),
    ([*RUN, "-c", "1"], "the prompt has 2 tokens, the context 1"),
    ([*RUN, "-n", "-2"], "--predict must be >= 0, or -1"),
    ([*RUN, "-b", "0"], "batch size must be at least 1"),
    ([*RUN, "--temp", "-1"], "temperature must be >= 0"),
    ([*RUN, "--temp", "nan"], "temperature must be >= 0"),
    ([*RUN, "--top-p", "0"], "top-p must be"),
    ([*RUN, "--top-k", "-1"], "top-k must be"),
    ([*RUN, "--seed", "-1"], "seed must be >= 0"),
    ([*RUN, "--chat"], "the model has no chat template"),
    ([*RUN, "--system-prompt", "Be brief."], "--system-prompt needs --chat"),
    (["run", "-m", "TINY", "-p", b"\xff\xfe"], "not Unicode text"),
    ([*PPL, "-f", "BAD/missing.txt"], "missing.txt: No such file"),
    ([*PPL, "-f", "BAD"], "is a directory"),
    ([*PPL, "-f", "BAD/empty.txt"], "empty.txt: the text is empty"),
    ([*PPL, "-f", "BAD/blank.txt"], "blank.txt: the text is empty"),
    ([*PPL, "-f", "BAD/latin1.txt"], "latin1.txt: not UTF-8 at byte 2"),
    ([*PPL, "-f", "BAD/short.txt"], "one chunk needs 32"),
    ([*PPL, "-c", "1000"], "context of 1000 tokens: the model allows at most 128"),
    ([*PPL, "-c", "2"], "nothing to score"),
    ([*PPL, "--chunks", "0"], "chunks must be positive"),
    ([*PPL, "-b", "-1"], "batch size must be at least 1"),
    ([*PPL, *BF16, "--control", "--no-baseline"], "needs the baseline"),
    ([*PPL, "--no-baseline"], "leaves nothing to run"),
    ([*PPL, "--who-pays"], "--who-pays: nothing is compared with the baseline"),
    ([*PPL, *BF16, "--who-pays", "--no-baseline"], "--who-pays: nothing is compared"),
    ([*PPL, *BF16, "--realisations", "1001"], "--realisations must be 1 to 1000, not 1001"),
    (
        ["sweep", *PPL[1:], "--worker-model-dir", "/x"],
        "--worker-model-dir is of workers: it needs --scheduler",
    ),
    ([*RUN, "--fake-quant-ffn-norm", "fp7"], "unknown format 'fp7'; there are bf16, "),
    ([*RUN, "--fake-quant-ffn-norm", "bf16:upwards"], "unknown option 'upwards' in format 'bf16:upwards'"),
    ([*RUN, "--fake-quant-ffn-norm", ""], "unknown format ''"),
    ([*RUN, "--fake-quant-ffn-norm", "bf16:stochastic,seed=x"], "unknown option 'seed=x'"),
    ([*PPL, "--fake-quant-ffn-norm", "bf16:stochastic", "--seed", "-1"], "seed must be"),
    (
        [*PPL, *BF16, "--fake-quant-kind", "k_norm"],
        "k_norm[*].raw=bf16 matches no site; there are inp_embd, attn_norm[0-1], q_proj[0-1], ",
    ),
    ([*PPL, *BF16, "--fake-quant-point", "cooked"], "point must be one of in, raw, weighted"),
    ([*PPL, *BF16, "--fake-quant-mode", "once"], "mode must be one of every, first-call"),
    ([*PPL, *BF16, "--fake-quant-layer", "-2"], "layer must be a layer number, or -1"),
    (
        [*PPL, *BF16, "--fake-quant-layer", "2"],
        "matches no site; there are inp_embd, attn_norm[0-1], ",
    ),
    (
        [*RUN, *BF16, "--fake-quant-kind", "output_norm", "--fake-quant-layer", "1"],
        "matches no site; there are",
    ),
    ([*RUN, "--fake-quant-layer", "1"], "--fake-quant-layer needs --fake-quant-ffn-norm TYPE"),
    ([*PPL, "--fake-quant-point", "weighted"], "--fake-quant-point needs"),
    ([*PPL, "--fake-quant-kind", "all"], "--fake-quant-kind needs"),
    ([*PPL, "--fake-quant-mode", "first-call"], "--fake-quant-mode needs"),
    ([*RUN, "--fake-quant-verbose"], "--fake-quant-verbose needs a rule"),
    ([*PPL, "--fake-quant-counts", "rows"], "--fake-quant-counts needs a rule"),
    ([*PPL, "--fake-quant", "ffn_norm[5]"], "--fake-quant: rule 'ffn_norm[5]': there is no =FORMAT"),
    ([*RUN, "--fake-quant", "mlp_norm=bf16"], "mlp_norm[*].raw=bf16 matches no site; there are "),
    ([*RUN, *BF16, "--fake-quant", "ffn_norm=fp7"], "rule 'ffn_norm=fp7': unknown format 'fp7'"),
    ([*RUN, "--fake-quant", "ffn_norm[9-3]=bf16"], "layers 9-3 run backwards"),
    ([*SITES, "--fake-quant", "norm.weighted=bf16"], "point must be raw for kind norm"),
    ([*SITES, "--fake-quant", "*=bf16", "--fake-quant", "ffn_norm[2-8]=bf16"], "matches no site; there are"),
    ([*SITES, *BF16, "--fake-quant-layer", "2"], "matches no site; there are inp_embd, attn_norm[0-1]"),
    ([*SITES, "--fake-quant-point", "raw"], "--fake-quant-point needs --fake-quant-ffn-norm TYPE"),
    ([*SITES, "--fake-quant", "*=bf16:stochastic", "--seed", "-1"], "seed must be"),
]


def shown(value):
    """A test's name: the arguments, without the message."""
    return " ".join(map(str, value[1:]))[:60] if isinstance(value, list) else ""


@pytest.mark.parametrize("args, message", BAD_INPUT, ids=shown)
def test_bad_input_is_one_line_and_status_2(args, message, tiny_path, bad):
    places = {"TINY": str(tiny_path)}
    args = [arg if isinstance(arg, bytes) else places.get(arg, arg).replace("BAD", str(bad)) for arg in args]
    out, err = run_raw(args)
    assert err.startswith("fq: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert message in err
    assert out == ""


def run_raw(args):
    """Like fq(status=2), for arguments that may be bytes, as the interpreter has them then."""
    return fq(*map(os.fsdecode, args), status=2)


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["conquer"],
        ["run"],
        ["run", "-p", "x", "-n", "many"],
        ["perplexity", "--chunks"],
        ["graph", "a", "b"],
    ],
    ids=str,
)
def test_usage_errors(args):
    out, err = fq(*args, status=2)
    assert not out and err.startswith("usage: fq") and "error: " in err.splitlines()[-1]


# ---------------------------------------------------------------- interrupts


def interrupt(process):
    """Send Ctrl-C; what is left on the two streams, once the process ends in time."""
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=TIMEOUT)
    assert time.monotonic() - start < INTERRUPT_SECONDS
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return out, err


def test_interrupted_perplexity_prints_and_writes_what_it_has(ctrl_c, tiny22_path, long_text, tmp_path):
    target = tmp_path / "figures.json"
    with popen(
        "perplexity", "-m", tiny22_path, "-f", long_text, "-c", "256", "--json", target, "--control", *BF16
    ) as process:
        first = process.stderr.readline()
        assert first.startswith("[1/")
        out, err = interrupt(process)
    asked = int(re.match(r"\[1/(\d+)\]", first).group(1))
    data = json.loads(target.read_text())
    done = data["n_chunks"]
    assert 1 <= done < asked
    assert f"fq: interrupted after {done} of {asked} chunks: this is a partial result" in err
    assert f"PARTIAL: {asked} were asked for" in out and "PPL quantised" in out
    assert data["partial"] is True and data["n_chunks_asked"] == asked
    assert len(data["chunks"]) == done and data["n_scored"] == done * 127
    assert data["control"]["exactly_zero"] is True
    assert [s["rows_seen"] for s in data["fake_quant"]["sites"]] == [255 * done] * 21 + [127 * done]


def test_interrupted_run_keeps_its_tokens(ctrl_c, tiny22_path, tmp_path):
    target = tmp_path / "run.json"
    with popen(
        "run", "-m", tiny22_path, "-p", "Hello world", "-n", "-1", "--ignore-eos", "--json", target
    ) as process:
        process.stdout.read(len("Hello world") + 1)  # and something more
        _, err = interrupt(process)
    data = json.loads(target.read_text())
    n = len(data["generated_tokens"])
    assert data["partial"] is True and 1 <= n < 4000
    assert f"fq: interrupted after {n} tokens: this is a partial result" in err
    assert "eval time" in err


def test_interrupted_before_there_is_anything(ctrl_c, tmp_path):
    """Ctrl-C while the libraries load: here a numpy that raises what Ctrl-C raises."""
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "__init__.py").write_text("raise KeyboardInterrupt")
    out, err = fq("perplexity", status=130, env=environment(first_on_path=str(tmp_path)))
    assert (out, err) == ("", "fq: interrupted\n")
