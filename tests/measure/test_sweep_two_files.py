"""A sweep beside another file: each cell is what perplexity says of the two under that rule."""

from __future__ import annotations

import json

import numpy as np
import pytest
from changed_models import rewrite
from command_line import fq

from fq import FqError, Model, NotFiniteError, Perplexity, Sweep
from fq.measure.cells import AS_IT_IS, CONTROL, Cell, cells_of
from fq_kernels.rules import FakeQuant

N_CTX, N = 64, 4
RULES = "ffn_norm[*].raw=bf16:stochastic", "l_out[0]=int8:tensor", "k[1]=fp8_e4m3fn:first-call"
BASE_RULE = "attn_norm[*].raw=bf16:stochastic"


@pytest.fixture(scope="module")
def models(packed_path, tiny_path):
    return Model(packed_path), Model(tiny_path)


@pytest.fixture(scope="module")
def tokens(models):
    return np.arange(N * N_CTX) * 7 % models[0].hparams.n_vocab


def cells(model):
    return [
        Cell(CONTROL, CONTROL),
        Cell(AS_IT_IS, AS_IT_IS),
        *cells_of(model, ["ffn_norm"], ["bf16"])[1:],
    ] + [Cell(rule, "single", rule, (rule,)) for rule in RULES]


@pytest.mark.parametrize("base_rules", [(), (BASE_RULE,)])
@pytest.mark.parametrize("memory", [None, 0])
def test_each_cell_is_perplexitys(models, tokens, executor, base_rules, memory):
    model, base = models
    how = {"n_ctx": N_CTX, "executor": executor}

    def sweep(limit=None):
        return Sweep(
            model, tokens, cells(model), base_model=base, baseline=base_rules, memory_limit=limit, **how
        )

    limit = None if memory is None else sum(sweep().memory)  # one cell at a time
    run = sweep(limit)
    steps, done = run.steps, []
    run.on_step = lambda: done.append(1)
    list(run)
    if limit is not None:
        assert run.cells_at_a_time == 1
    assert len(done) == steps
    data = run.result()
    assert data["base_model"] == base.path
    by_name = {entry["name"]: entry for entry in data["cells"]}
    assert by_name[CONTROL]["exactly_zero"]
    for cell in run.cells:
        if cell.kind == CONTROL:
            continue
        one = Perplexity(
            model,
            tokens,
            fake_quant=FakeQuant(model.values, cell.rules) if cell.rules else None,
            base_model=base,
            base_fake_quant=FakeQuant(base.values, base_rules) if base_rules else None,
            **how,
        )
        list(one)
        for position, paired in enumerate(one.paired):
            left = run.finished[run.cells.index(cell), position].paired
            for name, values in vars(paired).items():
                assert np.array_equal(values, getattr(left, name)), (cell.name, name)
        assert by_name[cell.name]["comparison"]["mean_kld"] == one.result()["comparison"]["mean_kld"] > 0


def test_what_is_lost_is_named_on_either_side(models, tokens, executor, tmp_path):
    model = models[0]
    path = tmp_path / "nan.gguf"
    rewrite(model.path, path, change=lambda name, x: x * np.nan if name == "output_norm.weight" else x)
    nan = Model(path)
    with pytest.raises(NotFiniteError, match="result_norm"):
        list(Sweep(model, tokens, cells(model), base_model=nan, n_ctx=N_CTX, executor=executor))
    run = Sweep(nan, tokens, cells(nan), base_model=model, n_ctx=N_CTX, executor=executor)
    list(run)
    assert set(run.not_finite) == set(range(1, len(run.cells))) and run.result()["cells"][0]["exactly_zero"]


def test_another_vocabulary(models, tokens, executor, tmp_path):
    path = tmp_path / "other.gguf"
    rewrite(models[0].path, path, tokens=lambda tokens: [*tokens[:-1], "another"])
    with pytest.raises(FqError, match="have other vocabularies"):
        Sweep(models[0], tokens, cells(models[0]), base_model=Model(path), n_ctx=N_CTX, executor=executor)


