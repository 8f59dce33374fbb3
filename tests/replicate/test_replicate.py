"""fq replicate on the tiny model: its counts against arithmetic, its modes against the rows they name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TINY, write_tiny

from fq import Context, FqError, Model
from fq.cli import main
from fq.gguf.synthetic import SAMPLE_TEXT, tiny_shape, write_llama_gguf
from fq.replicate import replication as experiments
from fq.replicate import why
from fq.replicate.replication import N_DECODED, N_PROMPT, REPORT, Replication, Settings
from fq.replicate.text import replication_text
from fq_kernels import round_trip
from fq_kernels.rules import FakeQuant, Place, fake_quant

SECTIONS = ("architecture", "quantisation", "performance", "differences", "generation", "perplexity")
TITLES = (
    "1. Architecture counts",
    "2. Quantisation statistics",
    "3. Performance",
    "4. BF16 unit test",
    "5. Differences of the first and last element",
    "6. Generation with all layers",
    "7. Perplexity",
)
SAMPLE = SAMPLE_TEXT.read_text(encoding="utf-8")
LAYER = 1  # the middle one of the tiny model's two
# What must be, of 14 tokens of prompt and 1 decoded: rows of a norm, and of the last layer's FFN norm,
# which sees the one row of each evaluation whose logits are wanted.
EACH, LAST = N_PROMPT + N_DECODED, 1 + N_DECODED


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE)


def replicate(tiny_path, *args):
    quick = ["--rounds", "2", "--chunks", "2", "-c", "16", "-t", "1"]
    return ["replicate", "-m", str(tiny_path), *quick, *map(str, args)]


@pytest.fixture(scope="module")
def result(tiny_path, tmp_path_factory):
    """(page, data) of one run, as its user gets them."""
    folder = tmp_path_factory.mktemp("replicate")
    assert main(replicate(tiny_path, "-o", folder / "page.md", "--json", folder / "data.json")) == 0
    return (folder / "page.md").read_text(encoding="utf-8"), json.loads((folder / "data.json").read_text())


def tables(page, title):
    """The cells of each table of a section, headings first."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert section, title
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
        cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        found.append([[cell.strip() for cell in row] for i, row in enumerate(cells) if i != 1])
    return found


# ---------------------------------------------------------------- unit values


def test_the_reports_values_under_both_rules(result):
    """Four are equal under both; the second is the truncated one."""
    page, data = result
    expected = [
        # value, nearest even, truncated
        ("1.23456788", ("1.23437500", "0.00019288"), ("1.23437500", "0.00019288")),
        ("-0.98765433", ("-0.98828125", "0.00062692"), ("-0.98437500", "0.00327933")),
        ("0.00012346", ("0.00012302", "0.00000043"), ("0.00012302", "0.00000043")),
        ("-1000.12347412", ("-1000.00000000", "0.12347412"), ("-1000.00000000", "0.12347412")),
        ("3.14159274", ("3.14062500", "0.00096774"), ("3.14062500", "0.00096774")),
    ]
    found = data["unit_values"]
    assert [
        (v["value"], *(tuple(v[rule].values()) for rule in ("nearest-even", "truncate"))) for v in found
    ] == expected
    # the report printed what truncation gives, each time
    assert [tuple(v["report"].values()) for v in found] == [truncated for _, _, truncated in expected]
    both = ["nearest-even", "truncate"]
    assert [v["report_agrees_with"] for v in found] == [both, ["truncate"], both, both, both]
    (table,) = tables(page, TITLES[3])
    assert [row[0] for row in table[1:]] == [value for value, _, _ in expected]
    assert table[2][2:4] == ["-0.98828125 (diff: 0.00062692)", "-0.98437500 (diff: 0.00327933)"]
    assert "4 of the five values come out the same" in page


def test_the_type_number(result):
    page, data = result
    assert data["type_numbers"] == {"report": 16, "report_is": "IQ2_XXS", "bf16": 30}
    assert "16 is IQ2_XXS, and BF16 is 30" in " ".join(page.split())


