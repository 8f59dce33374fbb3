"""Units and profiles as cells of a sweep: which cells there are, what they say, and another baseline."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from command_line import fq

from fq import Executor, FqError, Perplexity, Sweep
from fq.commands.show_sweep import sweep_text
from fq.measure.cells import CONTROL, Cell, label_of, profile_cells, unit_cells
from fq.measure.inference import mean_interval
from fq.report.charts import charts
from fq.report.svg import FOR_PAGE, style
from fq.report.verdict import verdict
from fq_kernels.rules import FakeQuant

UNIT = "*=x=bf16;acc=e8m4;order=tree;out=e8m3"


@pytest.fixture(scope="module")
def tokens():
    return [int(i) for i in np.random.default_rng(2).integers(3, 512, 5 * 24)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("Words of a text, and more of them: one, two, three. " * 60)
    return path


def swept(tiny, tokens, cells, executor, **how):
    sweep = Sweep(tiny, tokens, [Cell(CONTROL, CONTROL), *cells], executor=executor, n_ctx=24, **how)
    list(sweep)
    return sweep.result()


def test_every_step_alone_all_but_each_and_all_of_them(tiny):
    cells = unit_cells(tiny, [UNIT])
    group = "*[*]=x=bf16;acc=e8m4;order=tree;out=e8m3"
    assert [(cell.kind, label_of(vars(cell)), cell.rules) for cell in cells] == [
        ("step", "x=bf16", ("*[*]=x=bf16",)),
        ("step", "acc=e8m4;order=tree", ("*[*]=acc=e8m4;order=tree",)),
        ("step", "out=e8m3", ("*[*]=out=e8m3",)),
        ("without", "without x", ("*[*]=acc=e8m4;order=tree;out=e8m3",)),
        ("without", "without acc", ("*[*]=x=bf16;out=e8m3",)),
        ("without", "without out", ("*[*]=x=bf16;acc=e8m4;order=tree",)),
        ("together", "all together", (group,)),
    ]
    assert {cell.group for cell in cells} == {group}


def test_each_norm_alone(tiny):
    cells = unit_cells(tiny, ["ffn_norm=acc=bf16"], each_norm="unit")
    names = ["all together", "ffn_norm[0]", "ffn_norm[1]", "all together"]
    assert [label_of(vars(cell)) for cell in cells] == names
    assert [cell.kind for cell in cells] == ["together", "norm", "norm", "together"]
    assert cells[1].group == cells[3].group != cells[0].group


def test_each_step_in_each_norm_alone(tiny, tokens, executor):
    cells = unit_cells(tiny, ["ffn_norm=acc=e8m4;order=tree;out=e8m3"], each_norm="steps")
    of_norms = [cell for cell in cells if cell.kind == "norm"]
    units = ["acc=e8m4;order=tree;out=e8m3", "acc=e8m4;order=tree", "out=e8m3"]
    assert [cell.name for cell in of_norms] == [f"ffn_norm[{i}]={unit}" for unit in units for i in (0, 1)]
    assert all(cell.rules == (cell.name,) for cell in of_norms)
    data = swept(tiny, tokens, cells, executor)
    text = sweep_text(data | {"text": "t"})
    rows = text[text.index("mean KL, one norm alone") :].split("\n")
    assert [head.strip() for head in re.split("  +", rows[0])[1:]] == ["all steps", *units[1:]]
    by_name = {entry["name"]: entry for entry in data["cells"]}
    of_last = [by_name[f"ffn_norm[1]={unit}"]["comparison"]["mean_kld"] for unit in units]
    assert rows[2].split() == ["ffn_norm[1]", *(f"{kld:.2e}" for kld in of_last)]
    # whole groups of each step beside that of its own cell, which is the same
    of_step = [e for e in data["cells"] if e["rules"] == ["ffn_norm[*]=out=e8m3"]]
    assert {"step", "together"} <= {e["kind"] for e in of_step}
    assert len({e["comparison"]["mean_kld"] for e in of_step}) == 1
    # units that share a step have its norms once
    shared = unit_cells(tiny, ["ffn_norm=x=bf16;acc={e8m4|e8m3}"], each_norm="steps")
    assert len(set(shared)) == len(shared)
    assert [c.name for c in shared if c.group == "ffn_norm[*]=x=bf16, each norm"] == [
        "ffn_norm[0]=x=bf16", "ffn_norm[1]=x=bf16", "ffn_norm[*]=x=bf16, all norms"
    ]  # fmt: skip
    with pytest.raises(FqError, match="each norm has its unit or its steps, not 'norms'"):
        unit_cells(tiny, ["ffn_norm=acc=bf16"], each_norm="norms")


def test_the_report_draws_steps_norms_and_who_pays(tiny, tokens, executor):
    units = unit_cells(tiny, ["ffn_norm=acc=e8m4;weight=f32;out=e8m3"], each_norm="steps")
    data = swept(tiny, tokens, [*units, *profile_cells(tiny, ["hf", "te"])], executor)
    data |= {"run": 1, "started": "2026-01-01T00:00:00+00:00", "text": "t", "command": ""}
    with style(FOR_PAGE):
        found = {chart.key: chart for chart in charts(data, FOR_PAGE)}
    assert list(found) == [
        "units-1", "units-2", *(f"norms-{i}" for i in (1, 2, 3, 4)), "heat-map-norms", "who-pays",
        "few-tokens",
    ]  # fmt: skip
    steps = found["units-1"]
    labels = [text.get_text() for text in steps.figure.axes[0].get_yticklabels()]
    assert labels[-1] == "all together" and labels[3:6].count("without weight") == 1
    assert labels.index("weight=f32") == 2 and "exactly 0" in steps.caption
    axis = steps.figure.axes[0]
    points = {line.get_ydata()[0]: line.get_xdata()[0] for line in axis.lines if line.get_marker() != "None"}
    lines = [end for line in axis.lines if line.get_marker() == "None" for end in line.get_xdata()]
    assert points[2] < min(*lines, *(x for y, x in points.items() if y != 2)), "it stands at the left edge"
    assert len(found["heat-map-norms"].tips) == 2 * 4
    whole = next(e for e in data["cells"] if e["kind"] == "together")
    share = 100 * whole["comparison"]["who_pays"]["top"]["1%"]
    assert f"{share:.1f} %" in found["who-pays"].alt


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["*=acc=x"], "unknown format 'x'"),
        (["q_norm=acc=bf16"], "matches no norm"),
        (["*=acc=bf16", "*=acc=bf16"], "is asked for twice"),
        (["*=order=sequential"], "a unit without steps is ggml's"),
    ],
)
def test_units_that_make_no_cells(tiny, units, message):
    with pytest.raises(FqError, match=message):
        unit_cells(tiny, units)
    with pytest.raises(FqError, match="a profile is asked for twice: hf:bf16, hf:bf16"):
        profile_cells(tiny, ["hf", "hf:bf16"])


def test_figures_of_steps(tiny, tokens, executor):
    data = swept(
        tiny, tokens, unit_cells(tiny, ["*=acc=e8m4;weight=f32;out=e8m3"], each_norm="unit"), executor
    )
    by_name = {label_of(e): e for e in data["cells"] if e["group"] == data["groups"][0]["name"]}
    assert by_name["weight=f32"]["comparison"]["mean_kld"] == 0 and "rank" not in by_name["weight=f32"]
    assert {*by_name["acc=e8m4"]["rank"], *by_name["out=e8m3"]["rank"]} <= {1, 2}
    klds = {name: np.array(e["comparison"]["chunks"]["mean_kld"]) for name, e in by_name.items()}
    more = klds["all together"] - klds["without acc"]
    assert by_name["without acc"]["in_company"] == {
        "mean_kld": np.mean(more),
        "mean_kld_ci95_chunks": mean_interval(more),
    }
    alone = Perplexity(
        tiny, tokens, n_ctx=24, fake_quant=FakeQuant(tiny.values, "*=acc=e8m4"), executor=executor
    )
    list(alone)
    assert alone.result()["comparison"]["mean_kld"] == by_name["acc=e8m4"]["comparison"]["mean_kld"]
    text = sweep_text(data | {"text": "t"})
    assert "in company acc costs" in text and "all together" in text and "ffn_norm[1]" in text
    said = {statement.about: " ".join(statement.lines) for statement in verdict(data)}
    assert "weight=f32 changes nothing." in said["Which step: *[*]=acc=e8m4;weight=f32;out=e8m3"]
    assert "In company " in said["Which step: *[*]=acc=e8m4;weight=f32;out=e8m3"]
    assert any(about.startswith("Which norm: ") for about in said) and "In short" not in said


def test_profiles_beside_another_baseline(tiny, tokens, executor):
    rules = tuple(tiny.profile_rules("hf"))
    cells = profile_cells(tiny, ["hf", "te", "ggml"])
    data = swept(tiny, tokens, cells, executor, baseline=rules)
    control, hf, te, ggml = data["cells"]
    assert control["exactly_zero"] and hf["comparison"]["mean_kld"] == 0 < te["comparison"]["mean_kld"]
    # the perplexities are of the same streams as without a baseline
    plain = swept(tiny, tokens, cells, executor)["cells"]
    assert ggml["comparison"]["ppl_quant"] == plain[3]["comparison"]["ppl_base"]
    assert ggml["comparison"]["ppl_base"] == plain[1]["comparison"]["ppl_quant"] == data["ppl_base"]
    assert te["comparison"]["ppl_quant"] == plain[2]["comparison"]["ppl_quant"]
    assert verdict(data)[0].about == "Baseline"


def test_a_seeded_baseline_falls_the_same_whatever_runs_beside_it(tiny, tokens):
    rules = ("*[*]=out=e8m3:stochastic,seed=4",)
    cells = [Cell(CONTROL, CONTROL), *profile_cells(tiny, ["ggml", "te"])]
    found = []
    for limit in (None, 1):
        with Executor(1) as executor:
            sweep = Sweep(tiny, tokens, cells, executor=executor, n_ctx=24, baseline=rules)
            sweep.cells_at_a_time = limit or sweep.cells_at_a_time
            list(sweep)
        found.append(sweep.result())
    assert found[0]["cells"] == found[1]["cells"] and found[0]["cells"][0]["exactly_zero"]


def test_the_command(tiny_path, text, tmp_path):
    store, out = tmp_path / "s.sqlite", tmp_path / "a.json"
    common = ("-m", tiny_path, "-f", text, "-c", 24, "--chunks", 4, "--store", store)
    said, _ = fq("sweep", *common, "--norm-unit", UNIT, "--profile", "te", "--json", out)
    data = json.loads(out.read_text())
    assert [e["kind"] for e in data["cells"]] == [
        "control",
        *["step"] * 3,
        *["without"] * 3,
        "together",
        "profile",
    ]
    assert "in company out costs" in said and "te:bf16" in said
    fq("sweep", *common, "--norm-unit", UNIT, "--profile", "te", "--resume")
    _, err = fq("sweep", *common, "--profile", "te", "--baseline", "hf", "--resume")
    assert "has no such run to go on with" in err, "another baseline is another run"
    said, _ = fq("results", "--store", store, "2")
    assert "baseline  hf:bf16: inp_embd[*]=bf16; ffn_inp[*]=bf16" in said
    fq("report", "--store", store, "-o", tmp_path / "b.html", "2")
    assert "compared with the model under hf:bf16 (inp_embd[*]=bf16" in (tmp_path / "b.html").read_text()
    said, _ = fq("results", "--store", store, "1", "--cell", "x=bf16")
    _, err = fq("results", "--store", store, "1", "--cell", "bf16", status=2)
    assert "'bf16' is in the names of several cells" in err
    assert said.startswith("*[*]=x=bf16\n"), "as its table calls it, though other names hold that, too"
    said, _ = fq("results", "--store", store, "compare", "1", "2")
    assert "their baselines have different rules" in said
    fq("report", "--store", store, "-o", tmp_path / "r.html", "1")
    page = (tmp_path / "r.html").read_text()
    assert "Which step" in page and "without acc" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "hf"], "--baseline goes with --profile"),
        (["--baseline", "hf", "--profile", "te", "--format", "bf16"], "--baseline goes with --profile"),
        (["--baseline", "hf", "--profile", "te", "--noise"], "--baseline goes with --profile"),
        (["--baseline", "", "--profile", "te"], "unknown profile ''"),
        (["--each-norm"], "--each-norm needs --norm-unit"),
        (["--profile", "te", "--realisations", 3], "a unit's roundings do not fall anew"),
        (["--profile", "x"], "unknown profile 'x'"),
    ],
)
def test_options_that_do_not_go_together(tiny_path, tmp_path, options, message):
    assert message in fq("sweep", "-m", tiny_path, "--store", tmp_path / "s", *options, status=2)[1]