@pytest.fixture
def command(packed_path, twin_path, tmp_path):
    def run(*options, store="s.sqlite", status=0, base=twin_path):
        out, err = fq(
            *("sweep", "-m", packed_path, "--base-model", base, "-c", N_CTX, "--chunks", 4),
            *("--sites", "ffn_norm", "--store", tmp_path / store, *options),
            status=status,
        )
        return out, err

    return run


def test_the_command(command, tmp_path):
    out, _ = command("--json", tmp_path / "j")
    assert "base   twin.gguf: all is compared with this file" in out
    assert "the model as it is, beside it  mean KL 0.000e+00" in out and "exactly 0, as it must be" in out
    data = json.loads((tmp_path / "j").read_text())
    assert [cell["kind"] for cell in data["cells"][:2]] == [CONTROL, AS_IT_IS]
    _, err = command("--resume", "--format", "f16")
    assert "going on with run 1" in err
    out, _ = fq("results", "1", "--store", tmp_path / "s.sqlite")
    assert "base   twin.gguf" in out and "=f16" in out
    fq("report", "1", "--store", tmp_path / "s.sqlite", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "All is compared with another file, twin.gguf" in page and "perplexity of the baseline" in page
    assert "the unrounded model" not in page
    assert all(group.get("additivity") is None for group in data["groups"])


def test_runs_beside_other_files_are_others(command, tiny_path, tmp_path):
    command()
    _, err = command("--resume", base=tiny_path)
    assert "has no such run to go on with" in err
    out, _ = fq("results", "compare", "1", "2", "--store", tmp_path / "s.sqlite")
    assert "their baselines are different files" in out
    command(store="other.sqlite", base=tiny_path)
    _, err = fq(
        "results",
        "merge",
        tmp_path / "all.sqlite",
        f"{tmp_path}/s.sqlite:1",
        tmp_path / "other.sqlite",
        status=2,
    )
    assert "base_model_sha256" in err


def test_shards_and_workers(command, tmp_path):
    def figures(path):
        data = json.loads(path.read_text())
        return [(cell["name"], cell["comparison"]) for cell in data["cells"]]

    rules = "--base-fake-quant", BASE_RULE
    command(*rules, "--json", tmp_path / "whole")
    command(*rules, "--shard", "1/2", store="1")
    command(*rules, "--shard", "2/2", store="2")
    fq("results", "merge", tmp_path / "all", tmp_path / "1", tmp_path / "2")
    fq("results", "1", "--store", tmp_path / "all", "--json", tmp_path / "merged")
    command(*rules, "--scheduler", "local:1", "--threads", 1, "--json", tmp_path / "workers", store="w")
    assert figures(tmp_path / "whole") == figures(tmp_path / "merged") == figures(tmp_path / "workers")


def test_scales_of_the_baselines_rules_are_of_what_a_run_is(command, packed_path, tmp_path):
    text = tmp_path / "t.txt"
    rule = f"l_out=int4:scale=@{tmp_path}/cal.json"
    texts = "Hello world of the and is it. " * 40, "It was in that on for with as to. " * 40
    for i, some in enumerate(texts):
        text.write_text(some)
        fq(
            "calibrate",
            "-m",
            packed_path,
            "-f",
            text,
            "--sites",
            "l_out",
            "-c",
            N_CTX,
            "--chunks",
            2,
            "-o",
            tmp_path / "cal.json",
        )
        _, err = command("--base-fake-quant", rule, *(["--resume"] if i else []))
    assert "has no such run to go on with" in err


def test_bad_requests(command, twin_path):
    for options, words in (
        (["--base-fake-quant", "nosuch=bf16"], "--base-fake-quant: "),
        (["--json", twin_path], "is the baseline's model"),
    ):
        _, err = command(*options, status=2)
        assert words in err
