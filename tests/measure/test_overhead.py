"""The overhead's statistics on timings that are made up, and what is run; real times are not looked at."""

from __future__ import annotations

import gc
import json
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import TINY, write_tiny

import fq.measure.overhead
from fq import Context, FqError, Model
from fq.cli import main
from fq.measure.overhead import Configuration, Overhead, compare, configurations, overhead_text
from fq_kernels import CONTRACT
from fq_kernels.rules import Place, Rule, Site, Value

PROMPT = np.array(["prompt"] * 2 + ["eval"] * 3)


def timings(rng, rounds, overheads, *, phases=PROMPT, noise=0.02):
    """Seconds as a busy machine gives them: slow drift, rounds that are slow as a whole, spikes."""
    shape = (rounds, len(phases), 1 + len(overheads))
    base = np.where(phases == "prompt", 0.2, 0.01)[None, :, None]
    drift = np.exp(np.cumsum(rng.normal(0, 0.1, rounds)))[:, None, None]
    together = np.exp(rng.normal(0, noise, (rounds, 1, shape[2])))
    each = np.exp(rng.normal(0, noise, shape))
    spikes = np.where(rng.random(shape) < 0.1, 1 + rng.exponential(1, shape), 1)
    return base * drift * together * each * spikes * (1 + np.array([0, *overheads]))


def test_a_planted_overhead_is_found_and_none_is_not():
    rng = np.random.default_rng(1)
    found = compare(timings(rng, 100, [0.05, 0, -0.05]), PROMPT)
    for what in ("prompt", "eval", "total"):
        slower, same, faster = (f[what] for f in found[1:])
        assert slower["overhead"] == pytest.approx(0.05, abs=0.01) and slower["resolved"]
        assert faster["overhead"] == pytest.approx(-0.05, abs=0.01) and faster["resolved"]
        assert same["overhead"] == pytest.approx(0, abs=0.01) and not same["resolved"]
        for figure in (slower, same, faster):
            low, high = figure["overhead_ci95"]
            assert low < figure["overhead"] < high and high - low < 0.03
    assert all(
        found[0][what][key] is None
        for what in ("prompt", "eval", "total")
        for key in ("overhead", "overhead_ci95", "resolved")
    )


