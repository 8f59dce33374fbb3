"""Roundings fallen anew: what may be said of a change of the perplexity."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import fq
from compared_runs import HARD, RUN, side

from fq import FqError, Perplexity, Sweep, cells_of
from fq.commands.show_sweep import sweep_text
from fq.gguf.synthetic import SAMPLE_TEXT
from fq.measure.figures import figures
from fq.measure.realisations import adjust, fallen_anew, summary
from fq_kernels.rules import FakeQuant, Rule

RULE = "ffn_norm[*].raw=int4"


@pytest.fixture(scope="module")
def tokens(tiny):
    return tiny.tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "rule, other",
    [
        ("ffn_norm[3].raw=bf16", "ffn_norm[3].raw=bf16:dither,seed=2"),
        ("*[*].weighted=int8:group=32", "*[*].weighted=int8:group=32,dither,seed=2"),
        ("ffn_norm[*].raw=bf16:stochastic,seed=5", "ffn_norm[*].raw=bf16:stochastic,seed=7"),
        ("ffn_norm[*].raw=bf16:dither,seed=5", "ffn_norm[*].raw=bf16:dither,seed=7"),
        ("ffn_norm[*].raw=bf16:first-call", "ffn_norm[*].raw=bf16:dither,seed=2,first-call"),
    ],
)
def test_how_a_rule_falls_anew(rule, other):
    assert fallen_anew(rule, 2) == Rule.parse(other)


def test_a_sweep_has_them_beside_each_cell(tiny, tokens, executor):
    cells = cells_of(tiny, formats=["int4"], realisations=3)
    assert [(c.kind, c.of) for c in cells].count(("realisation", "ffn_norm[1].raw=int4")) == 2
    assert len({c.rules for c in cells}) == len(cells)
    run = Sweep(tiny, tokens, cells, n_ctx=16, chunks=4, executor=executor)
    for _ in run:
        pass
    data = run.result()
    named = {c["name"]: c for c in data["cells"]}
    whole = named[RULE]["realisations"]
    means = [named[name]["comparison"]["ln_ppl_ratio"] for name in (RULE, f"{RULE} #2", f"{RULE} #3")]
    assert len(set(means)) == 3
    assert whole["ln_ppl_ratio_of_each"] == pytest.approx(means, rel=1e-12)
    assert whole["ln_ppl_ratio"] == pytest.approx(np.mean(means))
    assert [g["name"] for g in data["groups"]] == [RULE]
    single = [c for c in data["cells"] if c["kind"] == "single"]
    assert all(c["realisations"]["p_adjusted"] >= c["realisations"]["p"] for c in single)
    assert "mean of 3 realisations of each rounding" in sweep_text(data | {"text": "t"})
    # what stands beside the others is as it would be without them
    alone = Perplexity(
        tiny,
        tokens,
        n_ctx=16,
        chunks=4,
        fake_quant=FakeQuant(tiny.values, RULE),
        realisations=3,
        executor=executor,
    )
    for _ in alone:
        pass
    found = alone.result()
    assert found["comparison"] == named[RULE]["comparison"]
    assert found["realisations"] == whole | {
        "p_adjusted": whole["p"],
        "resolved": found["realisations"]["resolved"],
    }


def test_seeds_that_contradict_each_other_say_nothing_together():
    """Realisations each as sure of a change as can be, and of opposite ones."""
    up = [1e-3 + 1e-6 * i for i in range(8)]
    one, both = summary([up] * 4), summary([up, [-x for x in up]] * 2)
    adjust([one, both])
    assert one["resolved"] and not both["resolved"]
    low, high = both["ln_ppl_ratio_ci95"]
    assert low < 0 < high


def test_what_is_resolved_is_adjusted_over_all_cells():
    rng = np.random.default_rng(0)
    found = [summary(rng.standard_normal((3, 8)) + 0.9) for _ in range(2)]
    ps = [f["p"] for f in found]
    adjust(found)
    assert min(f["p_adjusted"] for f in found) == pytest.approx(2 * min(ps))


def test_without_them_nothing_is_said_of_the_perplexity():
    data = figures(RUN.about, RUN.cells, side(1, [0 * HARD, HARD, HARD]).finished)
    assert not any("realisations" in c for c in data["cells"])
    assert "realisation" not in sweep_text(data)


def test_a_noise_control_has_none(tiny, tokens, executor):
    cells = cells_of(tiny, formats=["int4", "noise_int4"], realisations=2)
    assert {c.of.partition("=")[2] for c in cells if c.of} == {"int4"}
    with pytest.raises(FqError, match="noise control"):
        rules = FakeQuant(tiny.values, "ffn_norm=noise_int4")
        Perplexity(tiny, tokens, n_ctx=16, fake_quant=rules, realisations=2, executor=executor)


def test_the_command(tiny_path):
    run = "perplexity", "-m", tiny_path, "-c", 16, "--chunks", 4, "--fake-quant", RULE, "--realisations", 3
    out, _ = fq(*run, "--json", "-")
    data = json.loads(out)
    assert data["realisations"]["n"] == 3 and data["realisations"]["resolved"] in (True, False)
    each = " ".join(f"{x:+.1e}" for x in data["realisations"]["ln_ppl_ratio_of_each"])
    assert f"\n  each                  {each}\n" in fq(*run)[0] and each.count("e") == 3
    for command in ("perplexity", "sweep"):
        assert (
            "--realisations must be 1 to 1000, not 0"
            in fq(command, "-m", tiny_path, "--realisations", 0, status=2)[1]
        )
    err = fq("perplexity", "-m", tiny_path, "--realisations", 2, status=2)[1]
    assert "realisations are of a rule" in err


def test_sites_that_overlap_share_their_realisations(tiny, tokens, executor):
    """A cell of two groups has each of its realisations once."""
    cells = cells_of(tiny, ["ffn_norm[*].raw", "ffn_norm[0].raw"], ["int4"], realisations=3)
    run = Sweep(tiny, tokens, cells, n_ctx=16, chunks=4, executor=executor)
    for _ in run:
        pass
    found = [c["realisations"] for c in run.result()["cells"] if c["name"] == "ffn_norm[0].raw=int4"]
    assert len(found) == 2 and found[0] == found[1]
    assert found[0]["n"] == 3 == len(set(found[0]["ln_ppl_ratio_of_each"]))


def test_where_one_chunk_differs_realisations_tell_nothing():
    once = [[x, *[0.0] * 7] for x in (1e-3, 2e-3, -1e-3)]
    assert summary(once)["p"] is None


def test_two_realisations_scatter_too_freely():
    rng = np.random.default_rng(1)
    assert summary(rng.standard_normal((2, 8)))["p"] is None
    assert summary(rng.standard_normal((3, 8)))["p"] is not None


def test_a_run_that_is_gone_on_with_must_be_told_what_falls_anew(tiny_path, tmp_path):
    sweep = ["sweep", "-m", tiny_path, "-c", 16, "--store", tmp_path / "s.sqlite"]
    fq(*sweep, "--chunks", 1)
    _, err = fq(*sweep, "--resume", "--realisations", 3, status=2)
    assert "--resume --realisations: name the --sites or the --format" in err


def test_an_extension_names_them(tiny_path, tmp_path):
    sweep = (
        "sweep",
        "-m",
        tiny_path,
        "-c",
        16,
        "--chunks",
        1,
        "--sites",
        "ffn_norm",
        "--store",
        tmp_path / "s",
    )
    fq(*sweep)
    _, err = fq(*sweep, "--resume", "--realisations", 2)
    assert "(realisations)" in err