# ---------------------------------------------------------------- counts


def test_architecture(result):
    page, data = result
    found = data["models"][0]["architecture"]
    load = found["loads"]["figures"]
    assert (load["n_prompt"], load["n_decoded"]) == (14, 1)
    assert [(l["attn_norm_rows"], l["ffn_norm_rows"], l["rows"]) for l in load["layers"]] == [
        (EACH, EACH, 2 * EACH),
        (EACH, LAST, EACH + LAST),
    ]
    assert 2 * EACH == REPORT["calls_per_layer"]
    assert load["rows"] == 3 * EACH + LAST
    # two norms, two evaluations
    assert [l["calls"] for l in load["layers"]] == [4, 4] and load["kernel_calls"] == 8
    assert load["tensor_elements"] == 14 * 64
    hello = found["loads"]["text"]  # 3 tokens of prompt with BOS; of 5 tokens the last is not evaluated
    assert (hello["n_prompt"], hello["n_decoded"], hello["rows"]) == (3, 4, 3 * 7 + 5)
    # attention and FFN norm of each layer are norm-N, the output norm is not; fused none is
    assert found["names"] == {"norms": 5, "known_alone": 4, "known_fused": 0}
    (table,) = tables(page, TITLES[0])
    cells = {row[0]: row[1:] for row in table}
    assert cells["layers"] == ["22", "2", "2"]
    assert cells["norm rows of the last layer (1)"] == ["30", "15 + 2 = 17", "7 + 5 = 12"]
    assert cells["norm rows of all layers"] == ["660", "47", "26"]
    assert "of the 5 norms" in " ".join(page.split())


def test_the_reports_own_model_has_the_reports_counts(tmp_path, executor):
    """22 layers: 30 rows in each but the last, so 647 where the report multiplies to 660."""
    path = tmp_path / "deep.gguf"
    shape = tiny_shape(n_layer=22, n_embd=32, n_head=2, n_head_kv=1, n_ff=48, n_vocab=512, n_ctx_train=128)
    write_llama_gguf(path, shape, mix="F32")
    model = Model(path)
    tokens = model.tokenizer.encode(SAMPLE)
    load = experiments.architecture(model, tokens, executor)["loads"]["figures"]
    assert [l["rows"] for l in load["layers"]] == [30] * 21 + [17] and load["rows"] == 647
    found = experiments.quantisation(model, tokens, executor)
    assert found["layer"] == 5
    one, every = found["one"]["report"], found["all"]["report"]
    assert (one["rows_rounded"], one["rows_skipped"]) == (1, 29)
    assert (every["rows_rounded"], every["rows_skipped"]) == (22, 647 - 22)
    assert found["one"]["right"]["rules"] == ["ffn_norm[5].raw=bf16"]