@pytest.mark.parametrize("rounds, most", [(10, 0.1), (30, 0.08)])
def test_the_interval_holds_the_truth_as_often_as_it_says(monkeypatch, rounds, most):
    monkeypatch.setattr(fq.measure.overhead, "BOOTSTRAP_SAMPLES", 400)
    rng = np.random.default_rng(2)
    missed = dict.fromkeys(("prompt", "eval", "total"), 0)
    n = 400
    for _ in range(n // 2):
        for found, truth in zip(compare(timings(rng, rounds, [0, 0.03]), PROMPT)[1:], (0, 0.03), strict=True):
            for what in missed:
                low, high = found[what]["overhead_ci95"]
                missed[what] += not low <= truth <= high
    # 5 % are meant; fewer rounds than it takes miss some more, and never would be no interval either
    assert all(0.005 <= count / n <= most for count in missed.values()), missed


def test_a_machine_that_slows_down_slows_no_configuration():
    rng = np.random.default_rng(3)
    pace = np.exp(rng.normal(0, 1, (20, 5, 1)))
    found = compare(pace * np.array([1, 1, 1.02]), PROMPT)
    assert found[1]["total"]["overhead_ci95"] == pytest.approx([0, 0], abs=1e-12)
    assert found[2]["total"]["overhead_ci95"] == pytest.approx([0.02, 0.02])


def test_times_and_the_total():
    """prompt: two evaluations of 100 and 300 ms, a tenth slower; eval: three of 10 ms."""
    seconds = np.array([0.1, 0.3, 0.01, 0.01, 0.01])[:, None] * np.array([[1, 1.1]] * 2 + [[1, 1]] * 3)
    seconds = np.repeat(seconds[None], 5, axis=0)
    seconds[0] *= 50  # one round of five does not move a median
    base, slower = compare(seconds, PROMPT)
    assert (base["prompt"]["ms"], base["eval"]["ms"], base["total"]["ms"]) == pytest.approx((400, 30, 430))
    assert slower["prompt"]["ms"] == pytest.approx(440)
    assert slower["prompt"]["overhead"] == pytest.approx(0.1)
    assert slower["eval"]["overhead"] == pytest.approx(0)
    assert slower["total"]["overhead"] == pytest.approx(40 / 430)
    assert slower["total"]["overhead_ci95"] == pytest.approx([40 / 430] * 2)


def test_one_phase_alone():
    base, same = compare(np.ones((4, 2, 2)), np.array(["prompt"] * 2))
    assert base["eval"] is None and same["eval"] is None
    assert same["total"] == same["prompt"] == {
        "ms": 2000.0, "overhead": 0.0, "overhead_ci95": [0.0, 0.0], "resolved": False
    }  # fmt: skip


def test_the_bootstrap_in_pieces_is_the_same(monkeypatch):
    seconds = timings(np.random.default_rng(4), 12, [0.01])
    whole = compare(seconds, PROMPT, seed=5)
    monkeypatch.setattr(fq.measure.overhead, "MAX_DRAWN", 1000)
    assert compare(seconds, PROMPT, seed=5) == whole
    assert compare(seconds, PROMPT, seed=6) != whole


# ---------------------------------------------------------------- what is run


@pytest.fixture
def log(monkeypatch):
    """The evaluations made: (fake_quant, n_past, tokens, n_outputs)."""
    made = []
    evaluate = Context.eval

    def logged(self, tokens, outputs=None, **options):
        logits = evaluate(self, tokens, outputs, **options)
        made.append((self.fake_quant, self.n_past - len(tokens), list(tokens), len(logits)))
        assert not gc.isenabled()
        return logits

    monkeypatch.setattr(Context, "eval", logged)
    monkeypatch.setattr(Overhead, "_look", lambda self: None)  # which is not timed
    return made


def measure(tiny, executor, **options):
    options = {"n_prompt": 10, "n_predict": 3, "batch": 4, "rounds": 3, "warm_up": 1} | options
    what = options.pop("configurations", None) or configurations(tiny)
    return Overhead(tiny, [5, 6, 7], what, executor=executor, **options)


def test_every_configuration_makes_every_evaluation_before_the_next(tiny, executor, log):
    run = measure(tiny, executor)
    assert list(run) == [-1, 0, 1, 2] and run.done == 3
    n = len(run.configurations)
    assert run.seconds.shape == (3, 6, n) and (run.seconds > 0).all()
    names = {id(fq): c.name for fq, c in zip(run._fake_quants, run.configurations, strict=True)}
    tokens = [5, 6, 7] * 5
    steps = [(0, 4, 0), (4, 4, 0), (8, 2, 1), (10, 1, 1), (11, 1, 1), (12, 1, 1)]
    orders = set()
    made = iter(log)
    for _ in range(4):
        for i, (begin, length, n_outputs) in enumerate(steps):
            # the first of a size gets memory, and does not count
            same_size = i > 0 and steps[i - 1][1:] == (length, n_outputs)
            for _ in range(not same_size):
                assert names[id(next(made)[0])] == "baseline"
            turn = [next(made) for _ in range(n)]
            assert {t[1] for t in turn} == {begin} and {t[3] for t in turn} == {n_outputs}
            assert all(t[2] == tokens[begin : begin + length] for t in turn)
            order = [names[id(t[0])] for t in turn]
            assert sorted(order) == sorted(names.values())
            orders.add(tuple(order))
    assert next(made, None) is None
    assert len(orders) > 10  # in no fixed order
    assert gc.isenabled()


def test_the_order_is_the_seeds(tiny, executor, log):
    def order(seed):
        log.clear()
        run = measure(tiny, executor, seed=seed)
        for _ in run:
            pass
        ids = [id(fq) for fq in run._fake_quants]
        return [ids.index(id(entry[0])) for entry in log]

    assert order(1) == order(1) != order(2)


def test_the_configurations_do_what_they_are_called(tiny, executor):
    run = measure(tiny, executor)
    for _ in run:
        pass
    rounded = {
        c.name: {
            (s.site.place.kind, s.site.place.layer, s.site.point)
            for s in fq.matched
            if s.rows_quantised == s.rows_seen > 0
        }
        for c, fq in zip(run.configurations, run._fake_quants, strict=True)
    }
    ffn = {("ffn_norm", 0, "raw"), ("ffn_norm", 1, "raw")}
    norms = ffn | {("attn_norm", 0, "raw"), ("attn_norm", 1, "raw"), ("output_norm", None, "raw")}
    assert rounded == {
        "baseline": set(),
        "control": set(),
        "ffn_norm[1]": {("ffn_norm", 1, "raw")},  # no layer 5: the middle one
        "every ffn_norm": ffn,
        "every norm": norms,
        "every site": norms | {(kind, layer, "weighted") for kind, layer, _ in norms},
    }


def test_first_call_begins_anew_with_each_round(tiny, executor):
    rule = Rule.parse("ffn_norm=bf16:first-call")
    run = measure(tiny, executor, configurations=[Configuration("baseline"), Configuration("first", (rule,))])
    for _ in run:
        # one of 10 + 3 rows, but the last layer's norm sees those alone that give logits
        counts = [(c.rows_quantised, c.rows_seen) for c in run._fake_quants[1].matched]
        assert counts == [(1, 13), (1, 4)]


def test_layer_format_and_point():
    def rules(n_layer, *args):
        values = [
            Value(Place(kind, layer), (Site(Place(kind, layer), "raw"), Site(Place(kind, layer), "weighted")))
            for layer in range(n_layer)
            for kind in ("attn_norm", "ffn_norm")
        ]
        norms = [value.place for value in values]
        fake = SimpleNamespace(hparams=SimpleNamespace(n_layer=n_layer), norms=norms, values=values)
        return [str(rule) for c in configurations(fake, *args) for rule in c.rules]

    assert rules(30)[0] == "ffn_norm[5].raw=bf16"
    assert rules(4)[0] == "ffn_norm[2].raw=bf16"
    assert rules(30, "f16", 7, "weighted") == [
        "ffn_norm[7].weighted=f16",
        "ffn_norm[*].weighted=f16",
        "*[*].weighted=f16",
        "*[*].raw=f16",
        "*[*].weighted=f16",
    ]


def test_a_model_without_ffn_norms_has_no_rows_of_them(tmp_path):
    model = Model(write_tiny(tmp_path / "m.gguf", TINY["olmo2"]))
    names = [each.name for each in configurations(model)]
    assert names == ["baseline", "control", "every norm", "every site"]


def test_iterated_again_it_has_the_rounds_that_were_asked_for(tiny, executor):
    run = measure(tiny, executor, rounds=5)
    for i in run:
        if i == 2:
            break
    assert run.done == 3
    assert list(run) == [2, 3, 4] and run.done == 5 and run.result()["rounds"] == 5


def test_the_rounds_that_ended_are_kept(tiny, executor, monkeypatch):
    run = measure(tiny, executor, rounds=5)
    rounds = iter(run)
    for _ in range(3):
        next(rounds)
    monkeypatch.setattr(Context, "eval", lambda *_, **options: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        next(rounds)
    assert gc.isenabled()
    data = run.result()
    assert (data["rounds"], data["rounds_asked"], data["partial"]) == (2, 5, True)
    text = overhead_text(data)
    assert "2 rounds, 1 before them dropped  PARTIAL: 5 were asked for" in text
    assert "fewer than 20 rounds: the intervals are narrower than they should be" in text


# ---------------------------------------------------------------- text


def shown(monkeypatch, tiny, executor, overheads, n_predict=3):
    """The text of a measurement whose timings are made up."""
    run = measure(tiny, executor, rounds=100, n_predict=n_predict)
    phases = PROMPT[[0, 0, 0] + [4] * n_predict]
    run._seconds = list(timings(np.random.default_rng(7), 100, overheads, phases=phases))
    data = run.result()
    return data, overhead_text(data)


def test_the_table(monkeypatch, tiny, executor):
    data, text = shown(monkeypatch, tiny, executor, [0, 0, 0.04, -0.04, 0])
    lines = [line.split() for line in text.splitlines()]
    found = [" ".join(line) for line in lines]
    assert "work: 10 tokens of prompt in batches of 4, then 3 one by one; 100 rounds" in text
    assert "every norm: *[*].raw=bf16" in text and "fewer than" not in text
    for what, title, tokens in (("prompt", "prompt eval", 10), ("eval", "eval", 3), ("total", "total", 13)):
        base, control, _, slow, fast, _ = (c[what] for c in data["configurations"])
        assert base["tokens_per_second"] == pytest.approx(tokens / base["ms"] * 1e3)
        assert f"{title} baseline {base['ms']:.2f} {base['tokens_per_second']:.1f}" in found
        low, high = (100 * q for q in slow["overhead_ci95"])
        assert any(
            line.startswith("every ffn_norm")
            and line.endswith(f"{100 * slow['overhead']:+.2f} % {low:+.2f} to {high:+.2f} % slower")
            for line in found
        )
        assert any(
            line.startswith(f"every norm {fast['ms']:.2f}") and line.endswith("faster") for line in found
        )
        assert any(
            line.startswith(f"control {control['ms']:.2f}") and line.endswith("no difference resolved")
            for line in found
        )
    assert text.endswith("control (the baseline once more): no difference resolved, as it must be")


def test_a_control_that_differs_is_said(monkeypatch, tiny, executor):
    _, text = shown(monkeypatch, tiny, executor, [0.05, 0, 0, 0, 0])
    assert "control (the baseline once more): differs in prompt eval, eval, total, which" in text


def test_no_eval_phase(monkeypatch, tiny, executor):
    data, text = shown(monkeypatch, tiny, executor, [0, 0, 0, 0, 0], n_predict=0)
    assert all(c["eval"] is None for c in data["configurations"])
    assert "\neval" not in text and "\ntotal" in text


# ---------------------------------------------------------------- the command line


def bench(tiny_path, *args):
    return ["bench", "-m", str(tiny_path), "--prompt-tokens", "6", "-n", "2", "--rounds", "3", *args]


def test_bench(tiny_path, tmp_path, capsys):
    target = tmp_path / "overhead.json"
    assert main(bench(tiny_path, "-t", "1", "--json", str(target))) == 0
    out, err = capsys.readouterr()
    data = json.loads(target.read_text())
    assert (data["n_prompt"], data["n_predict"], data["rounds"], data["partial"]) == (6, 2, 3, False)
    assert data["model"] == str(tiny_path) and data["numerics"]["threads"] == 1
    assert data["numerics"]["contract"] == CONTRACT
    assert {"date", "processors", "libraries"} <= data["machine"].keys()
    assert [c["name"] for c in data["configurations"]] == [
        "baseline",
        "control",
        "ffn_norm[1]",
        "every ffn_norm",
        "every norm",
        "every site",
    ]
    for c in data["configurations"]:
        for what in ("prompt", "eval", "total"):
            assert c[what].keys() == {"ms", "tokens_per_second", "overhead", "overhead_ci95", "resolved"}
    assert "processors: " in out and "total" in out and err == ""
    assert main(bench(tiny_path, "--json", "-")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["rounds"] == 3 and "control (the baseline once more)" in err


def test_the_prompt(tiny_path, capsys):
    """The sample text to a length, a text as it is, a text to a length."""
    for args, n in (
        (["--prompt-tokens", "20"], 20),
        (["-p", "Hello world"], 3),
        (["-p", "Hello world", "--prompt-tokens", "9"], 9),
    ):
        assert main(["bench", "-m", str(tiny_path), "--rounds", "2", "-n", "0", "--json", "-", *args]) == 0
        assert json.loads(capsys.readouterr().out)["n_prompt"] == n


@pytest.mark.parametrize(
    "args, message",
    [
        (["--rounds", "1"], "--rounds must be at least 2, not 1"),
        (["--warm-up", "-1"], "--warm-up must be at least 0"),
        (["-n", "-1"], "--predict must be at least 0"),
        (["-b", "0"], "--batch-size must be at least 1"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--prompt-tokens", "0"], "--prompt-tokens must be at least 1, not 0"),
        (["--prompt-tokens", "127"], "context of 129 tokens: the model allows 1 to 128"),
        (["--layer", "2"], "--layer must be between 0 and 1, not 2"),
        (["--layer", "-1"], "--layer must be between 0 and 1, not -1"),
        (["--format", "fp7"], "unknown format 'fp7'"),
        (["--point", "cooked"], "point must be one of in, raw, weighted"),
        (["--threads", "0"], "--threads: threads must be between 1 and"),
        (["--json", "/no/such/folder/x"], "--json /no/such/folder/x: cannot be written there"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_input(tiny_path, capsys, args, message):
    assert main(bench(tiny_path, *args)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fq: error: ") and err.count("\n") == 1
    assert message in err


def test_an_empty_prompt(tiny, executor):
    with pytest.raises(FqError, match="the prompt is empty"):
        Overhead(tiny, [], [Configuration("baseline")], n_prompt=3, executor=executor)


@pytest.mark.parametrize("after, status, says", [(1, 130, False), (4, 130, True)])
def test_ctrl_c(tiny_path, capsys, monkeypatch, after, status, says):
    """With two rounds there is something to print, marked as partial."""
    rounds = []
    one = Overhead._round

    def interrupted(self):
        if len(rounds) == after:
            raise KeyboardInterrupt
        rounds.append(0)
        return one(self)

    monkeypatch.setattr(Overhead, "_round", interrupted)
    assert main(bench(tiny_path, "--rounds", "9")) == status
    out, err = capsys.readouterr()
    assert f"fq: interrupted after {max(after - 2, 0)} of 9 rounds: this is a partial result" in err
    assert ("PARTIAL: 9 were asked for" in out) == says


def test_units_are_configurations(tiny_path):
    tiny_model = Model(tiny_path)
    found = configurations(tiny_model, units=["ffn_norm=acc=bf16;order=tree"])
    assert (
        found[-1].name == "ffn_norm[*]=acc=bf16;order=tree"
        and len(found) == len(configurations(tiny_model)) + 1
    )
    for unit in ("ffn_norm=acc=x", "q_norm=acc=bf16"):
        with pytest.raises(FqError):
            configurations(tiny_model, units=[unit])
