"""What fake quantisation costs in time: configurations timed in turns, and the ratio of their times.

A disturbance of the machine lasts longer than one evaluation of the graph. So the same evaluation
is made by every configuration, in an order drawn anew, before the next one is made by any; one
context serves them all, so that they share every buffer; and a time is compared only with the
baseline's beside it. The median of those ratios is the overhead. Its 95 % interval is bootstrapped
over rounds, as evaluations of a round may be disturbed together. A second baseline takes part like
any other configuration: its overhead is 0, and what is found instead is the error of the method.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np

from fq_kernels import Executor, default_fpu, get_format
from fq_kernels.rules import AnyRule, FakeQuant, Place, Rule, UnitRule

from ..errors import FqError, NotFiniteError
from ..run.context import Context
from ..run.finite import all_finite, first_not_finite, not_finite_text
from ..run.model import Model
from ..words import table

BASELINE, CONTROL = "baseline", "control"
REPORTS_LAYER = 5
BOOTSTRAP_SAMPLES = 2000
ENOUGH_ROUNDS = 20  # from which on the intervals hold the truth as often as they say
MAX_DRAWN = 1 << 22  # values in memory at a time
PHASES = ("prompt", "eval")


class Configuration(NamedTuple):
    """What is timed: the model under some rules."""

    name: str
    rules: tuple[AnyRule, ...] = ()


def reports_layer(model: Model) -> int:
    """The layer that the report rounds: 5, or the middle one of a model that has no layer 5."""
    n_layer = model.hparams.n_layer
    return REPORTS_LAYER if REPORTS_LAYER < n_layer else n_layer // 2


def configurations(
    model: Model,
    format_: str = "bf16",
    layer: int | None = None,
    point: str = "raw",
    units: Sequence[str] = (),
) -> list[Configuration]:
    """The baseline, twice; one layer's FFN norm and every FFN norm, where there are any, every norm, and
    every norm at both points, rounded to ``format_``; then norms computed by each of ``units``, written as
    unit rules.

    layer None is `reports_layer`. Raises FqError for a format, a layer, a point or a unit that there is not.
    """
    n_layer = model.hparams.n_layer
    if layer is None:
        layer = reports_layer(model)
    if not 0 <= layer < n_layer:
        raise FqError(f"--layer must be between 0 and {n_layer - 1}, not {layer}")
    try:
        fmt = get_format(format_)
        one = Rule(fmt, kind="ffn_norm", layer=layer, point=point)
        ffn = Rule(fmt, kind="ffn_norm", point=point)
        every = Rule(fmt, kind="all", point=point)
        both = (Rule(fmt, kind="all", point="raw"), Rule(fmt, kind="all", point="weighted"))
        of_units = [UnitRule.parse(unit) for unit in units]
        of_ffn = [Configuration(f"ffn_norm[{layer}]", (one,)), Configuration("every ffn_norm", (ffn,))]
        found = [
            Configuration(BASELINE),
            Configuration(CONTROL),
            *(of_ffn if Place("ffn_norm", layer) in model.norms else []),
            Configuration("every norm", (every,)),
            Configuration("every site", both),
            *(Configuration(str(rule), (rule,)) for rule in of_units),
        ]
        for each in found:
            _fake_quant(model, each.rules)
    except ValueError as e:
        raise FqError(str(e)) from None
    return found


def _fake_quant(model: Model, rules: Sequence[AnyRule]) -> FakeQuant:
    return FakeQuant(model.values, rules, count_errors=False)


class Overhead:
    """One measurement; iterate over it to run it, round by round.

    tokens          of the prompt; once more from its start where more are needed
    configurations  the first is the baseline that the others are compared with
    n_prompt        tokens of prompt in a round; None: all that ``tokens`` has
    n_predict       tokens evaluated one by one after the prompt, in a round
    batch           tokens per evaluation of the prompt, as these alternate
    rounds          rounds that count; ``warm_up`` more before them do not
    seed            of the order and of the bootstrap

    All configurations evaluate the same tokens, whatever they would have generated. ``result()``
    gives the figures of the rounds that ended so far. Raises FqError for what cannot be run, and
    NotFiniteError where logits are not finite.
    """

    def __init__(
        self,
        model: Model,
        tokens: Sequence[int] | np.ndarray,
        configurations: Sequence[Configuration],
        *,
        n_prompt: int | None = None,
        n_predict: int = 8,
        batch: int = 128,
        rounds: int = 30,
        warm_up: int = 2,
        seed: int = 0,
        executor: Executor,
    ) -> None:
        if n_prompt is None:
            n_prompt = len(tokens)
        for name, value, least in (
            ("--prompt-tokens", n_prompt, 1),
            ("--predict", n_predict, 0),
            ("--batch-size", batch, 1),
            ("--rounds", rounds, 2),
            ("--warm-up", warm_up, 0),
            ("--seed", seed, 0),
        ):
            if value < least:
                raise FqError(f"{name} must be at least {least}, not {value}")
        if not len(tokens):
            raise FqError("the prompt is empty")
        self.model, self.executor = model, executor
        self.configurations = list(configurations)
        self.n_prompt, self.n_predict, self.batch = n_prompt, n_predict, batch
        self.rounds, self.warm_up, self.seed = rounds, warm_up, seed
        self.context = Context(model, n_prompt + n_predict, executor)
        self._tokens = np.resize(np.asarray(tokens), n_prompt + n_predict)
        ends = [*range(batch, n_prompt, batch), *range(n_prompt, n_prompt + n_predict + 1)]
        # the evaluations of a round: tokens from, to, and how many logits are wanted, as in generation
        self._steps = [
            (begin, end, int(end >= n_prompt)) for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        self._fake_quants = [_fake_quant(model, c.rules) for c in self.configurations]
        self._order = np.random.default_rng(seed)
        self._seconds: list[np.ndarray] = []

    @property
    def done(self) -> int:
        """Rounds that ended and count."""
        return len(self._seconds)

    @property
    def seconds(self) -> np.ndarray:
        """(rounds done, evaluations of a round, configurations)"""
        return np.array(self._seconds).reshape(self.done, len(self._steps), len(self.configurations))

    def __iter__(self) -> Iterator[int]:
        """Yields the number of each round that ended, from -warm_up on."""
        if not self.done:
            self._look()
        collecting = gc.isenabled()
        before = self.done
        for i in range(before - self.warm_up, self.rounds):
            gc.collect()
            gc.disable()  # a collection would fall into one configuration's time
            try:
                seconds = self._round()
            finally:
                if collecting:
                    gc.enable()
            if i >= before:
                self._seconds.append(seconds)
            yield i

    def _round(self) -> np.ndarray:
        seconds = np.empty((len(self._steps), len(self.configurations)))
        before = None
        for fake_quant in self._fake_quants:
            fake_quant.reset()  # a round is a run: first-call begins anew
        for i, step in enumerate(self._steps):
            begin, end, n_outputs = step
            if before != (before := (end - begin, n_outputs)):
                self._evaluate(0, *step)  # gets memory of the new sizes: not to be compared
            for k in self._order.permutation(len(self.configurations)):
                seconds[i, k] = self._evaluate(k, *step)
        return seconds

    def _evaluate(self, k: int, begin: int, end: int, n_outputs: int) -> float:
        context = self.context
        context.fake_quant = self._fake_quants[k]
        context.n_past = begin  # the same place in the sequence for every configuration
        start = perf_counter_ns()
        context.eval(self._tokens[begin:end], None if n_outputs else slice(0, 0), decoding=True)
        return (perf_counter_ns() - start) * 1e-9

    def _look(self) -> None:
        """At the logits of each configuration alone: in a round they find each other's keys and values."""
        wanted = [(self._tokens[b:e], None if n_outputs else slice(0, 0)) for b, e, n_outputs in self._steps]
        for configuration, fake_quant in zip(self.configurations, self._fake_quants, strict=True):
            fake_quant.reset()
            self.context.fake_quant = fake_quant
            self.context.clear()
            if not all(all_finite(self.context.eval(*step, decoding=True)) for step in wanted):
                rules = _fake_quant(self.model, configuration.rules)
                where = first_not_finite(self.model, wanted, self.executor, rules, decoding=True)
                raise NotFiniteError(not_finite_text(configuration.name, where))

    def result(self) -> dict[str, Any]:
        """The figures of the rounds that ended, as written to JSON. Needs one."""
        phases = np.array([PHASES[begin >= self.n_prompt] for begin, _, _ in self._steps])
        figures = compare(self.seconds, phases, seed=self.seed)
        tokens = {"prompt": self.n_prompt, "eval": self.n_predict}
        tokens["total"] = self.n_prompt + self.n_predict
        return {
            "model": self.model.path,
            "n_prompt": self.n_prompt,
            "n_predict": self.n_predict,
            "batch_size": self.batch,
            "rounds": self.done,
            "rounds_asked": self.rounds,
            "warm_up": self.warm_up,
            "seed": self.seed,
            "partial": self.done < self.rounds,
            "configurations": [
                {"name": c.name, "rules": [str(rule) for rule in c.rules]}
                | {
                    what: figure and figure | {"tokens_per_second": tokens[what] / figure["ms"] * 1e3}
                    for what, figure in found.items()
                }
                for c, found in zip(self.configurations, figures, strict=True)
            ],
        }