def test_quantisation(result):
    page, data = result
    found = data["models"][0]["quantisation"]
    assert found["layer"] == LAYER

    def figures(scope, mode):
        m = found[scope][mode]
        by_kind = tuple(m["rounded_by_kind"][kind] for kind in ("attn_norm", "ffn_norm"))
        assert m["coverage"] == m["rows_rounded"] / m["rows_seen"] and m["rows_rounded"] == sum(by_kind)
        assert m["ffn_coverage"] == by_kind[1] / m["ffn_rows_seen"]
        assert m["elements"] == 64 * m["rows_rounded"] and 0 < m["changed"] <= m["elements"]
        return m["rows_rounded"], m["rows_skipped"], by_kind, m["ffn_rows_seen"]

    assert figures("one", "report") == (1, EACH + LAST - 1, (1, 0), LAST)
    assert figures("one", "meant") == (1, LAST - 1, (0, 1), LAST)
    assert figures("one", "right") == (LAST, 0, (0, LAST), LAST)
    assert figures("all", "report") == (2, 3 * EACH + LAST - 2, (2, 0), EACH + LAST)
    assert figures("all", "meant") == (2, EACH + LAST - 2, (0, 2), EACH + LAST)
    assert figures("all", "right") == (EACH + LAST, 0, (0, EACH + LAST), EACH + LAST)
    (table,) = tables(page, TITLES[1])
    cells = [row[2:] for row in table if row[1] == "rows rounded"]
    assert cells == [["1", "1", "1", "2"], ["22", "2", "2", "17"]]
    assert [row[2] for row in table if row[1] == "rows skipped"] == ["29", "638"]


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("mode, hit", [("report", "attn_norm"), ("meant", "ffn_norm"), ("right", "ffn_norm")])
def test_a_mode_rounds_the_rows_it_names(tiny, executor, tokens, monkeypatch, mode, hit):
    """What leaves each norm is bf16's, before the weight, in the rows of the mode, and in no others."""
    kernel = fake_quant.rms_norm_f32
    rounded = {}

    def looked_at(norm):
        def call(x, *, eps, weight, out, executor=None, **rounding):
            kernel(x, eps=eps, weight=weight, out=out, executor=executor, **rounding)
            plain = kernel(x, eps=eps)
            for row, (value, normed) in enumerate(zip(out, plain, strict=True)):
                as_bf16 = round_trip(normed[None], "bf16")[0] * weight
                assert not np.array_equal(as_bf16, normed * weight)
                if np.array_equal(value, as_bf16):
                    rounded.setdefault(norm, []).append((len(x), row))
                else:
                    np.testing.assert_array_equal(value, normed * weight)
            return out

        return call

    inner = FakeQuant.rms_norm

    def rms_norm(self, norm, x, **args):
        monkeypatch.setattr(fake_quant, "rms_norm_f32", looked_at(norm))
        return inner(self, norm, x, **args)

    monkeypatch.setattr(FakeQuant, "rms_norm", rms_norm)
    experiments._evaluate(tiny, tokens[:N_PROMPT], N_DECODED, executor, [experiments.rule(mode, None)])
    prompt, decoded = [(N_PROMPT, row) for row in range(N_PROMPT)], [(1, 0)]
    if mode == "right":
        expected = {Place(hit, 0): prompt + decoded, Place(hit, 1): [(1, 0), *decoded]}
    else:
        # row 0 of the prompt; the last layer's FFN norm sees one row of it
        expected = {Place(hit, 0): prompt[:1], Place(hit, 1): [(1, 0)] if hit == "ffn_norm" else prompt[:1]}
    assert rounded == expected


def test_differences(result, tiny, executor, tokens):
    page, data = result
    found = data["models"][0]["differences"]
    assert found["layer"] == LAYER
    assert [run["n_tokens"] for run in found["runs"]] == [3, 4, N_PROMPT]
    for run in found["runs"]:
        assert [m["rows"] for m in run["modes"].values()] == [1, 1, LAST]
    # the tiny model begins every prompt with BOS, and row 0 sees nothing else
    first = [run["modes"]["report"]["first"] for run in found["runs"]]
    assert "begin with the same token" in page
    # that row once more: the raw attention norm of BOS in layer 1, its first element
    seen = []
    kernel = fake_quant.rms_norm_f32

    def keep(x, **args):
        seen.append(kernel(x, eps=args["eps"])[0, 0])
        return kernel(x, **args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_quant, "rms_norm_f32", keep)
        Context(tiny, 8, executor).eval(tokens[:1])
    raw = np.float32(seen[2])  # after layer 0's two
    error = abs(float(round_trip(raw.reshape(1, 1), "bf16")[0, 0]) - float(raw))
    # matrix products of other numbers of rows may add in another order
    assert np.array(first) == pytest.approx(np.full((3, 2), error), abs=1e-6) and error > 1e-5
    (table,) = tables(page, TITLES[4])
    assert table[1][:3] == ["the report's", "first", "0.000007 to 0.000441"]


def test_performance(result):
    page, data = result
    found = data["models"][0]["performance"]
    assert (found["n_prompt"], found["n_predict"], found["rounds"]) == (14, 5, 2)
    assert [(c["name"], c["rules"]) for c in found["configurations"]] == [
        ("baseline", []),
        ("control", []),
        ("layer 1, report's mode", ["norm[1].raw=bf16:first-call"]),
        ("all layers, report's mode", ["norm[*].raw=bf16:first-call"]),
        ("layer 1, right mode", ["ffn_norm[1].raw=bf16"]),
        ("all layers, right mode", ["ffn_norm[*].raw=bf16"]),
    ]
    (table,) = tables(page, TITLES[2])
    assert len(table) == 1 + 4 * 6
    theirs = [row[2:4] for row in table if row[1].endswith(("baseline", "report's mode"))]
    assert theirs[:3] == [["6,479.47 ms", ""], ["6,687.57 ms", "+3.2 %"], ["6,752.71 ms", "+4.2 %"]]
    assert theirs[-3:] == [["2.13 tokens/s", ""], ["2.18 tokens/s", "+2.3 %"], ["2.06 tokens/s", "-3.3 %"]]
    total, throughput = ([row for row in table][1 + 6 * i + 5] for i in (2, 3))
    slower = found["configurations"][5]["total"]
    assert total[5] == f"{100 * slower['overhead']:+.2f} %"
    assert throughput[5] == f"{100 * (1 / (1 + slower['overhead']) - 1):+.2f} %"
    # the longest time is the lowest rate
    low, high = slower["overhead_ci95"]
    assert throughput[6] == f"{100 * (1 / (1 + high) - 1):+.2f} to {100 * (1 / (1 + low) - 1):+.2f} %"
    # 18 tokens in the report's layer-5 run, 19 in the others
    assert "gives 19.0, 18.0 and 19.0 tokens" in " ".join(page.split())


def test_generation(result, tiny, executor):
    page, data = result
    found = data["models"][0]["generation"]
    prompt = tiny.tokenizer.encode("The answer is")
    base = found["streams"]["baseline"]["tokens"]
    assert found["streams"].keys() == {"baseline", "report", "right"} and len(base) == 10
    for mode, rules in (("baseline", ()), ("report", "norm=bf16:first-call"), ("right", "ffn_norm=bf16")):
        context = Context(tiny, 32, executor, rules)
        logits, tokens = context.eval(prompt), []
        for _ in range(10):
            tokens.append(int(logits[-1].argmax()))
            logits = context.eval(tokens[-1:])
        stream = found["streams"][mode]
        assert stream["tokens"] == tokens and stream["text"] == tiny.tokenizer.decode(tokens)
        if mode != "baseline":
            assert stream["same_tokens"] == (tokens == base)
            assert 0 < stream["mean_kld"] <= stream["max_kld"] < 1e-3
    (table,) = tables(page, TITLES[5])
    assert "downtown" in table[1][1] and [row[0] for row in table[2:]] == [
        "baseline",
        "report's mode",
        "right mode",
    ]


def test_perplexity(result, tiny_path):
    page, data = result
    found = data["models"][0]["perplexity"]
    assert (found["n_chunks"], found["n_ctx"], found["n_scored"]) == (2, 16, 2 * 7)
    control = found["control"]
    assert control["exactly_zero"] and control["max_kld"] == control["ln_ppl_ratio"] == 0
    report, right = found["report"], found["right"]
    assert report["comparison"]["ppl_base"] == right["comparison"]["ppl_base"]
    # one row per layer in all of the measurement: the second chunk is the baseline's
    assert report["counts"]["rounded_by_kind"] == {"attn_norm": 2, "ffn_norm": 0}
    assert report["chunk_mean_kld"][0] > 0 == report["chunk_mean_kld"][1]
    # 15 rows are evaluated of each chunk, 7 give logits
    assert right["counts"]["rounded_by_kind"] == {"attn_norm": 0, "ffn_norm": 2 * (15 + 7)}
    assert right["counts"]["ffn_coverage"] == 1 and min(right["chunk_mean_kld"]) > 0
    (table,) = tables(page, TITLES[6])
    cells = {row[0]: row[1:] for row in table}
    assert cells["PPL"][0] == "not measured"
    assert cells["PPL"][1] == f"{right['comparison']['ppl_base']:.4f}"
    assert cells["mean KL"][-1] == f"{right['comparison']['mean_kld']:.3e}"
    words = " ".join(page.split())
    assert "largest KL 0, same top token 100 %: exactly 0, as it must be." in words
    assert "all of the difference is in the first chunk" in words
    assert "there is one rounding's figure" in words
    assert "These are fewer than 8 chunks" in words