# ---------------------------------------------------------------- statistics


@default_fpu()
def compare(
    seconds: np.ndarray, phases: np.ndarray, *, seed: int = 0
) -> list[dict[str, dict[str, Any] | None]]:
    """Times and overheads of every configuration, from seconds (rounds, evaluations, configurations).

    phases (evaluations,) names the phase of each. For every configuration and phase, and for
    ``total``: ms, of all its evaluations in a round, each the median over rounds; overhead, the
    median of the ratio to configuration 0 in the same evaluation of the same round, less 1;
    overhead_ci95, over rounds; resolved: whether the interval leaves 0 out. The total's ratio is
    that of the phases, weighted by the baseline's time. overhead is None for configuration 0.
    Phases without evaluations are None.
    """
    rounds, _, n = seconds.shape
    ms = np.median(seconds, axis=0) * 1e3  # (evaluations, configurations)
    there = [name for name in PHASES if (phases == name).any()]
    phase_ms = np.array([ms[phases == name].sum(axis=0) for name in there])  # (phases, configurations)
    draws = np.random.default_rng(seed).integers(0, rounds, (BOOTSTRAP_SAMPLES, rounds))
    blocks = np.array_split(draws, -(-draws.size * seconds.shape[1] // MAX_DRAWN))
    result: list[dict[str, dict[str, Any] | None]] = []
    for k in range(n):
        values, samples = [], []
        for name in there:
            part = seconds[:, phases == name]
            ratios = part[:, :, k] / part[:, :, 0]  # (rounds, evaluations)
            values.append(np.median(ratios))
            medians = [np.median(ratios[block].reshape(len(block), -1), axis=1) for block in blocks]
            samples.append(np.concatenate(medians))
        weights = phase_ms[:, 0] / phase_ms[:, 0].sum()
        values.append(weights @ np.array(values))
        samples.append(weights @ np.array(samples))
        times = [*phase_ms[:, k], phase_ms[:, k].sum()]
        found: dict[str, dict[str, Any] | None] = dict.fromkeys((*PHASES, "total"))
        for name, t, value, sample in zip([*there, "total"], times, values, samples, strict=True):
            found[name] = {"ms": float(t)} | (_overhead(value, sample) if k else _REFERENCE)
        result.append(found)
    return result


_REFERENCE = {"overhead": None, "overhead_ci95": None, "resolved": None}


def _overhead(ratio: float, sample: np.ndarray) -> dict[str, Any]:
    low, high = (float(q) - 1 for q in np.quantile(sample, [0.025, 0.975]))
    return {
        "overhead": float(ratio) - 1,
        "overhead_ci95": [low, high],
        "resolved": not low <= 0 <= high,
    }


# ---------------------------------------------------------------- text

_WHAT = {"prompt": "prompt eval", "eval": "eval", "total": "total"}


def verdict(figure: dict[str, Any]) -> str:
    if figure["overhead"] is None:
        return ""
    if not figure["resolved"]:
        return "no difference resolved"
    return "slower" if figure["overhead"] > 0 else "faster"


def overhead_text(data: dict[str, Any]) -> str:
    """The table of a result; ``data`` may have machine {name: text} too."""
    rows = [["time", "configuration", "ms", "tokens/s", "overhead", "95 % interval", ""]]
    for what, title in _WHAT.items():
        for c in data["configurations"]:
            if (figure := c[what]) is None:
                continue
            compared = figure["overhead"] is not None
            ci = [f"{100 * q:+.2f}" for q in figure["overhead_ci95"]] if compared else []
            rows.append(
                [
                    title if c is data["configurations"][0] else "",
                    c["name"],
                    f"{figure['ms']:.2f}",
                    f"{figure['tokens_per_second']:.1f}",
                    f"{100 * figure['overhead']:+.2f} %" if compared else "",
                    f"{ci[0]} to {ci[1]} %" if compared else "",
                    verdict(figure),
                ]
            )
    partial = f"  PARTIAL: {data['rounds_asked']} were asked for" if data["partial"] else ""
    lines = [f"{name}: {value}" for name, value in data.get("machine", {}).items()]
    lines += [
        f"model: {os.path.basename(data['model'])}",
        f"work: {data['n_prompt']} tokens of prompt in batches of {data['batch_size']}, then "
        f"{data['n_predict']} one by one; {data['rounds']} rounds, {data['warm_up']} before them "
        f"dropped{partial}",
        *(f"{c['name']}: {', '.join(c['rules'])}" for c in data["configurations"] if c["rules"]),
        "",
        table(rows, {2, 3, 4, 5}),
    ]
    if data["rounds"] < ENOUGH_ROUNDS:
        lines += ["", f"fewer than {ENOUGH_ROUNDS} rounds: the intervals are narrower than they should be"]
    for c in data["configurations"]:
        if c["name"] == CONTROL:
            lines += ["", control_text(c)]
    return "\n".join(lines)


def control_text(control: dict[str, Any]) -> str:
    """What the second baseline says of the figures beside it."""
    wrong = [title for what, title in _WHAT.items() if control[what] and control[what]["resolved"]]
    if not wrong:
        return "control (the baseline once more): no difference resolved, as it must be"
    return (
        f"control (the baseline once more): differs in {', '.join(wrong)}, which one interval in twenty does"
        " by chance: take no difference of that size for real, and run more rounds"
    )