def test_a_control_that_is_not_zero_is_said(result):
    _, data = result
    data = json.loads(json.dumps(data))
    data["models"][0]["perplexity"]["control"] |= {"exactly_zero": False, "max_kld": 1e-9}
    assert "largest KL 1e-09, same top token 100 %: NOT 0: the figures above cannot be trusted" in " ".join(
        replication_text(data).split()
    )


# ---------------------------------------------------------------- page and JSON


def test_the_page_and_the_json(result, tiny_path):
    page, data = result
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(TITLES)
    assert data.keys() == {
        "schema",
        "command",
        "provenance",
        "machine",
        "settings",
        "partial",
        "report",
        "unit_values",
        "type_numbers",
        "models",
    }
    (model,) = data["models"]
    assert list(model) == ["model", *SECTIONS]
    assert data["command"].startswith(f"fq replicate -m {tiny_path} --rounds 2 --chunks 2")
    assert f"`{data['command']}`" in page and model["model"]["sha256"] in page
    assert data["machine"]["processors"] in page and "sample text of the package" in page
    assert model["model"]["random_weights"] and "random weights, 2 layers of 64" in page
    assert not data["partial"] and "PARTIAL" not in page
    widths = [line.count("|") for line in page.splitlines() if line.startswith("|")]
    assert len(set(widths)) <= 7 and page.endswith("\n") and "nan" not in page
    for line in page.splitlines():
        assert len(line) <= 110 or line.startswith("|") or "`fq replicate" in line or "Control" in line


def test_the_kept_page_says_what_the_program_says(result):
    """docs/replication.md is the command's output: its sentences, and what depends on no machine."""
    kept = (Path(__file__).parents[2] / "docs" / "replication.md").read_text(encoding="utf-8")
    page, _ = result
    assert re.findall(r"^## (.*)$", kept, re.MULTILINE) == list(TITLES)
    for text in (
        why.COUNTS,
        why.times(),
        *map(why.prose, (why.INTRODUCTION, why.LOAD, why.TEXT, why.PERPLEXITY)),
    ):
        assert text in page and text in kept
    assert tables(kept, TITLES[3]) == tables(page, TITLES[3])
    assert "`fq replicate --tinyllama-shape`" in kept


def test_the_same_figures_each_time(result, tiny_path, capsys):
    assert main(replicate(tiny_path, "--json", "-")) == 0
    out, err = capsys.readouterr()
    again, (_, data) = json.loads(out), result
    for name in SECTIONS:
        if name not in ("performance", "architecture"):  # times; addresses
            assert again["models"][0][name] == data["models"][0][name]
    # with --json - the page goes to stderr
    assert "## 7. Perplexity" in err and "fq: tiny.gguf: perplexity" in err


def test_text_from_outside_stays_in_its_cell(tiny, executor):
    run = Replication([tiny], SAMPLE, SAMPLE, "a|b\n# c", Settings(n_ctx=16), executor)
    for data, name, _ in run._steps:
        if name == "generation":
            data[name] = experiments.generation(tiny, executor)
            data[name]["streams"]["right"]["text"] = "x|`y`\n| z"
    page = replication_text({"command": "fq"} | run.result())
    assert "a\\|b\\n# c" in page and "| ``x\\|`y`\\n\\| z`` |" in page


def test_two_models(tiny, tiny_path, executor):
    data = Replication([tiny, Model(tiny_path)], SAMPLE, SAMPLE, "text", Settings(n_ctx=16), executor)
    page = replication_text({"command": "fq"} | data.result())
    # a table each in the six sections that depend on the model
    assert page.count("### tiny.gguf") == page.count("Interrupted: not run.") == 2 * len(SECTIONS)


@pytest.mark.parametrize("chunks, run", [(-1, 2), (1, 1), (9, 2)])
def test_random_weights_get_few_chunks(tiny, executor, monkeypatch, chunks, run):
    asked = []
    monkeypatch.setattr(experiments, "perplexity", lambda model, tokens, chunks, *_: asked.append(chunks))
    plan = Replication([tiny], SAMPLE, SAMPLE, "text", Settings(chunks=chunks, n_ctx=16), executor)
    for _, name, experiment in plan._steps:
        if name == "perplexity":
            experiment()
    assert asked == [run]


# ---------------------------------------------------------------- the command line


def test_which_models(tiny_path, monkeypatch, capsys):
    """--tinyllama-shape adds the generated file; named twice it is run once."""
    looked_for = []

    def find(name, offline):
        looked_for.append((name, offline))
        raise FqError("enough") if name == "tinyllama-shape" else FqError(name)

    monkeypatch.setattr("fq.commands.replicate.open_model", find)
    assert main(["replicate"]) == main(["replicate", "-m", "tinyllama-shape", "--tinyllama-shape"]) == 2
    assert looked_for == [("smollm2", False), ("tinyllama-shape", False)]
    looked_for.clear()
    monkeypatch.setattr(
        "fq.commands.replicate.open_model", lambda name, offline: looked_for.append(name) or name
    )
    monkeypatch.setattr(
        "fq.commands.replicate.Replication", lambda models, *_: exec("raise KeyboardInterrupt")
    )
    assert main(["replicate", "--tinyllama-shape"]) == 130
    assert main(["replicate", "-m", "tinyllama-shape", "--tinyllama-shape"]) == 130
    assert looked_for == ["smollm2", "tinyllama-shape", "tinyllama-shape"]


@pytest.mark.parametrize("target", ["page.md", None])
def test_ctrl_c(tiny_path, tmp_path, capsys, monkeypatch, target):
    """What ended is shown, marked as partial; the rest is said not to have run."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "performance", interrupted)
    args = ["-o", tmp_path / target] if target else []
    assert main(replicate(tiny_path, *args)) == 130
    out, err = capsys.readouterr()
    page = (tmp_path / target).read_text(encoding="utf-8") if target else out
    assert "fq: interrupted: this is a partial result" in err
    assert "**PARTIAL**" in page and page.count("Interrupted: not run.") == 4
    assert "15 + 2 = 17" in page and "4 of the five values" in page


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rounds", "1"], "--rounds must be at least 2, not 1"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--chunks", "0"], "chunks must be positive, or -1 for all, not 0"),
        (["-c", "200"], "context of 200 tokens: the model allows at most 128"),
        (["-c", "2"], "a context of 2 tokens has nothing to score"),
        (["--threads", "0"], "--threads: threads must be between 1 and"),
        (["-o", "/no/such/folder/x.md"], "--output /no/such/folder/x.md: cannot be written there"),
        (["--json", "/no/such/folder/x"], "--json /no/such/folder/x: cannot be written there"),
        (["-o", "same", "--json", "./same"], "--output same: is the file of --json too"),
        (["-f", "/no/such/text"], "/no/such/text: No such file"),
        (["-m", "/no/such/model"], "/no/such/model: no such file"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input(tiny_path, tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "architecture", lambda *_: pytest.fail("it ran"))
    assert main(replicate(tiny_path, *args)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fq: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_a_model_of_other_norms_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    model = write_tiny(tmp_path / "m.gguf", TINY["qwen3"])
    monkeypatch.setattr(experiments, "architecture", lambda *_: pytest.fail("it ran"))
    assert main(replicate(model)) == 2
    _, err = capsys.readouterr()
    assert "its layers have the norms attn_norm, q_norm, k_norm, ffn_norm, the report" in err


def test_a_text_too_short(tiny_path, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("Hello world")
    assert main(replicate(tiny_path, "-f", tmp_path / "short.txt")) == 2
    assert "the text has 3 tokens; one chunk needs 16" in capsys.readouterr().err
